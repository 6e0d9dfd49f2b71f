"""Qwen 2 with experts against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..golden import check_golden, check_parameters

CASES = Path(__file__).with_name("golden_qwen2_moe.jsonl")


def test_golden_cases() -> None:
    """Allocated peaks are within 0.1% of what the null device measured, reserved ones within 2%."""
    check_golden(CASES, tolerance=0.001, reserved_tolerance=0.02)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)
