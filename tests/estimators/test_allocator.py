"""The model of PyTorch's caching allocator: laws it keeps by itself, and the real allocator beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whichlora_estimators.allocator import AllocatorConfig, AllocatorState, CachingAllocator, OutOfMemory, replay
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_estimators.units import MIB

from .real_allocator import (
    FREE,
    MALLOC,
    RealAllocator,
    Trace,
    random_trace,
    real_allocator,
    run_model,
)

traces = st.randoms(use_true_random=False).map(random_trace)


def run_events(trace: Trace) -> tuple[list[int], list[int]]:
    """Return the mallocs and frees of a trace as `replay` takes them."""
    sizes = [event[1] for event in trace.events if event[0] == MALLOC]
    numbers = iter(range(len(sizes)))
    return sizes, [
        next(numbers) if kind == MALLOC else ~arguments[0]
        for kind, *arguments in trace.events
        if kind in {MALLOC, FREE}
    ]


def step_by_step(sizes: list[int], events: list[int], config: AllocatorConfig, limit: int | None) -> AllocatorState:
    """Do with malloc and free what `replay` does in one go."""
    allocator = CachingAllocator(config, limit_bytes=limit)
    handles: dict[int, Any] = {}
    for event in events:
        if event < 0:
            allocator.free(handles[~event])
        else:
            handles[event] = allocator.malloc(sizes[event])
    return allocator.state()


@given(traces, st.booleans())
def test_replay_is_malloc_and_free_in_one_go(trace: Trace, limited: bool) -> None:
    """`replay` gives the state, or raises the OutOfMemory, that the same mallocs and frees give one by one."""
    config = AllocatorConfig(**{**trace.settings, "per_process_memory_fraction": 1.0})
    sizes, events = run_events(trace)
    limit = trace.limit_bytes if limited else None
    outcomes: list[Any] = []
    for run in (step_by_step, lambda *a: replay(a[0], a[1], config=a[2], limit_bytes=a[3])):
        try:
            outcomes.append(run(sizes, events, config, limit))
        except OutOfMemory as error:
            outcomes.append((error.held, error.requested_bytes, error.segment_bytes, error.free_bytes))
    assert outcomes[0] == outcomes[1]


@given(traces, st.booleans())
def test_a_step_that_repeats_is_replayed_as_often(trace: Trace, limited: bool) -> None:
    """What of a second time is not replayed would have changed no counter."""
    config = AllocatorConfig(**trace.settings)
    sizes, events = run_events(trace)
    half = len(events) // 2
    live = {event for event in events[half:] if event >= 0}
    step = [event for event in events[half:] if event >= 0 or ~event in live]
    step += [~event for event in live if ~event not in step]
    outcomes = []
    for twice in (True, False):
        allocator = CachingAllocator(config, limit_bytes=trace.limit_bytes if limited else None)
        with suppress(OutOfMemory):
            allocator.run(sizes, events[:half])
            if twice:
                allocator.run_twice(sizes, step)
            else:
                allocator.run(sizes, step)
                allocator.run(sizes, step)
        outcomes.append(allocator.state())
    assert outcomes[0] == outcomes[1]


@given(traces)
def test_memory_is_requested_within_allocated_within_reserved(trace: Trace) -> None:
    """Requested ≤ allocated ≤ reserved ≤ device, no counter is negative, and no peak below its present value."""
    for counters in run_model(trace):
        state = AllocatorState(**dict(zip(AllocatorState.__slots__, counters, strict=True)))
        assert min(counters) >= 0
        assert state.requested_bytes <= state.allocated_bytes <= state.reserved_bytes <= trace.limit_bytes
        assert state.inactive_split_bytes <= state.reserved_bytes - state.allocated_bytes
        assert state.allocated_bytes <= state.allocated_peak_bytes
        assert state.reserved_bytes <= state.reserved_peak_bytes


@given(traces)
def test_everything_comes_back(trace: Trace) -> None:
    """With every tensor freed and the cache emptied nothing is held, whatever happened before."""
    allocator = CachingAllocator(AllocatorConfig(**trace.settings), limit_bytes=trace.limit_bytes)
    handles = []
    with suppress(OutOfMemory):
        for event in trace.events:
            if event[0] == MALLOC:
                handles.append(allocator.malloc(*event[1:]))
    for handle in handles:
        allocator.free(handle)
    allocator.empty_cache()
    state = allocator.state()
    assert state.reserved_bytes == state.allocated_bytes == state.requested_bytes == state.segment_count == 0


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),
    ],
)
def test_first_tensor(size: int, allocated: int, reserved: int) -> None:
    """Segments are 2 MiB, 20 MiB or whole pages, and a remainder is split off above 1 MiB (constants of torch 2.14)."""
    state = replay([size], [0])
    assert (state.allocated_bytes, state.reserved_bytes) == (allocated, reserved)


def test_out_of_memory_says_what_was_held() -> None:
    """The error carries the request, its segment, what is free, and the peaks until then."""
    with pytest.raises(OutOfMemory, match=r"30.00 MiB needed .* 19.00 MiB free") as caught:
        replay([40 * MIB, 30 * MIB - 1], [0, 1], limit_bytes=59 * MIB)
    error = caught.value
    assert (error.requested_bytes, error.segment_bytes, error.free_bytes) == (30 * MIB - 1, 30 * MIB, 19 * MIB)
    assert (error.held.allocated_peak_bytes, error.held.oom_count, error.held.retry_count) == (40 * MIB, 1, 1)


def test_bad_events_are_refused() -> None:
    """Freeing what is not live, and fewer bytes than none, are the caller's errors and say so."""
    allocator = CachingAllocator()
    for handle in (allocator.malloc(0), allocator.malloc(MIB)):
        allocator.free(handle)
        with pytest.raises(BadValue, match="not live"):
            allocator.free(handle)
    for sizes, events in (([MIB], [~0]), ([MIB], [0, ~0, ~0]), ([-1], [0])):
        with pytest.raises(BadValue):
            replay(sizes, events)
        with pytest.raises(BadValue):
            replay(sizes, events, config=AllocatorConfig(max_split_size_bytes=64 * MIB))


