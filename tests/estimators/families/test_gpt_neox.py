"""GPT-NeoX against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.errors import Unsupported
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_gpt_neox.jsonl")


def test_golden_cases() -> None:
    """Requested peaks are within 0.05% of what the null device measured, allocated ones within unsplit blocks of it."""
    check_golden(CASES, tolerance=0.025, requested_tolerance=0.0005)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def test_unknown_activation_is_refused() -> None:
    """An activation without a formula is refused, not taken for another one."""
    workload = Workload(
        model="refused", config={"model_type": "gpt_neox", "num_hidden_layers": 1, "hidden_act": "xielu"}
    )
    with pytest.raises(Unsupported, match="activation"):
        lay(workload)
