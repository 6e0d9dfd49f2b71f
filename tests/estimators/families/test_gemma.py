"""Gemma 1 to 3 against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.errors import Unsupported
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from ..golden import check_golden, check_parameters

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 64, "vocab_size": 1000}
CASES = Path(__file__).with_name("golden_gemma.jsonl")


def test_golden_cases() -> None:
    """Allocated peaks of small models are within 0.6% of what the null device measured."""
    check_golden(CASES, tolerance=0.006)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def test_gemma2_is_eager_whatever_is_asked() -> None:
    """Transformers has no SDPA for Gemma 2: asking for it changes nothing."""
    config = {"model_type": "gemma2", **SMALL}
    asked = [Workload(model="gemma2", config=config, attention=kind, seq_len=64) for kind in ("sdpa", "eager")]
    sdpa, eager = (lay(workload).tape for workload in asked)
    assert (sdpa.sizes, sdpa.events) == (eager.sizes, eager.events)


@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])
def test_bidirectional_attention_is_refused(family: str) -> None:
    """A model that sees the future is another one than is predicted."""
    config = {"model_type": family, **SMALL, "use_bidirectional_attention": True}
    with pytest.raises(Unsupported):
        lay(Workload(model=family, config=config, seq_len=64))
