"""Compile the null device for one PyTorch, once, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from whichlora_estimators.errors import WhichloraError

from .elf import read_symbols
from .stack import Stack, find_stack

LIBRARY = "libcuda.so.1"  # its soname as well, so that whoever opens the driver by name gets what is already loaded
ALSO_AS = ("libcuda.so", "libnvidia-ml.so.1")  # the first for who links with -lcuda, as Triton does
_SOURCES = Path(__file__).parent / "c"

# What a function that nobody wrote returns, by the beginning of its name: each library's own "not supported".
_ERRORS = (
    ("cublas", 15),
    ("cudnn", 3000),
    ("cufft", 16),
    ("cupti", 27),
    ("curand", 999),
    ("cusolver", 9),
    ("cusparse", 10),
    ("nccl", 3),
    ("nvml", 3),
    ("__cuda", 801),
    ("cu", 801),
)
_DRIVER_NAME = re.compile(rb"\b(?:cu[A-Z]|nvml[A-Z])[A-Za-z0-9]*(?:_v[0-9]+)?(?:_ptsz|_ptds)?\b")
_OURS = re.compile(r"(?:__cuda|cuda|cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nccl|nvml|cu)[A-Z]\w*")
# Left to the real libraries, which need no device to answer: which version they are, what an error means.
_HARMLESS = re.compile(
    r"(?:cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nccl)\w*(?:Version|Property|String|Name|LastError)"
)


def build(python: Path | None = None) -> Path:
    """Return the folder that holds the null device for an interpreter's PyTorch (by default this one's).

    It is compiled if need be. Raises WhichloraError where PyTorch, a compiler, a header or a writable cache is missing,
    and Unsupported off Linux or for a PyTorch without CUDA.
    """
    stack = find_stack(python)
    libraries = stack.libraries()
    cache = cache_folder()
    folder = cache / f"torch{stack.torch_version}-cuda{stack.cuda_version}-{_fingerprint(stack, libraries)}"
    if not folder.is_dir():
        _compile_into(folder, stack, libraries)
    return folder


def cache_folder() -> Path:
    """Return where compiled null devices are kept: below $WHICHLORA_CACHE_DIR, $XDG_CACHE_HOME or ~/.cache."""
    ours = os.environ.get("WHICHLORA_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(ours or Path(shared) / "whichlora").expanduser().absolute() / "nulldevice"
    if re.search(r"[\s:;]", str(folder)):
        raise WhichloraError(
            "the loader cannot preload from a path with spaces or colons",
            value=str(folder),
            todo="Set WHICHLORA_CACHE_DIR to a folder without them.",
        )
    return folder


def _fingerprint(stack: Stack, libraries: Iterable[Path]) -> str:
    """Hash all that the result depends on: our sources, and the identity of every library that it stands in for."""
    digest = hashlib.sha256(f"{stack.torch}\n{stack.torch_version}\n{stack.cuda_version}\n".encode())
    for folder, pattern in ((_SOURCES, "*.[ch]"), (Path(__file__).parent, "*.py")):
        for source in sorted(folder.rglob(pattern)):
            digest.update(f"{source.relative_to(folder)}\n".encode() + source.read_bytes())
    for library in libraries:
        status = library.stat()
        digest.update(f"{library} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _compile_into(folder: Path, stack: Stack, libraries: list[Path]) -> None:
    """Compile beside the folder and rename: whoever comes second finds it there, a killed one leaves no half of it."""
    compiler = _compiler()
    include = _runtime_headers(stack)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        todo = "Set WHICHLORA_CACHE_DIR to a folder that you can write to."
        raise WhichloraError("the cache cannot be written to", value=str(folder.parent), todo=todo) from error
    try:
        (workshop / "calls.h").write_text(_calls(stack, libraries), encoding="ascii")
        _run(_command(compiler, include, workshop, stack))
        for name in ALSO_AS:
            (workshop / name).symlink_to(LIBRARY)
        _publish(workshop, folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _publish(workshop: Path, folder: Path) -> None:
    try:
        workshop.rename(folder)
    except OSError:
        if not folder.is_dir():  # else somebody was faster, with the same result
            raise


def _compiler() -> list[str]:
    named = os.environ.get("CC")
    for candidate in [named] if named else ["cc", "gcc", "clang"]:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    raise WhichloraError(
        "the null device is compiled on first use and there is no C compiler",
        value=named or "cc, gcc, clang",
        todo="Install one (apt install gcc, dnf install gcc, conda install gcc) or set CC.",
    )


def _runtime_headers(stack: Stack) -> Path:
    """Return the folder of the CUDA runtime's headers, of the major version that PyTorch was built with."""
    for folder in stack.include_folders():
        header = folder / "cuda_runtime_api.h"
        if (
            header.is_file()
            and (folder / "driver_types.h").is_file()
            and _runtime_version(folder) // 1000 == stack.cuda_major
        ):
            return folder
    package = "nvidia-cuda-runtime" if stack.cuda_major >= 13 else f"nvidia-cuda-runtime-cu{stack.cuda_major}"
    raise WhichloraError(
        "the CUDA runtime's headers were not found",
        value=f"CUDA {stack.cuda_version}",
        todo=f"Install them beside PyTorch: pip install {package}; or set CUDA_HOME.",
    )


