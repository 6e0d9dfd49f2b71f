"""The PyTorch that a null device is made for: where it lies, its versions, NVIDIA's libraries and headers beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from whichlora_estimators.errors import Unsupported, WhichloraError

from . import locate

_INSTALL = 'Install a CUDA build: pip install torch (Linux), or pip install "whichlora[gpu]" for the whole stack.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One environment's CUDA build of PyTorch, and folders of what a null device for it is built from."""

    torch: Path
    torch_version: str
    cuda_version: str
    packages: tuple[Path, ...]  # torch, nvidia's namespace folders, triton, bitsandbytes

    @property
    def cuda_major(self) -> int:
        """The major version of CUDA that PyTorch was built with: it decides the layout of the runtime's structures."""
        return int(self.cuda_version.split(".")[0])

    def libraries(self) -> list[Path]:
        """Return the shared libraries whose functions must not reach a driver: NVIDIA's and those that call them."""
        folders = (self.torch / "lib", *self.packages)
        patterns = ("*.so*", "lib/*.so*", "*/lib/*.so*")  # bitsandbytes/, torch/lib, nvidia/cu13/lib
        return sorted({path for folder in folders for pattern in patterns for path in folder.glob(pattern)})

    def include_folders(self) -> list[Path]:
        """Return folders that may hold CUDA's headers, those of PyTorch's own wheels first."""
        roots = [path for package in self.packages for path in (package, *package.glob("*/"), *package.glob("*/*/"))]
        roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX") if os.environ.get(name)]
        roots += [Path("/usr/local/cuda"), Path("/usr")]
        return [root / "include" for root in roots if (root / "include").is_dir()]


def find_stack(python: Path | None = None) -> Stack:
    """Return the stack of an interpreter (this one by default), without importing PyTorch.

    Raises Unsupported off Linux and for CPU-only or ROCm builds, WhichloraError where there is no PyTorch.
    """
    if not sys.platform.startswith("linux"):
        raise Unsupported(
            "the null device needs Linux (it is preloaded under a CUDA build of PyTorch)",
            value=sys.platform,
            todo="Use `whichlora estimate`, or Linux: WSL 2, a container or a login node will do, without a GPU.",
        )
    found = _locate(python)
    if "torch" not in found:
        raise WhichloraError("this Python has no PyTorch", value=str(python or sys.executable), todo=_remedy(python))
    torch = Path(found["torch"][0])
    torch_version, cuda_version = _versions(torch)
    packages = tuple(Path(folder) for folders in found.values() for folder in folders)
    return Stack(torch=torch, torch_version=torch_version, cuda_version=cuda_version, packages=packages)


def _remedy(python: Path | None) -> str:
    """Say what to do about an interpreter without PyTorch: more often than not another one was meant."""
    if python is None or "torch" not in locate.locate():
        return _INSTALL
    return f"whichlora's own has it: name {sys.executable} instead, or activate its environment first."


def _locate(python: Path | None) -> dict[str, list[str]]:
    if python is None or Path(python) == Path(sys.executable):
        return locate.locate()
    try:
        answer = subprocess.run([str(python), locate.__file__], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise WhichloraError("this is no Python that runs", value=str(python), todo="Name its executable.") from error
    found: dict[str, list[str]] = json.loads(answer.stdout)
    return found


def _versions(torch: Path) -> tuple[str, str]:
    """Read PyTorch's own version and the CUDA version of its build from its version.py."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '(.*)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= '(.*)'", text, re.MULTILINE)
    shown = version[1] if version else "unknown"
    if not cuda:
        raise Unsupported(
            "the null device needs a CUDA build of PyTorch, this one has none", value=shown, todo=_INSTALL
        )
    return shown, cuda[1]
