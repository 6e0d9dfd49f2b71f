"""Shapes and settings that no published model has, against rehearsals: switches of configs, every activation, one layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.layers import ACTIVATIONS, find_activation
from whichlora_estimators.optimizers import OPTIMIZERS
from whichlora_estimators.stack import NO_PREFILL_MASK, Stack
from whichlora_estimators.tape import BF16, FP32, Tape
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from .golden import check_golden, golden_lines

ODD = Path(__file__).with_name("golden_odd.jsonl")


def test_golden_odd_shapes() -> None:
    """What a switch of a config changes is met: allocated peaks within 0.1%, reserved ones within 1%."""
    check_golden(ODD, tolerance=0.001, reserved_tolerance=0.01)


def test_every_activation_was_rehearsed() -> None:
    """An activation beside those of published models has a golden case."""
    seen = {value for line in golden_lines(ODD) for key, value in line["config"].items() if "act" in key}
    assert set(ACTIVATIONS) - seen <= {"gelu", "gelu_pytorch_tanh", "silu", "swish", "tanh"}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_keeps_shape_and_dtype(name: str) -> None:
    """What comes out is like what came in, and backward leaves nothing behind but the input."""
    tape = Tape()
    x = tape.new((4, 100), BF16)
    out = find_activation(name)(x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_roots_of_one_dtype_live_until_those_of_the_next() -> None:
    """AdamW's step takes the roots of two dtypes at a time, and those of the dtype that came first are made last."""
    tape = Tape()
    weights = [tape.new((1000,), BF16), tape.new((500,), FP32)]
    before = len(tape.events)
    OPTIMIZERS["adamw"].step(weights)
    assert [tape.sizes[event] if event >= 0 else -tape.sizes[~event] for event in tape.events[before:]] == [
        2000,
        2000,
        -2000,
        -2000,
    ]


@pytest.mark.parametrize(("version", "masked"), [("5.13.0", True), ("5.14.0", False)])
def test_the_prompt_of_a_static_cache(version: str, masked: bool) -> None:
    """From Transformers 5.14 on no mask is made for the first tokens, and the kernel sees these keys alone."""
    stack = Stack((("transformers", version),))
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    workload = Workload(model="static", config=config, phase="generate", cache="static", prefill_len=50, decode_len=9)
    timeline = lay(workload, stack=stack)
    prefill = timeline.order[0]
    sizes = {timeline.tape.sizes[e] for e in timeline.tape.events[prefill.first.event : prefill.last.event] if e >= 0}
    assert (50 * 59 in sizes) is masked
    assert stack.does(NO_PREFILL_MASK) is not masked
    kernels = timeline.tape.kernels[prefill.first.kernel : prefill.last.kernel]
    assert [kernel.n for kernel in kernels if kernel.fused] == [59 if masked else 50]