def _runtime_version(include: Path) -> int:
    found = re.search(r"#define CUDART_VERSION\s+(\d+)", (include / "cuda_runtime_api.h").read_text(errors="replace"))
    return int(found[1]) if found else 0


def _command(compiler: list[str], include: Path, workshop: Path, stack: Stack) -> list[str]:
    codes, ptx = _built_for(stack)
    return [
        *compiler,
        *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-Wl,-Bsymbolic", f"-Wl,-soname,{LIBRARY}"),
        *(f"-I{_SOURCES / 'include'}", f"-I{include}", f"-I{workshop}"),
        *(f"-DCUDART_VERSION={_runtime_version(include)}", f"-DNULLCUDA_CODES={codes}", f"-DNULLCUDA_PTX={ptx}"),
        *("-o", str(workshop / LIBRARY), *map(str, sorted(_SOURCES.glob("*.c"))), "-lpthread", "-ldl"),
    ]


def _built_for(stack: Stack) -> tuple[str, str]:
    """Return which compute capabilities PyTorch's build holds machine code for, and PTX, as lists in C: `75,80`."""
    text = b""
    for name in ("libtorch_python.so", "libtorch_cuda.so"):
        image = (stack.torch / "lib" / name).read_bytes()
        text = max(re.findall(rb"\0((?:(?:sm|compute)_\d+[a-z]? ?)+)\0", image), key=len, default=b"")
        if text:
            break
    codes = re.findall(r"sm_(\d+)(?:\s|$)", text.decode())
    ptx = re.findall(r"compute_(\d+)(?:\s|$)", text.decode())
    return ",".join(codes) or "0", ",".join(ptx) or "0"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise WhichloraError(
            "the C compiler does not run", value=command[0], todo="Set CC to one that does."
        ) from error
    if done.returncode:
        shown = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise WhichloraError(
            f"the null device does not compile:\n{shown}\n",
            value=shlex.join(command),
            todo="Try another compiler with CC, and report this.",
        )


def _calls(stack: Stack, libraries: Iterable[Path]) -> str:
    """Return C that has every function of NVIDIA's libraries fail by name, unless one of our sources defines it."""
    names = _driver_names(stack)
    for library in libraries:
        symbols = read_symbols(library)
        names |= symbols.defined if "nvidia" in library.parts else set()
        names |= symbols.undefined
    ours = sorted(name for name in names if _OURS.fullmatch(name) and not _HARMLESS.fullmatch(name))
    return "".join(f"MISSING({name}, {_error_of(name)})\n" for name in ours)


def _driver_names(stack: Stack) -> set[str]:
    """Return functions of the driver and NVML, which are not installed: those of cuda.h and those PyTorch asks for."""
    files = [folder / "cuda.h" for folder in stack.include_folders()]
    files += [stack.torch / "lib" / name for name in ("libc10_cuda.so", "libcaffe2_nvrtc.so")]
    found = [_DRIVER_NAME.findall(file.read_bytes()) for file in files if file.is_file()]
    return {name.decode() for names in found for name in names}


def _error_of(function: str) -> int:
    return next(error for prefix, error in _ERRORS if function.startswith(prefix))
