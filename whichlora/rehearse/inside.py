"""Inside a rehearsed script: watch PyTorch's counters, and write down at the end what was seen.

Only the standard library: this file is loaded by its path in environments that do not have the rest of this package.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from . import hub, ticking
from .phases import Phases

FOLDER, EXPLAIN = "WHICHLORA_REHEARSAL_FOLDER", "WHICHLORA_REHEARSAL_EXPLAIN"
LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")
_MOST_EVENTS = 10_000_000
OOM = "OutOfMemoryError"  # torch's, by its name: torch may not be imported here
_LONGEST_ERROR = 2000
_MOST_CAUSES = 20
_INSTALLED = ("/site-packages/", "/dist-packages/", "<frozen ")

_phases = Phases()
_error: dict[str, str] = {}


def watch() -> None:
    """Begin, in a process that is rehearsed; each one that uses CUDA leaves a report of its own."""
    if FOLDER not in os.environ:
        return
    patch = import_module("whichlora_null.imports").patch_on_import
    for patches in (_phases.patches(), _PATCHES, hub.patches(), ticking.patches()):
        patch(patches)
    atexit.register(_report)
    shown = sys.excepthook

    def hook(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
        with contextlib.suppress(Exception):
            _error.update(_describe(problem))
        shown(kind, problem, trace)

    sys.excepthook = hook


def _control() -> Any:
    """Return the null device's control, which its sitecustomize has loaded."""
    return import_module("whichlora_null.control")


def _first_cause(problem: BaseException) -> BaseException:
    """Return the out-of-memory error that an error of another kind was raised from, if it was, else the error itself."""
    cause: BaseException | None = problem
    for _ in range(_MOST_CAUSES):
        if cause is None or type(cause).__name__ == OOM:
            break
        cause = cause.__cause__
    return cause if cause is not None and type(cause).__name__ == OOM else problem


def _describe(problem: BaseException) -> dict[str, str]:
    """Return what was raised, and from which line of the script's own it came."""
    problem = _first_cause(problem)
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _INSTALLED)]
    last = (own or frames)[-1:]
    where = "".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in last)
    if type(problem).__name__ != "SystemExit":
        _error["phase"] = _phases.now(problem)
    return {"kind": type(problem).__name__, "error": str(problem)[:_LONGEST_ERROR], "where": where}


def _report() -> None:
    """Write what PyTorch counted, if this process used CUDA at all."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    _phases.mark(_error.get("phase") or _phases.now())
    stats, control = torch.cuda.memory_stats(), _control()
    seen = {
        "allocated_peak_bytes": max((allocated for allocated, _ in _phases.peaks.values()), default=0),
        "reserved_peak_bytes": max((reserved for _, reserved in _phases.peaks.values()), default=0),
        "phases": _phases.peaks,
        "managed_peak_bytes": control.managed_peak_bytes(),
        "ooms": stats.get("num_ooms", 0),
        "missing": control.last_missing(),
        "versions": _versions(torch),
        **ticking.report(),
        **_error,
    }
    if os.environ.get(EXPLAIN):
        seen["breakdown"] = _breakdown(torch, seen["allocated_peak_bytes"])
    path = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(seen), encoding="utf-8")
    whole.replace(path)  # a report that a full disk cuts off is none


def _versions(torch: Any) -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _breakdown(torch: Any, allocated_peak_bytes: int) -> dict[str, Any]:
    from . import breakdown

    events = torch.cuda.memory._snapshot()["device_traces"][0]
    found = breakdown.break_down(events, allocated_peak_bytes=allocated_peak_bytes)
    return breakdown.to_json(found, stacks=True)


def _record_history(cuda: ModuleType) -> None:
    if os.environ.get(EXPLAIN):
        cuda._lazy_call(
            lambda: cuda.memory._record_memory_history("all", context="all", stacks="python", max_entries=_MOST_EVENTS)
        )


def decompose_on_host(linalg: ModuleType) -> None:
    """Let the host decompose matrices: the null device has no cuSOLVER. Its workspaces on a card are not counted."""

    def on_host(name: str, decompose: Callable[..., Any]) -> Callable[..., Any]:
        def decomposed(matrix: Any, *args: Any, **kwargs: Any) -> Any:
            if not matrix.is_cuda:
                return decompose(matrix, *args, **kwargs)
            with ticking.decomposing(name, matrix):
                found = decompose(matrix.cpu(), *args, **kwargs)
                if isinstance(found, tuple):
                    return type(found)(part.to(matrix.device) for part in found)
                return found.to(matrix.device)

        return decomposed

    for name in ("eigh", "pinv", "qr", "svd"):
        setattr(linalg, name, on_host(name, getattr(linalg, name)))


def _report_of_forked(util: ModuleType) -> None:
    """Have processes that multiprocessing forks report too: they end without what atexit was told."""
    util.register_after_fork(_phases, lambda _: util.Finalize(None, _report, exitpriority=0))


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "torch.cuda": _record_history,
    "torch.linalg": decompose_on_host,
    "multiprocessing.util": _report_of_forked,
}
