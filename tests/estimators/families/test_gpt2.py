"""GPT-2 against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.errors import Unsupported
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_gpt2.jsonl")


def test_golden_cases() -> None:
    """Requested peaks are within 0.05% of what the null device measured, allocated ones within unsplit blocks of it."""
    check_golden(CASES, tolerance=0.025, requested_tolerance=0.0005)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the sides that Transformers gives it; those of Conv1D are stored the other way round."""
    check_parameters(CASES, sides=lambda shape: tuple(sorted(shape)))


def test_cross_attention_is_refused() -> None:
    """A decoder that attends to an encoder is refused, not taken for a plain one."""
    workload = Workload(model="refused", config={"model_type": "gpt2", "n_layer": 1, "add_cross_attention": True})
    with pytest.raises(Unsupported, match="add_cross_attention"):
        lay(workload)
