"""Environments with other versions of the libraries, made once by pip and kept in the user's cache.

Where PyTorch stays as it is, an environment holds only what differs, over what is installed here. With another PyTorch
it holds everything: transformers, peft, bitsandbytes and accelerate in the versions installed here unless named.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_profiles_db.environment import LIBRARIES

from ..apart import module_command
from ..nulldevice.compiler import cache_folder
from .pool import OUR_PACKAGES

_COMPLETE = "whichlora-complete.json"
_SAME_UNLESS_NAMED = ("transformers", "peft", "bitsandbytes", "accelerate")
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(\[[\w,.-]+\])?\s*((?:(?:==|[<>~!]=|<|>)\s*[\w.*+!]+,?\s*)*)")
_LAST_LINES = 12
_VERSIONS = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps([sys.version.split()[0], found]))
"""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherStack:
    """An environment of its own: the requirements that it was asked for, its Python, and what is installed there."""

    text: str
    python: Path
    python_version: str
    versions: Mapping[str, str]
    packages: Path  # a folder in which its Python finds ours


def parse_stack(text: str) -> tuple[str, ...]:
    """Return the requirements of "torch==2.6.0,transformers==5.8.1", sorted. Raises BadValue."""
    found = [part.strip().strip(",") for part in re.split(r",\s*(?=[A-Za-z])|\s+(?=[A-Za-z])", text.strip())]
    wrong = [part for part in found if not _REQUIREMENT.fullmatch(part)]
    names = [_name(part) for part in found if part not in wrong]
    if wrong or len(set(names)) < len(names):
        todo = 'Write requirements with commas between: "torch==2.6.0,transformers==5.8.1".'
        raise BadValue("no list of requirements", value=", ".join(wrong) or text, todo=todo)
    return tuple(sorted("".join(part.split()) for part in found))


def make_stack(text: str, on_progress: Progress | None = None) -> OtherStack:
    """Return the environment of a list of requirements, made by pip if it is not there yet.

    Of two processes that want the same one, the second waits. What was left half-made is made anew. Raises BadValue for
    what is no list of requirements, WhichloraError with pip's last words where pip fails.
    """
    plan = _plan(parse_stack(text))
    folder = cache_folder().parent / "stacks" / plan.key
    tell = on_progress or (lambda line: None)
    with _lock(folder, tell):
        if not (folder / _COMPLETE).is_file():
            tell(f"making an environment for {text}, once: {folder}")
            _make(folder, plan, tell)
    python = folder / "bin" / "python"
    version, versions = _installed(python)
    return OtherStack(
        text=text, python=python, python_version=version, versions=versions, packages=_our_packages(folder)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What pip is asked for; `over` is the folder of packages that lies beneath, if any does."""

    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    over: str

    @property
    def key(self) -> str:
        """Name the folder by all that its content depends on."""
        content = [self.requirements, self.constraints, self.over, sys.version, sys.prefix]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _plan(requirements: tuple[str, ...]) -> _Plan:
    here = {name: version for name in ("torch", *_SAME_UNLESS_NAMED) if (version := _version(name))}
    asked = {_name(each): each for each in requirements}
    torch = asked.get("torch")
    if "torch" in here and torch in (None, f"torch=={here['torch']}"):
        rest = tuple(each for each in requirements if each != torch)
        return _Plan(
            requirements=rest,
            constraints=(f"torch=={here['torch']}",),
            over=sysconfig.get_path("purelib"),
        )
    same = tuple(f"{name}=={here[name]}" for name in _SAME_UNLESS_NAMED if name in here and name not in asked)
    return _Plan(requirements=(*requirements, *same), constraints=(), over="")


def _name(requirement: str) -> str:
    found = _REQUIREMENT.match(requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[1]).lower()


def _version(library: str) -> str:
    try:
        return metadata.version(library).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def _lock(folder: Path, tell: Progress) -> Iterator[None]:
    """Hold the environment's lock; it goes with the process, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".lock").open("w")
    except OSError as error:
        todo = "Set WHICHLORA_CACHE_DIR to a folder that you can write to."
        raise WhichloraError("the cache cannot be written to", value=str(folder.parent), todo=todo) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process makes this environment: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, plan: _Plan, tell: Progress) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    _run(module_command("venv", str(folder)), plan, tell)
    python = str(folder / "bin" / "python")
    if plan.over:
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "over.pth").write_text(f"{plan.over}\n", encoding="utf-8")
    limits = folder / "constraints.txt"
    limits.write_text("\n".join(plan.constraints), encoding="utf-8")
    if plan.requirements:
        _run(module_command("pip", "install", "-c", str(limits), *plan.requirements, python=python), plan, tell)
    (folder / _COMPLETE).write_text(json.dumps(plan.requirements), encoding="utf-8")


def _run(command: list[str], plan: _Plan, tell: Progress) -> None:
    """Run a command, telling what it says; raise with its last lines where it fails."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables
    ) as process:
        assert process.stdout
        for line in process.stdout:
            said = [*said[1 - _LAST_LINES :], line.rstrip()]
            if line.startswith(("Collecting", "Downloading", "  Downloading", "Installing", "Successfully")):
                tell(line.strip()[:160])
    if process.returncode:
        shown = "\n".join(line for line in said if line)
        raise WhichloraError(
            f"pip could not make an environment:\n{shown}\n",
            value=", ".join(plan.requirements),
            todo="Name versions that there are for this Python and that go together, or check the network.",
        )


def _installed(python: Path) -> tuple[str, dict[str, str]]:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(python), "-c", _VERSIONS, *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=python.parents[1], check=False)
    if done.returncode:
        todo = f"Remove {python.parents[1]}: it is made anew."
        raise WhichloraError("an environment's Python does not run", value=done.stderr[-200:], todo=todo)
    version, versions = json.loads(done.stdout)
    return version, versions


def _our_packages(folder: Path) -> Path:
    """Return a folder that holds links to our packages, and to nothing that is installed beside them."""
    sources = {name: Path(str(import_module(name).__file__)).parent for name in OUR_PACKAGES}
    key = hashlib.sha256(json.dumps([str(source) for source in sources.values()]).encode()).hexdigest()[:8]
    links = folder / f"ours-{key}"
    links.mkdir(exist_ok=True)
    for name, source in sources.items():
        if not (links / name).exists():
            (links / name).unlink(missing_ok=True)
            (links / name).symlink_to(source)
    return links
