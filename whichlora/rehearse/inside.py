"""Inside a rehearsed script: watch PyTorch's counters, and write down at the end what was seen.

Only the standard library: this file is loaded by its path in environments that do not have the rest of this package.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

FOLDER, EXPLAIN = "WHICHLORA_REHEARSAL_FOLDER", "WHICHLORA_REHEARSAL_EXPLAIN"
LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")
_MOST_EVENTS = 10_000_000
_LONGEST_ERROR = 2000
_INSTALLED = ("/site-packages/", "/dist-packages/", "<frozen ")

_peaks = [0, 0]  # allocated and reserved bytes, of what was counted before the script itself began new peaks
_error: dict[str, str] = {}


def watch() -> None:
    """Begin, in a process that is rehearsed; each one that uses CUDA leaves a report of its own."""
    if FOLDER not in os.environ:
        return
    sys.meta_path.insert(0, _Finder())
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


def _describe(problem: BaseException) -> dict[str, str]:
    """Return what was raised, and from which line of the script's own it came."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _INSTALLED)]
    last = (own or frames)[-1:]
    where = "".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in last)
    return {"kind": type(problem).__name__, "error": str(problem)[:_LONGEST_ERROR], "where": where}


def _report() -> None:
    """Write what PyTorch counted, if this process used CUDA at all."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    stats, control = torch.cuda.memory_stats(), _control()
    seen = {
        "allocated_peak_bytes": max(_peaks[0], stats.get("allocated_bytes.all.peak", 0)),
        "reserved_peak_bytes": max(_peaks[1], stats.get("reserved_bytes.all.peak", 0)),
        "managed_peak_bytes": control.managed_peak_bytes(),
        "ooms": stats.get("num_ooms", 0),
        "missing": control.last_missing(),
        "versions": _versions(torch),
        **_error,
    }
    if os.environ.get(EXPLAIN):
        seen["breakdown"] = _breakdown(torch, seen["allocated_peak_bytes"])
    path = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
    path.write_text(json.dumps(seen), encoding="utf-8")


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


def _keep_peaks(memory: ModuleType) -> None:
    """Remember the peaks that the script forgets when it begins new ones."""

    def keeping(name: str) -> Callable[..., Any]:
        begin = getattr(memory, name)

        def begin_anew(*args: Any, **kwargs: Any) -> Any:
            _peaks[0] = max(_peaks[0], memory.max_memory_allocated())
            _peaks[1] = max(_peaks[1], memory.max_memory_reserved())
            return begin(*args, **kwargs)

        return begin_anew

    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"):
        if hasattr(memory, name):
            setattr(memory, name, keeping(name))


def _record_history(cuda: ModuleType) -> None:
    if os.environ.get(EXPLAIN):
        cuda._lazy_call(
            lambda: cuda.memory._record_memory_history("all", context="all", stacks="python", max_entries=_MOST_EVENTS)
        )


def _decompose_on_host(linalg: ModuleType) -> None:
    """Let the host decompose matrices: the null device has no cuSOLVER. Its workspaces on a card are not counted."""

    def on_host(decompose: Callable[..., Any]) -> Callable[..., Any]:
        def decomposed(matrix: Any, *args: Any, **kwargs: Any) -> Any:
            if not matrix.is_cuda:
                return decompose(matrix, *args, **kwargs)
            found = decompose(matrix.cpu(), *args, **kwargs)
            if isinstance(found, tuple):
                return type(found)(part.to(matrix.device) for part in found)
            return found.to(matrix.device)

        return decomposed

    for name in ("eigh", "pinv", "qr", "svd"):
        setattr(linalg, name, on_host(getattr(linalg, name)))


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "torch.cuda.memory": _keep_peaks,
    "torch.cuda": _record_history,
    "torch.linalg": _decompose_on_host,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to be patched as everybody else would, and has them patched right after they ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = _PATCHES.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch else None
        if patch and spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_patch(module: ModuleType) -> None:
                run(module)
                patch(module)

            spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec
