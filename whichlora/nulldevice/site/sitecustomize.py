"""Run by every Python that starts on a null device: installs the answers, then runs the sitecustomize it hides."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _load_answers() -> None:
    """Load control.py and answers.py as a package of their own: nothing else of ours need be importable here."""
    name = "whichlora_nulldevice_answers"
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    package.__path__ = [str(_HERE.parent)]
    sys.modules[name] = package
    importlib.import_module(f"{name}.answers").install()


def _run_hidden_one() -> None:
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec and spec.loader:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_load_answers()
_run_hidden_one()
