"""T5 and mT5 against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_t5.jsonl")


def test_golden_cases() -> None:
    """Requested peaks are within 0.05% of what the null device measured, allocated ones within unsplit blocks of it."""
    check_golden(CASES, tolerance=0.025, requested_tolerance=0.0005)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def test_target_length_decides_the_logits() -> None:
    """Logits are as many as target tokens, whatever the source's length."""
    config = {"model_type": "t5", "num_layers": 1, "vocab_size": 5000}
    workload = Workload(model="t5", config=config, task="seq2seq", batch_size=2, seq_len=64, target_len=48)
    for source, target in ((64, 48), (128, 48), (64, 96)):
        sizes = lay(workload.with_(seq_len=source, target_len=target)).tape.sizes
        assert 2 * target * 5000 * 2 in sizes
