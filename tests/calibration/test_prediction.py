"""Intervals and verdicts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.unseen_times import unseen
from whichlora_calibration import Verdict, judge, predict
from whichlora_calibration.cases import MEMORY, PHASES, TIMES, measured
from whichlora_calibration.correction import (
    KNOWN_CARD,
    NEW_CARD,
    Correction,
    Mode,
    TargetCorrection,
    shipped_correction,
)
from whichlora_calibration.forecasts import Forecasts, forecast_of, unseen_times
from whichlora_calibration.formula_ranges import own_bounds
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import published

MODEL = load_model("facebook/opt-125m", offline=True)
L4 = find_gpu("l4")
#: A formula that moved by less than this is the one that was corrected.
TOLERANCE = 0.005
REMEDY = "run python -m benchmarks.make_correction"


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


@pytest.mark.parametrize("phase", ["train", "generate"])
def test_the_formulas_own_interval_is_the_one_that_errors_are_counted_in(phase: str) -> None:
    """What calibration takes for the formula's interval of a run is what the formula alone gives out for it."""
    prediction = predict(Workload(model=MODEL.name, config=MODEL.config, phase=phase), L4, correction=None)
    predicted = forecast_of(prediction.estimate).predicted
    for target in MEMORY:
        low, high = own_bounds(target, phase, predicted)
        shown = getattr(prediction, target)
        assert shown.low_bytes == pytest.approx(predicted[target] * math.exp(low), abs=2)
        assert shown.high_bytes == pytest.approx(predicted[target] * math.exp(high), abs=2)
    for target, span in prediction.times.items():
        low, high = own_bounds(target, phase, predicted)
        assert (span.low_s, span.high_s) == pytest.approx(
            (span.expected_s * math.exp(low), span.expected_s * math.exp(high))
        )


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


def corrected(target: str, **changes: Any) -> Correction:
    """Make a correction by hand: on an l4, `target` takes `factor` times as much, 0.9 to 1.2 of that."""
    factor = math.log(changes.pop("factor", 1.25))
    known = {"applied": True, "low": 0.9, "high": 1.2, **changes}
    modes = {KNOWN_CARD: Mode(**known), NEW_CARD: Mode(applied=False, low=0.5, high=2.0)}
    part = TargetCorrection(
        intercept=factor,
        coefficients={},
        cards={"l4": 0.0},
        stacks={},
        modes=dict.fromkeys(PHASES[target], modes),
        scores={},
    )
    made = shipped_correction()
    return replace(made, targets={target: part}, coverage=0.8)


SMALL = Workload(model=MODEL.name, config=MODEL.config)


def test_a_correction_multiplies_and_bounds() -> None:
    """On a known card the formula's number times the ratio, within the bounds; on others the formula's within its own."""
    plain = predict(SMALL, L4, correction=None)
    found = predict(SMALL, L4, correction=corrected("process"))
    expected = plain.process.expected_bytes * 1.25
    assert found.process.expected_bytes == pytest.approx(expected)
    assert found.process.low_bytes == pytest.approx(expected * 0.9)
    assert found.process.high_bytes == pytest.approx(expected * 1.2)
    assert found.process.coverage == 0.8
    assert (found.evidence, plain.evidence) == ("corrected", "formula")
    assert found.allocated == plain.allocated
    other = find_gpu("t4")
    elsewhere, formula = (predict(SMALL, other, correction=each) for each in (corrected("process"), None))
    assert elsewhere.evidence == "formula"
    assert elsewhere.process.expected_bytes == formula.process.expected_bytes
    assert elsewhere.process.high_bytes == pytest.approx(2 * formula.process.expected_bytes)


def test_times_are_corrected_as_bytes_are() -> None:
    """The step's time is multiplied and bounded, with evidence of its own."""
    plain = predict(SMALL, L4, correction=None).times["step"]
    found = predict(SMALL, L4, correction=corrected("step"))
    assert found.times["step"].expected_s == pytest.approx(1.25 * plain.expected_s)
    assert found.times["step"].high_s == pytest.approx(1.5 * plain.expected_s)
    assert (found.times["step"].evidence, found.evidence) == ("corrected", "formula")


def test_the_verdict_follows_the_interval() -> None:
    """What fits by the formula is tight where measurements show that it takes more."""
    work = SMALL
    while predict(work, L4, correction=None).verdict is Verdict.FITS:
        most, work = work, work.with_(batch_size=work.batch_size * 2)
    used = predict(most, L4, correction=None).process.expected_bytes
    factor = L4.total_bytes / used
    assert factor < 2
    assert predict(most, L4, correction=corrected("process", factor=factor)).verdict is Verdict.TIGHT


def test_few_groups_join_the_formulas_interval() -> None:
    """A joined interval holds both the formula's own and the learnt one."""
    plain = predict(SMALL, L4, correction=None).process
    for low, high in ((0.9, 1.2), (1.0, 1.0)):
        found = predict(SMALL, L4, correction=corrected("process", factor=1, low=low, high=high, joined=True)).process
        assert found.low_bytes == min(plain.low_bytes, int(plain.expected_bytes * low))
        assert found.high_bytes == max(plain.high_bytes, int(plain.expected_bytes * high))


def test_no_ratio_exceeds_a_factor_of_two() -> None:
    """A correction is cut where it was learnt to be cut."""
    part = corrected("process", factor=50).targets["process"]
    assert part.ratio({}, "train", "l4") == pytest.approx(2)


def test_the_shipped_correction_belongs_to_this_formula() -> None:
    """What the formula says today of measurements is what it said when the correction was learnt from them."""
    samples = shipped_correction().samples
    known = {measurement.id: measurement for measurement in published()}
    forecasts = Forecasts()
    for name, predicted in list(samples.items())[::2]:
        id_, target = name.split()
        assert id_ in known, REMEDY
        workload, environment = known[id_].workload, known[id_].environment
        now = forecasts.of(workload, environment.gpu or "", environment.versions).predicted[target]
        assert now == pytest.approx(predicted, rel=TOLERANCE), REMEDY
    assert len(samples) >= 12


def test_published_times_have_forecasts_that_have_not_seen_them() -> None:
    """Every published time has one, and each is what the formula says with the constants fitted without its chip."""
    timed = [one for one in published() if one.outcome == "ok" and any(measured(one, name) for name in TIMES)]
    assert {one.id for one in timed} == set(unseen_times()), REMEDY
    for one in timed[::40]:
        known, now = unseen_times()[one.id], unseen(one)
        assert known.keys() == now.keys()
        assert all(now[name] == pytest.approx(known[name], rel=TOLERANCE) for name in known), REMEDY
