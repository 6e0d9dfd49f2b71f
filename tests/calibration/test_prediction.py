"""Intervals and verdicts."""

from __future__ import annotations

import pytest

from whichlora_calibration import Verdict, judge, predict
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload

MODEL = load_model("facebook/opt-125m", offline=True)
L4 = find_gpu("l4")


@pytest.mark.parametrize(
    ("least", "most", "verdict"),
    [(5, 9, "fits"), (5, 10, "fits"), (5, 11, "tight"), (10, 11, "tight"), (11, 12, "does-not-fit")],
)
def test_a_verdict_is_where_the_range_lies(least: int, most: int, verdict: str) -> None:
    """Below the limit, across it, above it."""
    assert judge(least, most, 10) is Verdict(verdict)


@pytest.mark.parametrize("phase", ["train", "generate"])
def test_intervals_hold_the_prediction_they_come_from(phase: str) -> None:
    """An interval is a range in order; process bytes are reserved bytes and the context."""
    prediction = predict(Workload(model=MODEL.name, config=MODEL.config, phase=phase), L4)
    found = prediction.estimate
    assert prediction.allocated.low_bytes <= prediction.allocated.high_bytes
    assert prediction.process.low_bytes <= prediction.process.high_bytes
    assert found.process_bytes == found.reserved_peak_bytes + found.context_bytes
    assert 0.5 < prediction.process.coverage < 1
    assert prediction.evidence == "formula"


def test_a_larger_batch_never_turns_a_verdict_for_the_better() -> None:
    """fits, then tight, then does-not-fit."""
    order = list(Verdict)
    seen = [
        order.index(predict(Workload(model=MODEL.name, config=MODEL.config, batch_size=batch), L4).verdict)
        for batch in (1, 8, 16, 32, 64)
    ]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == len(order) - 1
