"""BLOOM against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_bloom.jsonl")


def test_golden_cases() -> None:
    """Requested peaks are within 0.05% of what the null device measured, allocated ones within unsplit blocks of it."""
    check_golden(CASES, tolerance=0.025, requested_tolerance=0.0005)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def test_attention_choice_changes_nothing() -> None:
    """BLOOM has one attention, so sdpa, the default, is laid out as eager is."""
    config = {"model_type": "bloom", "hidden_size": 256, "n_layer": 2, "vocab_size": 1000}
    sdpa, eager = (lay(Workload(model="bloom", config=config, attention=kind)) for kind in ("sdpa", "eager"))
    assert sdpa.tape.sizes == eager.tape.sizes
    assert sdpa.events() == eager.events()
