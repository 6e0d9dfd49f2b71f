"""Inside a rehearsed script that is timed: starts the card's clock as soon as PyTorch is there, and tells what it showed.

Only the standard library until then: the estimators are loaded from where this package's are, since the script's
environment may lack them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

#: Where the estimators' package lies.
ESTIMATORS = "WHICHLORA_REHEARSAL_ESTIMATORS"
#: The card, as lanes.TIME names it: that module can only be imported where the estimators are known.
TIME = "WHICHLORA_REHEARSAL_TIME"

_started: list[Any] = []


def patches() -> dict[str, Any]:
    """Return what is to be done to which module once it is imported: nothing where no time was asked for."""
    return {"torch": _start} if os.environ.get(TIME) else {}


def _start(torch: ModuleType) -> None:
    _find_estimators()
    lanes = import_module(f"{__package__}.lanes")
    follow(lanes.start(import_module("whichlora_null.control")))


def follow(lanes: Any) -> Any:
    """Let a clock that was started tell the times from now on."""
    _started.append(lanes)
    return lanes


def _find_estimators() -> None:
    """Make the estimators importable by their name, and nothing else of the folder that they lie in."""
    name = "whichlora_estimators"
    if name in sys.modules or ESTIMATORS not in os.environ:
        return
    folder = Path(os.environ[ESTIMATORS])
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def decomposing(name: str, matrix: Any) -> AbstractContextManager[None]:
    """Lay what the card takes to decompose a matrix, where a clock runs."""
    clock: AbstractContextManager[None] = _started[0].decomposing(name, matrix) if _started else nullcontext()
    return clock


def report() -> dict[str, Any]:
    """Return what the clock showed: seconds of the card's time, optimizer steps, the median step."""
    if not _started:
        return {}
    lanes = _started[0]
    seen = {"seconds": lanes.device_s(), "steps": len(lanes.steps_s)}
    return {"times": seen if lanes.step_s is None else {**seen, "step_s": lanes.step_s}}
