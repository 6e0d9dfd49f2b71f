"""Run by every Python that starts on a null device: installs the answers, then runs the sitecustomize it hides."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _run_hidden_one() -> None:
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec and spec.loader:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


importlib.import_module("whichlora_null.answers").install()
_run_hidden_one()