READABLE: dict[str, dict[str, Any]] = {
    "": {},
    "expandable_segments:True": {"expandable_segments": True},
    " max_split_size_mb : 64 , expandable_segments:False,": {"max_split_size_bytes": 64 * MIB},
    "garbage_collection_threshold:0.6": {"garbage_collection_threshold": 0.6},
    "roundup_power2_divisions:4": {"roundup_power2_divisions": 4},
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]": {"roundup_power2_divisions": (1,) * 9 + (2, 4) + (8,) * 5},
    "roundup_power2_divisions:[64:8,256:4]": {"roundup_power2_divisions": (8,) * 7 + (0, 4) + (0,) * 7},
    "roundup_power2_divisions:[>:2]": {"roundup_power2_divisions": (0,) + (2,) * 15},
    "roundup_power2_divisions:[1024:2,256:4,>:8]": {"roundup_power2_divisions": (2,) * 8 + (4,) + (8,) * 7},
    "roundup_power2_divisions:[]": {"roundup_power2_divisions": (0,) * 16},
    "max_split_size_mb:30,large_segment_size_mb:30": {
        "large_segment_bytes": 30 * MIB,
        "max_split_size_bytes": 30 * MIB,
    },
    "max_non_split_rounding_mb:30,backend:native": {"max_non_split_rounding_bytes": 30 * MIB},
    "per_process_memory_fraction:0.5,pinned_use_background_threads:True": {"per_process_memory_fraction": 0.5},
}
REFUSED = {
    "expandable_segments:true": BadValue,
    "expandable_segments": BadValue,
    "max_split_size_mb:19": BadValue,
    "max_split_size_mb:29,large_segment_size_mb:30": BadValue,
    "max_non_split_rounding_mb:19": BadValue,
    "large_segment_size_mb:10": BadValue,
    "garbage_collection_threshold:0": BadValue,
    "garbage_collection_threshold:1.0": BadValue,
    "roundup_power2_divisions:3": BadValue,
    "roundup_power2_divisions:0": BadValue,
    "roundup_power2_divisions:[64:3]": BadValue,
    "roundup_power2_divisions:[65:2]": BadValue,
    "per_process_memory_fraction:1.5": BadValue,
    "expandable_segment:True": UnknownName,
    "max_split_size:64": UnknownName,
}


@pytest.mark.parametrize("text", READABLE)
def test_settings_are_read(text: str) -> None:
    """The value of PYTORCH_CUDA_ALLOC_CONF becomes the settings that it stands for."""
    assert AllocatorConfig.from_env(text) == AllocatorConfig(**READABLE[text])


@pytest.mark.parametrize("text", REFUSED)
def test_bad_settings_are_refused(text: str) -> None:
    """What torch refuses is refused here, with the key in the message."""
    with pytest.raises(REFUSED[text], match=text.split(":")[0]):
        AllocatorConfig.from_env(text)


@pytest.mark.parametrize("text", ["backend:cudaMallocAsync", "throw_on_cudamalloc_oom:True"])
def test_settings_beyond_the_model_are_unsupported(text: str) -> None:
    """A setting that would change the numbers in a way not modelled is never passed over."""
    with pytest.raises(Unsupported, match="not modelled"):
        AllocatorConfig.from_env(text)


def test_bad_words_have_neighbours() -> None:
    """An unknown key names the ones that look like it."""
    with pytest.raises(UnknownName) as caught:
        AllocatorConfig.from_env("max_split_size:64")
    assert "max_split_size_mb" in caught.value.nearest


@pytest.fixture(scope="module")
def real() -> Iterator[RealAllocator]:
    """Torch's allocator on the null device."""
    with real_allocator() as allocator:
        yield allocator


@pytest.mark.stack
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(trace=traces)
def test_counters_equal_the_real_allocators(real: RealAllocator, trace: Trace) -> None:
    """After every event of any trace, under any settings, every counter equals that of torch's own allocator."""
    assert run_model(trace) == real.run(trace)


@pytest.mark.stack
@pytest.mark.parametrize("text", READABLE)
def test_torch_reads_settings_alike(real: RealAllocator, text: str) -> None:
    """Torch takes the same strings and understands the same sizes."""
    ours, theirs = AllocatorConfig.from_env(text), real.settings(text)
    assert theirs is not None
    assert tuple(theirs["roundup_power2_divisions"].values()) == ours.roundup_table
    assert theirs["max_split_size"] == (ours.max_split_size_bytes or -1)
    assert theirs["garbage_collection_threshold"] == ours.garbage_collection_threshold


@pytest.mark.stack
@pytest.mark.parametrize("text", REFUSED)
def test_torch_refuses_the_same_settings(real: RealAllocator, text: str) -> None:
    """Torch refuses what is refused here."""
    assert real.settings(text) is None
