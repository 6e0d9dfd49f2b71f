"""The compiled replay beside the allocator in Python."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whichlora.api import make_workload
from whichlora_estimators import replayed
from whichlora_estimators.allocator import AllocatorConfig, CachingAllocator
from whichlora_estimators.models import load_model
from whichlora_estimators.timeline import lay

from .real_allocator import Trace
from .test_allocator import run_events, traces

compiled = pytest.mark.skipif(not replayed.LIBRARY.exists(), reason="replay.c was not compiled on installing")
BEFORE: dict[int, Callable[[CachingAllocator], None]] = {
    0: lambda allocator: None,
    1: CachingAllocator.empty_cache,
    2: CachingAllocator.reset_peaks,
}


@compiled
@given(traces, st.lists(st.tuples(st.sampled_from(sorted(BEFORE)), st.floats(0, 1)), max_size=5))
def test_compiled_code_counts_as_the_model_does(trace: Trace, cuts: list[tuple[int, float]]) -> None:
    """Every counter is the allocator's, whatever happens, with caches emptied and peaks reset in between."""
    sizes, events = run_events(trace)
    places = sorted((int(part * len(events)), action) for action, part in cuts)
    edges = [(0, 0), *places, (len(events), 0)]
    stretches = [(action, first, last) for (first, action), (last, _) in pairwise(edges)]
    allocator = CachingAllocator()
    for action, first, last in stretches:
        BEFORE[action](allocator)
        allocator.run(sizes, events[first:last])
    assert replayed.replay_stretches(sizes, events, stretches)[0] == allocator.state()


@compiled
@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"method": "qlora"}, {"method": "full"}, {"phase": "generate"}]
)
def test_timelines_replay_alike(options: dict[str, Any]) -> None:
    """Compiled code finds the counters and the highest moment that Python does, which other settings still get."""
    timeline = lay(make_workload(load_model("HuggingFaceTB/SmolLM2-135M", offline=True), **options))
    in_python = timeline.replay(CachingAllocator()), replayed.highest(timeline)
    assert replayed.replay(timeline) == replayed.replay_compiled(timeline) == in_python
    expandable = AllocatorConfig(expandable_segments=True)
    assert replayed.replay(timeline, expandable) == (timeline.replay(CachingAllocator(expandable)), in_python[1])
