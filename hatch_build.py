"""Compile the allocator's replay while the package is built or installed; without a C compiler it is installed without."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "estimators/whichlora_estimators"
SOURCE, LIBRARY = f"{FOLDER}/replay.c", f"{FOLDER}/_replay.so"


class CompileReplay(BuildHookInterface):  # type: ignore[type-arg]
    """Put the compiled library beside its source, from where an editable installation uses it and a wheel takes it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say that the wheel is for this platform then."""
        if self.target_name == "wheel" and self._compile():
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(LIBRARY)

    def _compile(self) -> bool:
        if sys.platform == "win32":
            return False
        library = Path(self.root, LIBRARY)
        compiler = shlex.split(os.environ.get("CC") or "cc")
        fresh = library.with_name(f"{library.name}.{os.getpid()}")
        command = [*compiler, "-O2", "-shared", "-fPIC", "-o", str(fresh), str(Path(self.root, SOURCE))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(library)  # a running process keeps the one that it has loaded
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            self.app.display_warning(f"estimates will be slower, as {SOURCE} was not compiled: {said}")
            with suppress(OSError):  # a source tree that cannot be written to
                library.unlink(missing_ok=True)
                fresh.unlink(missing_ok=True)
            return False
        return True
