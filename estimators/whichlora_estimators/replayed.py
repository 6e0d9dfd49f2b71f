"""A timeline on an allocator as PyTorch sets it by default: by compiled code where installing could compile it.

`replay.c` is built with the package (hatch_build.py). Without a compiler there, or for any other setting, allocator.py answers:
the same counters, in more time.
"""

from __future__ import annotations

from array import array
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .allocator import AllocatorConfig, AllocatorState, CachingAllocator

if TYPE_CHECKING:
    import ctypes

    from .timeline import Timeline

LIBRARY = Path(__file__).parent / "_replay.so"
_COUNTERS = (
    "allocated_bytes",
    "allocated_peak_bytes",
    "reserved_bytes",
    "reserved_peak_bytes",
    "inactive_split_bytes",
    "requested_bytes",
    "segment_count",
    "device_malloc_count",
    "device_free_count",
)
_NOTHING, _EMPTY_CACHE, _RESET_PEAKS = range(3)
_OUT_OF_HOST_MEMORY = 1


def replay(timeline: Timeline, config: AllocatorConfig | None = None) -> AllocatorState:
    """Return the counters of an allocator without a limit that all of a timeline has happened on.

    Peaks are from the end of the setup on.
    """
    if (config is None or config == AllocatorConfig()) and _library() is not None:
        return replay_compiled(timeline)
    return timeline.replay(CachingAllocator(config))


def replay_compiled(timeline: Timeline) -> AllocatorState:
    """Do `replay` with default settings by compiled code. Raises MemoryError."""
    tape, setup = timeline.tape, timeline.setup.last.event
    cuts = [0, *tape.emptied, setup]
    stretches = [(_EMPTY_CACHE if first else _NOTHING, first, last) for first, last in pairwise(cuts)]
    stretches.append((_RESET_PEAKS, setup, setup))
    stretches += [(_NOTHING, segment.first.event, segment.last.event) for segment in timeline.order]
    return replay_stretches(tape.sizes, tape.events, stretches)


def replay_stretches(
    sizes_bytes: list[int], events: list[int], stretches: list[tuple[int, int, int]]
) -> AllocatorState:
    """Replay stretches of events: what to do before (replay.c names it), the first event, and that behind the last."""
    library = _library()
    assert library is not None
    flat = array("q", [number for stretch in stretches for number in stretch])
    counters = array("q", [0] * len(_COUNTERS))
    given = [array("q", sizes_bytes), array("q", events)]
    sizes, happened, cut, found = (numbers.buffer_info()[0] for numbers in (*given, flat, counters))
    status = library.replay(sizes, len(sizes_bytes), happened, cut, len(stretches), found)
    if status:
        raise MemoryError if status == _OUT_OF_HOST_MEMORY else AssertionError("a tensor is freed that is not live")
    known = dict(zip(_COUNTERS, counters, strict=True))
    return AllocatorState(**known, active_bytes=known["allocated_bytes"], retry_count=0, oom_count=0)


@cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled code, or None where there is none for this machine."""
    if not LIBRARY.exists():
        return None
    import ctypes

    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # compiled for another machine
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    library.replay.argtypes = [address, number, address, address, number, address]
    return library
