"""Record every allocation and release of a rehearsed workload, in order: a workload as JSON on stdin, its trace on stdout.

Runs inside of a process on the null device, which benchmarks/tracediff.py starts.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whichlora.nulldevice import control
from whichlora.rehearse.step import Recorder, run
from whichlora_estimators.workload import workload_from_json

_OPERATORS = (
    re.compile(r"autograd::generated::(\w+)::apply"),
    re.compile(r"at::_ops::(\w+)::"),
    re.compile(r"(AccumulateGrad|CopyBackwards|PyNode|InputBuffer)::"),
)
_UNTOLD = ("nn/modules/module.py", "_contextlib.py", "benchmarks/trace_real.py")


class Marker(Recorder):
    """Notes how many allocations and releases there were when each phase began."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, int]] = []

    def mask_is_full(self, full: bool) -> None:
        """Tell the device what it would read back from a mask."""
        control.reset()
        control.set_bool(full)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note where a phase begins."""
        self.marks.append((name, _count()))
        with super().phase(name):
            yield


def main() -> None:
    """Run the workload, print its trace."""
    import torch

    out = sys.stdout
    sys.stdout = sys.stderr
    workload = workload_from_json(json.load(sys.stdin))
    torch.zeros(1, device="cuda")
    torch.cuda.memory._record_memory_history("all", context="all", stacks="all", max_entries=10_000_000)
    recorder, before = Marker(), _count()
    run(workload, recorder)
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    events = [
        (event["size"] if event["action"] == "alloc" else -event["size"], _label(event.get("frames", ())))
        for event in history
        if event["action"] in ("alloc", "free_completed")
    ]
    marks = [(name, count - before) for name, count in recorder.marks]
    json.dump({"marks": marks, "events": events, "peaks": recorder.peaks}, out)


def _count() -> int:
    import torch

    stats = torch.cuda.memory_stats()
    return int(stats["allocation.all.allocated"] + stats["allocation.all.freed"])


def _label(frames: Any) -> str:
    """Name the operators around an event, then the innermost lines of Python."""
    operators: list[str] = []
    lines: list[str] = []
    for frame in frames:
        file, name = frame["filename"], frame["name"]
        if file.endswith(".py"):
            if not file.endswith(_UNTOLD):
                lines.append(f"{Path(file).name}:{frame['line']} {name}")
        elif found := next((match[1] for each in _OPERATORS if (match := each.search(name))), None):
            operators += [] if operators[-1:] == [found] else [found]
    return f"{' < '.join(operators[:4])} | {' < '.join(lines[:4])}"


if __name__ == "__main__":
    main()
