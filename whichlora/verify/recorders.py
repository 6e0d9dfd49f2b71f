"""What a run is seen by: recorders of memory and clocks, for CUDA (a card, or the null device) and for the host."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from whichlora.rehearse.step import Recorder

from .nvml import ProcessBytes


class CudaClock:
    """CUDA events: moments in the card's own stream of work. On the null device they are the host's and mean nothing."""

    def __init__(self, *, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps

    def mark(self) -> Any:
        """Record an event after all work that has been given to the card."""
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between_s(self, marks: list[Any]) -> list[float]:
        """Wait for the card, then return the seconds from each event to the next."""
        import torch

        torch.cuda.synchronize()
        return [first.elapsed_time(then) / 1e3 for first, then in pairwise(marks)]


class Telling:
    """Says how far a run is, at most every `every_s` seconds: what takes less says nothing."""

    def __init__(self, say: Callable[[str], None], every_s: float) -> None:
        self._say, self._every_s = say, every_s
        self._last_s = time.monotonic()

    def __call__(self, text: str) -> None:
        """Say something, if it is time."""
        if time.monotonic() - self._last_s >= self._every_s:
            self._say(text)
            self._last_s = time.monotonic()


class HostClock:
    """The host's own clock, for work that is done when the call returns.

    Of a single thread it counts the time that it ran, not the time that others kept it waiting. Progress is told once a
    moment has been taken: what that costs is in the time after it, some microseconds every few seconds.
    """

    def __init__(self, *, warmup: int, steps: int, tell: Callable[[str], None], generates: bool) -> None:
        import torch

        self.warmup, self.steps, self._tell, self._generates = warmup, steps, tell, generates
        self._alone = torch.get_num_threads() == 1
        self._done = self._generations = 0

    def mark(self) -> float:
        """Return this moment in seconds."""
        now_s = time.process_time() if self._alone else time.perf_counter()
        if self._generates:
            self._tell(f"timing generation {self._generations + 1} of {self.steps}, {self._done} passes done")
        else:
            self._tell(f"timing, {self._done} of {self.steps} steps done")
        self._done += 1
        return now_s

    def between_s(self, marks: list[float]) -> list[float]:
        """Return the seconds from each moment to the next."""
        self._generations, self._done = self._generations + 1, 0
        return [then - first for first, then in pairwise(marks)]


class CudaRecorder(Recorder):
    """Counts as a rehearsal does, and asks NVML what the process holds."""

    def __init__(self, process_bytes: ProcessBytes) -> None:
        super().__init__()
        self._process_bytes = process_bytes

    def count_process(self) -> None:
        """Keep the most that NVML says."""
        import torch

        seen = self._process_bytes.read(str(torch.cuda.get_device_properties(0).uuid))
        if seen is not None:
            self.counts["process_bytes"] = max(seen, self.counts.get("process_bytes", 0))


class HostRecorder(Recorder):
    """Knows the phases but none of PyTorch's counters, which the host has not; keeps the process's resident peak.

    `files_bytes` of files, libraries most of all, are what its parent had mapped when it forked: the copy only counts
    those that it has touched since, so that the rest is added.
    """

    device = "cpu"

    def __init__(self, *, files_bytes: int = 0, tell: Callable[[str], None] = lambda _: None) -> None:
        super().__init__()
        self._files_bytes, self._tell = files_bytes, tell

    def count_allocated(self, name: str) -> None:
        """PyTorch does not count what it allocates on the host."""

    def count_process(self) -> None:
        """Keep the most memory that the process has had so far: before whole steps are timed, and after."""
        self._tell("memory is known; running the steps that are not timed")
        untouched_bytes = max(0, self._files_bytes - resident_files_bytes())
        self.counts["process_bytes"] = resident_peak_bytes() + untouched_bytes

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Know where an error struck."""
        self.current = name
        self._tell(name)
        yield
        self.current = ""


def resident_peak_bytes() -> int:
    """Return the most memory that this process has had at once, in bytes of host memory.

    Source: VmHWM of /proc/self/status; elsewhere getrusage(2), whose peak includes what a parent had when it forked.
    """
    seen = _status("VmHWM")
    if seen is not None:
        return seen
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def resident_files_bytes() -> int:
    """Return the bytes of files that this process has mapped and touched (RssFile); 0 where that is not told."""
    return _status("RssFile") or 0


def _status(field: str) -> int | None:
    """Return a field of this process's /proc/…/status in bytes, None where there is none."""
    status = Path(f"/proc/{os.getpid()}/status")
    text = status.read_text(encoding="ascii", errors="replace") if status.exists() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
