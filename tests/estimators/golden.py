"""Golden cases: workloads with what the real libraries took of memory, one JSON object a line.

Source of the `truth` of every line: null device (compute capability 8.0), torch 2.14.1, transformers 5.23.0,
peft 0.21.2, bitsandbytes 0.50.2, cuBLAS workspaces cleared before each line (or each line in a process of its own).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from whichlora_estimators.allocator import CachingAllocator
from whichlora_estimators.tape import Tape
from whichlora_estimators.timeline import Timeline, build_model, lay
from whichlora_estimators.workload import Workload, workload_from_json

AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq-cls": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def golden_lines(path: Path) -> list[dict[str, Any]]:
    """Read the cases of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_golden(
    path: Path,
    tolerance: float,
    *,
    requested_tolerance: float | None = None,
    reserved_tolerance: float | None = None,
) -> None:
    """Hold every case of a file to its allocated peak, within `tolerance` of it, and to its trainable parameters.

    `requested_tolerance` is for the peak of what tensors ask for, whatever the allocator leaves unsplit;
    `reserved_tolerance` for the peak of what it holds.
    """
    misses = []
    for line in golden_lines(path):
        timeline, truth = lay(workload_from_json(line)), line["truth"]
        state = timeline.replay(CachingAllocator())
        errors = {"allocated": (state.allocated_peak_bytes / truth["allocated_peak_bytes"] - 1, tolerance)}
        if reserved_tolerance is not None:
            error = state.reserved_peak_bytes / truth["reserved_peak_bytes"] - 1
            errors["reserved"] = error, reserved_tolerance
        if requested_tolerance is not None and "requested_peak_bytes" in truth:
            error = requested_peak_bytes(timeline) / truth["requested_peak_bytes"] - 1
            errors["requested"] = error, requested_tolerance
        misses += [
            f"{line['id']}: {name} peak off by {e:+.3%}" for name, (e, limit) in errors.items() if abs(e) > limit
        ]
        if "trainable_params" in truth and timeline.trainable_params != truth["trainable_params"]:
            misses.append(f"{line['id']}: {timeline.trainable_params} trainable, not {truth['trainable_params']}")
    assert not misses, "\n".join(misses)


def allocated_peak_bytes(timeline: Timeline) -> int:
    """Replay a timeline on the allocator, whose blocks may be larger than what was asked for, from the setup on."""
    return timeline.replay(CachingAllocator()).allocated_peak_bytes


def requested_peak_bytes(timeline: Timeline) -> int:
    """Sum what tensors ask for, over time, without the allocator's rounding."""
    sizes = timeline.tape.sizes
    return max(accumulate(sizes[event] if event >= 0 else -sizes[~event] for event in timeline.events()))


def check_parameters(path: Path, *, sides: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple) -> None:
    """Hold the weights of every config of a file to the shapes that Transformers gives them, as `sides` orders them."""
    import torch
    import transformers

    configs = {
        (line["task"], json.dumps(line["config"], sort_keys=True)): line["config"] for line in golden_lines(path)
    }
    for (task, _), config in configs.items():
        fields = dict(config)
        real_config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        real_config._attn_implementation = "eager"
        with torch.device("meta"):
            real = getattr(transformers, AUTO[task]).from_config(real_config)
        model = build_model(Workload(model="golden", config=config, task=task), Tape(), config)
        ours = {id(parameter.tensor): sides(parameter.tensor.shape) for parameter in model.build.parameters}
        assert Counter(ours.values()) == Counter(sides(tuple(parameter.shape)) for parameter in real.parameters())
