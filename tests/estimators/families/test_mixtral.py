"""Mixtral against the real libraries, and what PEFT refuses of stacked experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.errors import BadValue, Unsupported
from whichlora_estimators.models import load_model
from whichlora_estimators.timeline import count_active_parameters, lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters, golden_lines

CASES = Path(__file__).with_name("golden_mixtral.jsonl")
CONFIG = golden_lines(CASES)[0]["config"]


def test_golden_cases() -> None:
    """Allocated peaks are within 0.1% of what the null device measured, reserved ones within 2%."""
    check_golden(CASES, tolerance=0.001, reserved_tolerance=0.02)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def _lora(**changes: object) -> Workload:
    return Workload(model="small", config=CONFIG, **changes)  # type: ignore[arg-type]


def test_dora_and_dropout_of_stacked_experts_are_refused() -> None:
    """PEFT adapts stacked experts by plain LoRA alone; attention on its own takes DoRA and dropout."""
    for changes in ({"method": "dora"}, {"dropout": 0.1}):
        with pytest.raises(Unsupported):
            lay(_lora(**changes))
        lay(_lora(targets=("q_proj", "v_proj"), **changes))


def test_half_of_a_joined_weight_is_refused() -> None:
    """w1 and w3 are one weight since transformers 5: naming one of them names nothing that PEFT could adapt."""
    with pytest.raises(BadValue, match="w1, w3"):
        lay(_lora(targets=("q_proj", "w1")))


def test_the_old_names_of_experts_mean_their_stacks() -> None:
    """Attention, router and the experts' old names together train what "all-linear" does."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3")
    assert lay(_lora(targets=names)).trainable_params == lay(_lora(targets="all-linear")).trainable_params


@pytest.mark.parametrize(
    ("name", "layers", "idle", "inner", "width"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 32, 6, 14336, 4096),
        ("Qwen/Qwen1.5-MoE-A2.7B", 24, 56, 1408, 2048),
        ("Qwen/Qwen2-57B-A14B", 28, 56, 2560, 3584),
        ("Qwen/Qwen3-30B-A3B", 48, 120, 768, 2048),
    ],
)
def test_idle_experts_are_not_active(name: str, layers: int, idle: int, inner: int, width: int) -> None:
    """A token meets all weights but the three matrices of every expert that it is not sent to."""
    shape = load_model(name, offline=True)
    assert shape.parameters is not None
    assert count_active_parameters(shape.config) == shape.parameters - layers * idle * 3 * inner * width


def test_a_model_without_experts_is_active_as_a_whole() -> None:
    """Without experts every parameter is active."""
    shape = load_model("Qwen/Qwen3-0.6B", offline=True)
    assert count_active_parameters(shape.config) == shape.parameters
