"""Timelines of which a few layers are laid and copied are those of which all are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest

from whichlora_estimators.allocator import CachingAllocator
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.families import all_families
from whichlora_estimators.methods import all_methods
from whichlora_estimators.models import load_model
from whichlora_estimators.quantization import QUANTIZATIONS
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload

from .small import smallest

#: Settings that lay something else in layers, around them, or in the backward pass.
SETUPS: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"checkpointing": True, "reentrant": True, "accumulation": 2, "optimizer": "adafactor"},
    {"precision": "bf16-mixed", "attention": "eager", "dropout": 0.1, "padded": True, "clip_grad_norm": 1.0},
    {"accumulation": 3, "bias": "all", "optimizer": "adamw-8bit", "output_kept": False},
    {"phase": "generate", "prefill_len": 40, "decode_len": 20},
    {"phase": "generate", "prefill_len": 40, "decode_len": 3, "cache": "static", "attention": "eager"},
)


def deep(family: str, **setup: Any) -> Workload | None:
    """Return a model of three periods of layers and a few more."""
    recipe, shape = all_families()[family], smallest(family)
    if shape is None:
        return None
    key = recipe.layers_key
    names = {key, "num_layers", *(alias for alias, meant in recipe.aliases.items() if meant == key)} & {*shape.config}
    period = recipe.period(recipe.read(shape.config))
    config = {**shape.config, **dict.fromkeys(names | {key}, 4 * period + 3)}
    return Workload(model=shape.name, config=config, task=recipe.tasks[0], seq_len=48, rank=4, **setup)


def told(timeline: Timeline) -> Iterator[object]:
    """Tell all that a timeline is: releases in a row in any order, since it means nothing."""
    tape = timeline.tape
    for segment in (timeline.setup, *timeline.order):
        yield segment
        for frees, run in groupby(tape.events[segment.first.event : segment.last.event], (0).__gt__):
            events = list(run)
            yield from sorted(events) if frees else events
    yield from (tape.sizes, tape.tags, tape.kernels, tape.marks, tape.once, tape.emptied)


def check(workload: Workload) -> bool:
    """Compare both ways of laying; say whether layers were left out."""
    try:
        whole = lay(workload, whole=True)
    except WhichloraError:
        return False
    found = lay(workload)
    assert list(told(found)) == list(told(whole))
    return bool(found.tape.left_out)


@pytest.mark.parametrize("family", sorted(all_families()))
def test_copied_layers_are_as_if_laid(family: str) -> None:
    """Of every architecture under every setup: the same events, sizes, launches and marks in the same places."""
    workloads = [deep(family, **setup) for setup in SETUPS]
    copied = [check(workload) for workload in workloads if workload is not None]
    assert any(copied) or not copied


@pytest.mark.parametrize("quantization", sorted(QUANTIZATIONS))
@pytest.mark.parametrize("method", sorted(all_methods()))
def test_adapters_of_copied_layers_are_as_if_laid(method: str, quantization: str) -> None:
    """Of every method on every quantization, checkpointed or not; some tell layers apart, and all are laid."""
    for family in ("llama", "opt"):
        for checkpointing in (False, True):
            workload = deep(family, method=method, quantization=quantization, checkpointing=checkpointing)
            assert workload is not None
            check(workload)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "ia3", "vera", "prompt-tuning"])
def test_few_layers_are_laid(method: str, quantization: str) -> None:
    """Of a stack of equal layers four are enough, whatever the method; prefixes and penalties need them all."""
    workload = deep("llama", method=method, quantization=quantization)
    assert workload is not None
    assert check(workload)


class CountingAllocator(CachingAllocator):
    """Counts the events that it replays."""

    replayed = 0

    def run(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Count, then replay."""
        self.replayed += len(events)
        super().run(sizes_bytes, events)


def test_work_does_not_grow_with_what_repeats() -> None:
    """Of 32 layers four are laid, and of a third step that finds large blocks as the second did, small ones are replayed."""
    shape = load_model("meta-llama/Llama-3.1-8B", offline=True)
    timeline = lay(Workload(model=shape.name, config=shape.config, quantization="nf4"))
    assert timeline.tape.left_out == {"": 28}
    allocator = CountingAllocator()
    timeline.replay(allocator)
    assert allocator.replayed < 0.85 * len(timeline.events())


@pytest.mark.parametrize(
    "setup",
    [
        {"targets": r".*\.layers\.(2|4|6)\..*_proj"},
        {"targets": ("layers.3.self_attn.q_proj", "v_proj")},
        {"rank_pattern": {r"layers\.3\.self_attn\.q_proj": 16}},
    ],
)
def test_layers_that_differ_are_all_laid(setup: dict[str, Any]) -> None:
    """Adapters in some layers only, or of other ranks there, tell them apart."""
    workload = deep("llama", **setup)
    assert workload is not None
    assert not check(workload)
