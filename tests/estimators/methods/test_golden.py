"""Every method against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.methods import all_methods

from ..golden import check_golden, golden_lines

FILES = sorted(Path(__file__).parent.glob("golden_*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_cases(path: Path) -> None:
    """Allocated peaks are within 0.05%, reserved ones, whose segments are coarse in small models, within 3%."""
    check_golden(path, tolerance=0.0005, reserved_tolerance=0.03)


def test_every_method_has_golden_cases() -> None:
    """A method without evidence is a mistake."""
    covered = {line["method"] for path in FILES for line in golden_lines(path)}
    assert covered == set(all_methods()) - {"full"}  # with its cases among the families
