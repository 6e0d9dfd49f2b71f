"""Compiling the null device: once, for one PyTorch, and with a clear word where it cannot be."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whichlora.nulldevice import build, compiler, stack
from whichlora.nulldevice.elf import read_symbols
from whichlora_estimators.errors import Unsupported, WhichloraError

pytestmark = pytest.mark.stack
ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nulldevice"


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """Return an interpreter that finds a made-up PyTorch in tmp_path/site and nothing else of the stack."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec env PYTHONPATH={tmp_path}/site "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def write_version(python: Path, cuda: str) -> None:
    (python.parent / "site/torch/version.py").write_text(f"__version__ = '9.9.9'\ncuda: str = {cuda}\nhip = None\n")


def test_two_at_once_get_one_device(empty_cache: Path) -> None:
    """Two processes that build at the same time both end with the same complete folder, and leave nothing else."""
    program = "from whichlora.nulldevice import build; print(build())"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'estimators'}"}

    def one() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: one(), range(2))
    assert first == second
    assert [path.name for path in empty_cache.iterdir()] == [Path(first).name]
    assert {"libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1"} <= {path.name for path in Path(first).iterdir()}


def test_the_compiler_has_nothing_to_say(tmp_path: Path) -> None:
    """Our C compiles without a warning, with every one turned on that -Wall and -Wextra turn on."""
    found = stack.find_stack()
    (tmp_path / "calls.h").write_text(compiler._calls(found, found.libraries()))
    command = compiler._command(compiler._compiler(), compiler._runtime_headers(found), tmp_path, found)
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_nothing_is_compiled_twice(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is in the cache needs no compiler any more."""
    folder = build()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build() == folder


def test_the_folder_s_name_tells_its_pytorch_and_changes_with_its_sources(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is keyed by PyTorch's and CUDA's versions and by our sources: other sources, other folder."""
    found = stack.find_stack()
    name = build().name
    assert name.startswith(f"torch{found.torch_version}-cuda{found.cuda_version}-")
    before = compiler._fingerprint(found, found.libraries())
    shutil.copytree(compiler._SOURCES, tmp_path / "c")
    monkeypatch.setattr(compiler, "_SOURCES", tmp_path / "c")
    assert compiler._fingerprint(found, found.libraries()) == before
    with (tmp_path / "c" / "card.c").open("a") as source:
        source.write("// changed\n")
    assert compiler._fingerprint(found, found.libraries()) != before


def test_no_compiler_is_told(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler the error names those that were tried and says what to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(WhichloraError, match=r"no C compiler.*cc, gcc, clang.*apt install gcc"):
        build()
    monkeypatch.setenv("CC", "my-cc -m64")
    with pytest.raises(WhichloraError, match="my-cc"):
        build()
    assert not empty_cache.exists()


def test_a_compiler_that_fails_is_quoted(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the compiler says is in the error, and no folder is left behind."""
    (tmp_path / "cc").write_text("#!/bin/sh\necho it will not do >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(WhichloraError, match="it will not do"):
        build()
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_the_loader_cannot_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache whose path has a space is refused with what to set, and one that cannot be made likewise."""
    monkeypatch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path / "my cache"))
    with pytest.raises(WhichloraError, match="WHICHLORA_CACHE_DIR"):
        build()
    (tmp_path / "file").touch()
    monkeypatch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(WhichloraError, match="cannot be written to"):
        build()


def test_pytorch_without_cuda_is_told_what_to_install(empty_cache: Path, other_python: Path) -> None:
    """A CPU-only PyTorch is an error that says what to install, one without headers which; without any, who has one."""
    write_version(other_python, "None")
    with pytest.raises(Unsupported, match=r"CUDA build.*9\.9\.9.*pip install torch"):
        build(other_python)
    write_version(other_python, "'99.1'")
    with pytest.raises(WhichloraError, match=r"headers.*99\.1.*nvidia-cuda-runtime"):
        build(other_python)
    shutil.rmtree(other_python.parent / "site/torch")
    with pytest.raises(WhichloraError, match=f"no PyTorch.*whichlora's own has it: name {sys.executable}"):
        build(other_python)
    with pytest.raises(WhichloraError, match="no Python that runs"):
        build(other_python.parent / "nowhere")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Off Linux the error says so, and what can be done there."""
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(Unsupported, match=r"needs Linux.*whichlora estimate"):
        build()


def test_symbols_are_those_of_nm() -> None:
    """Our reader of symbol tables finds the functions that `nm -D` finds."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    library = stack.find_stack().torch / "lib" / "libc10_cuda.so"
    lines = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    entries = [(line.split()[-2], line.split()[-1].split("@")[0]) for line in lines]
    symbols = read_symbols(library)
    assert {name for kind, name in entries if kind == "T"} <= symbols.defined
    assert symbols.defined <= {name for kind, name in entries if kind in "TWi"}
    in_c = {name for kind, name in entries if kind == "U" and not name.startswith("_Z")}
    assert in_c == {name for name in symbols.undefined if not name.startswith("_Z")} & in_c
    assert len(in_c) > 50
    assert "cudaMalloc" in symbols.undefined
    assert read_symbols(Path(__file__)).defined == frozenset()


def test_every_call_of_pytorch_is_answered_or_fails_by_name() -> None:
    """No CUDA function that PyTorch or bitsandbytes imports is left to a real library, but for versions and texts."""
    found = stack.find_stack()
    folder = build()
    ours = read_symbols(folder / "libcuda.so.1").defined
    for library in found.libraries():
        if "nvidia" in library.parts:
            continue
        wanted = {name for name in read_symbols(library).undefined if compiler._OURS.fullmatch(name)}
        left = {name for name in wanted - ours if not compiler._HARMLESS.fullmatch(name)}
        assert left == set(), library
