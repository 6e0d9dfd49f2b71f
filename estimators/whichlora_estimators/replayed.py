"""A timeline on an allocator as PyTorch sets it by default: by compiled code where installing could compile it.

`replay.c` is built with the package (hatch_build.py). Without a compiler there, or for any other setting, allocator.py answers:
the same counters, in more time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .allocator import BLOCK_BYTES, AllocatorConfig, AllocatorState, CachingAllocator

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When most bytes are live: after which event, counted as they happen from 0, and which storages are."""

    event: int
    live: Sequence[int]


def replay(timeline: Timeline, config: AllocatorConfig | None = None) -> tuple[AllocatorState, Moment]:
    """Return the counters of an allocator without a limit that all of a timeline has happened on, and its highest moment.

    Peaks are from the end of the setup on.
    """
    if (config is None or config == AllocatorConfig()) and _library() is not None:
        return replay_compiled(timeline)
    return timeline.replay(CachingAllocator(config)), highest(timeline)


def highest(timeline: Timeline) -> Moment:
    """Walk a timeline for the highest sum of live bytes after its setup.

    What building the model takes on the way is no part of it: loading a checkpoint takes another way.
    """
    sizes, events = rounded_sizes(timeline), timeline.distinct_events()
    signed = sizes + [-size for size in reversed(sizes)]  # where a free, ~i, finds what i had
    bytes_live = list(accumulate(map(signed.__getitem__, events)))
    start = next(place for place in range(timeline.setup.last.event, len(events)) if events[place] >= 0)
    at = bytes_live.index(max(bytes_live[start:]), start)
    live: set[int] = set()
    for event in events[: at + 1]:
        if event >= 0:
            live.add(event)
        else:
            live.remove(~event)
    return Moment(event=at, live=sorted(live))


def rounded_sizes(timeline: Timeline) -> list[int]:
    """Return the bytes that each storage takes in the allocator's books."""
    return [-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in timeline.tape.sizes]


def replay_compiled(timeline: Timeline) -> tuple[AllocatorState, Moment]:
    """Do `replay` with default settings by compiled code. Raises MemoryError."""
    tape, setup = timeline.tape, timeline.setup.last.event
    cuts = [0, *tape.emptied, setup]
    stretches = [(_EMPTY_CACHE if first else _NOTHING, first, last) for first, last in pairwise(cuts)]
    stretches.append((_RESET_PEAKS, setup, setup))
    stretches += [(_NOTHING, segment.first.event, segment.last.event) for segment in timeline.order]
    return replay_stretches(tape.sizes, tape.events, stretches)


def replay_stretches(
    sizes_bytes: list[int], events: list[int], stretches: list[tuple[int, int, int]]
) -> tuple[AllocatorState, Moment]:
    """Replay stretches of events: what to do before (replay.c names it), the first event, and that behind the last."""
    library = _library()
    assert library is not None
    count = len(sizes_bytes)
    flat = [number for stretch in stretches for number in stretch]
    given = [array("q", sizes_bytes), array("q", events), array("q", flat), array("q", [0] * (len(_COUNTERS) + 1))]
    flags = array("b", bytes(count))
    sizes, happened, cut, found = (numbers.buffer_info()[0] for numbers in given)
    status = library.replay(sizes, count, happened, cut, len(stretches), found, flags.buffer_info()[0])
    if status:
        raise MemoryError if status == _OUT_OF_HOST_MEMORY else AssertionError("a tensor is freed that is not live")
    *counters, event = given[-1]
    known = dict(zip(_COUNTERS, counters, strict=True))
    state = AllocatorState(**known, active_bytes=known["allocated_bytes"], retry_count=0, oom_count=0)
    return state, Moment(event=event, live=list(compress(range(count), flags)))


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
    library.replay.argtypes = [address, number, address, address, number, address, address]
    return library
