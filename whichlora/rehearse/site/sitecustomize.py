"""Run by the Python of a rehearsed script, after the null device's own: begins to watch, then runs what it hides."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _watch() -> None:
    """Load what is needed as a package of its own: nothing else of ours need be importable here."""
    name = "whichlora_rehearsal_inside"
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    package.__path__ = [str(_HERE.parent)]
    sys.modules[name] = package
    importlib.import_module(f"{name}.inside").watch()


def _run_hidden_one() -> None:
    """Look behind this folder only: before it lies the null device's, which has run."""
    folders = [Path(path or ".").resolve() for path in sys.path]
    behind = sys.path[folders.index(_HERE) + 1 :] if _HERE in folders else []
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", behind)
    if spec and spec.loader:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_watch()
_run_hidden_one()
