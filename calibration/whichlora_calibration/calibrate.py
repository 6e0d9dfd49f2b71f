"""From measurements to a correction with its held-out scores: fit, hold out, compare, and apply only what is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .cases import MEMORY, TARGETS, TIMES, Case, Left, hash_of
from .correction import KNOWN_CARD, NEW_CARD, Correction, Mode, TargetCorrection
from .fit import (
    GROUPS,
    NOTHING,
    Fitted,
    Table,
    candidates,
    choose,
    fit,
    folds,
    held_out,
    others,
    table_of,
    weighted_quantile,
)
from .forecasts import formula_hash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

COVERAGE = 0.9
#: Cells below which a target is left to the formula.
FEWEST_CELLS = 5
#: Resamplings of whole groups that say how sure a gain is, and the share of them that a correction must win.
RESAMPLES, WINS = 200, 0.8
#: By how much bounds may be widened (or narrowed) until held-out groups are covered; the last one where none suffices.
WIDTHS = tuple(1.05**step for step in range(-14, 33))
#: Groups below which held-out errors tell too little of others: nothing is applied, and the formula's interval is joined.
FEWEST_GROUPS = 5
#: Of the misses of an interval, at most this share may lie above it: what takes more than it should costs most.
ABOVE = 0.5
#: Formula's numbers that are kept with a correction.
SAMPLES = 24
#: Which group is held out for whom: a user's card has been measured, with other models, or has not.
GROUP_OF = {KNOWN_CARD: "model", NEW_CARD: "gpu"}

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A case with what was predicted for it while its whole group was held out, in logarithms of the formula's number."""

    case: Case
    correction: float

    @property
    def formula_error(self) -> float:
        """Return |measured / predicted - 1| of the formula."""
        return abs(math.expm1(self.case.log_ratio))

    @property
    def corrected_error(self) -> float:
        """Return the same of the corrected number."""
        return abs(math.expm1(self.case.log_ratio - self.correction))


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScores:
    """All held-out predictions of a target, by the group that was held out, and what was chosen in the end.

    `plain` bounds the formula's own errors, where enough models were held out.
    """

    target: str
    held: Mapping[str, Sequence[Held]]
    correction: TargetCorrection
    plain: Mode | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A correction, with all that it was learnt from: every held-out prediction, and the measurements left out."""

    correction: Correction
    targets: Mapping[str, TargetScores]
    left: Sequence[Left]


def calibrate(
    cases: Sequence[Case],
    left: Sequence[Left] = (),
    *,
    rows: str | None = None,
    coverage: float = COVERAGE,
    replaces: str | None = None,
    whichlora: str = "",
    report: Report = lambda _: None,
) -> Calibration:
    """Fit a correction of every target that has enough cells, and score it; `replaces` is the version used until now.

    `rows` is the hash of all measurements that the cases stand for.
    """
    scored: dict[str, TargetScores] = {}
    for target in TARGETS:
        own = [case for case in cases if case.target == target]
        if len({case.cell for case in own if not case.out_of_memory}) >= FEWEST_CELLS:
            report(f"fitting {target}: {sum(case.runs for case in own)} runs")
            scored[target] = _score(target, own, coverage, scored.get("allocated"))
    rows = hash_of(case.measurement_id for case in cases) if rows is None else rows
    correction = Correction(
        version=hash_of([rows, formula_hash(), str(coverage)])[:16],
        replaces=replaces,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        whichlora=whichlora,
        formula=formula_hash(),
        rows=rows,
        counts={target: sum(case.runs for case in cases if case.target == target) for target in TARGETS},
        coverage=coverage,
        targets={target: scores.correction for target, scores in scored.items()},
        false_fits=_false_fits(scored.get("process")),
        samples=_samples(cases),
    )
    return Calibration(correction=correction, targets=scored, left=tuple(left))


def _samples(cases: Sequence[Case]) -> dict[str, float]:
    """Return some of the formula's numbers, evenly from all, by measurement and target."""
    ordered = sorted(cases, key=lambda case: (case.measurement_id, case.target))
    some = ordered[:: max(1, math.ceil(len(ordered) / SAMPLES))]
    return {f"{case.measurement_id} {case.target}": case.predicted for case in some}


def _score(target: str, cases: Sequence[Case], coverage: float, allocated: TargetScores | None) -> TargetScores:
    tried, table = candidates(target), table_of(cases)
    held = {
        group: [
            Held(case=case, correction=float(correction))
            for case, correction in zip(cases, held_out(table, group, tried), strict=True)
        ]
        for group in GROUPS
    }
    scores: dict[str, Any] = {group: _summary(group, some) for group, some in held.items()}
    plain = _plain(held["model"], scores["model"], coverage)
    borrowed = allocated.plain if plain is None and allocated is not None and target in MEMORY else plain
    modes = {}
    for name, group in GROUP_OF.items():
        modes[name], scores[group]["coverage"] = _mode(held[group], group, scores[group], coverage, borrowed)
        scores[group]["applied"] = modes[name].applied
    fitted = fit(table, choose(table, tried)) if any(mode.applied for mode in modes.values()) else NOTHING
    correction = TargetCorrection(
        intercept=fitted.intercept,
        coefficients=fitted.coefficients,
        cards=_offsets(cases, fitted),
        stacks=fitted.stacks,
        modes=modes,
        scores=scores,
    )
    return TargetScores(target=target, held=held, correction=correction, plain=plain)


def _plain(held: Sequence[Held], summary: Mapping[str, Any], coverage: float) -> Mode | None:
    """Bound the formula's own errors with models held out; None for too few of them."""
    return None if summary["groups"] < FEWEST_GROUPS else _bounded(held, "model", coverage, applied=False)[0]


def _offsets(cases: Sequence[Case], fitted: Fitted) -> dict[str, float]:
    """Return each measured card's offset, 0 where none was fitted: a card that is listed is a known one."""
    return {gpu: fitted.cards.get(gpu, 0.0) for gpu in sorted({case.gpu for case in cases})}


# --- scores ---


def _summary(group: str, held: Sequence[Held]) -> dict[str, Any]:
    """Return held-out errors of formula and corrected, and the gain in the median with its spread over groups."""
    exact = [each for each in held if not each.case.out_of_memory]
    return {
        "cases": len(exact),
        "cells": len({each.case.cell for each in exact}),
        "groups": len({getattr(each.case, group) for each in exact}),
        "formula": _errors([each.formula_error for each in exact], exact),
        "corrected": _errors([each.corrected_error for each in exact], exact),
        **_gain(group, exact),
    }


def _errors(errors: Sequence[float], held: Sequence[Held]) -> dict[str, float]:
    weights = [each.case.weight for each in held]
    return {
        "median_abs_error": weighted_quantile(errors, weights, 0.5),
        "p95_abs_error": weighted_quantile(errors, weights, 0.95),
    }


def _gain(group: str, held: Sequence[Held]) -> dict[str, Any]:
    """Resample whole groups: by how much the median error falls, its middle 90%, and how often it falls at all."""
    import numpy as np

    before, after = (_Sorted.of(errors, held) for errors in ("formula_error", "corrected_error"))
    names, codes = np.unique([getattr(each.case, group) for each in held], return_inverse=True)
    random = np.random.default_rng(0)
    gains = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[codes]
        gains.append(before.median(times) - after.median(times))
    low, middle, high = (float(each) for each in np.quantile(gains, (0.05, 0.5, 0.95)))
    return {"gain": middle, "gain_low": low, "gain_high": high, "wins": float(np.mean(np.array(gains) > 0))}


class _Sorted:
    """Errors in order, to take the median of again and again with each counted so many times."""

    def __init__(self, errors: Floats, weights: Floats) -> None:
        import numpy as np

        self.order = np.argsort(errors)
        self.errors, self.weights = errors[self.order], weights[self.order]

    @classmethod
    def of(cls, name: str, held: Sequence[Held]) -> _Sorted:
        import numpy as np

        return cls(np.array([getattr(each, name) for each in held]), np.array([each.case.weight for each in held]))

    def median(self, times: Any) -> float:
        import numpy as np

        summed = np.cumsum(self.weights * times[self.order])
        return float(self.errors[np.searchsorted(summed, 0.5 * summed[-1] * (1 - 1e-12))])


def _mode(
    held: Sequence[Held], group: str, summary: Mapping[str, Any], coverage: float, borrowed: Mode | None
) -> tuple[Mode, float | None]:
    """Decide whether to apply a correction, and bound its errors; return the share of held-out cases within the bounds.

    With too few groups nothing is applied, and what is borrowed is joined to the formula's own interval: the bounds of
    other models' errors, and where too few were measured, those of allocated bytes, of which the other bytes are made.
    """
    if summary["groups"] < FEWEST_GROUPS:
        return replace(borrowed or Mode(applied=False, low=1.0, high=1.0), joined=True), None
    return _bounded(held, group, coverage, applied=summary["wins"] >= WINS)


def _bounded(held: Sequence[Held], group: str, coverage: float, *, applied: bool) -> tuple[Mode, float]:
    import numpy as np

    table = table_of([each.case for each in held])
    errors = table.ratios - (np.array([each.correction for each in held]) if applied else 0.0)
    table, errors = table.take(~table.bounds), errors[~table.bounds]
    width, covered = _width(table, errors, group, coverage)
    low, high = _widened(_bounds(errors, table.weights, coverage), width)
    return Mode(applied=applied, low=math.exp(low), high=math.exp(high)), covered


def _width(table: Table, errors: Floats, group: str, coverage: float) -> tuple[float, float]:
    """Return by how much to widen bounds so that groups which they were drawn without are covered, and how far they are."""
    parts = []
    for fold in folds(table, group):
        rest = others(fold, table)
        parts.append((errors[fold], table.weights[fold], _bounds(errors[rest], table.weights[rest], coverage)))
    for width in WIDTHS:
        inside = sum(_inside(own, weights, _widened(bounds, width)) for own, weights, bounds in parts)
        covered = inside / float(table.weights.sum())
        if covered >= coverage:
            break
    return width, covered


def _inside(errors: Floats, weights: Floats, bounds: tuple[float, float]) -> float:
    return float(weights[(bounds[0] <= errors) & (errors <= bounds[1])].sum())


def _bounds(errors: Floats, weights: Floats, coverage: float) -> tuple[float, float]:
    """Return conformal bounds: the narrowest that hold this share of held-out errors, with few enough above."""
    import numpy as np

    order = np.argsort(errors)
    values, summed = errors[order], np.cumsum(weights[order])
    missed = max(0.0, (1 - coverage) * summed[-1] - coverage)  # one more run shall be within them as often
    above = missed * np.linspace(0.0, ABOVE, 11)
    lows = values[np.searchsorted(summed, (missed - above) * (1 + 1e-12), side="right").clip(0, len(values) - 1)]
    highs = values[np.searchsorted(summed, (summed[-1] - above) * (1 - 1e-12)).clip(0, len(values) - 1)]
    place = int(np.argmin(highs - lows))
    return float(lows[place]), float(highs[place])


def _widened(bounds: tuple[float, float], width: float) -> tuple[float, float]:
    """Return bounds so many times as far from their middle; what is predicted, a log ratio of 0, stays within."""
    middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return min(middle - width * half, 0.0), max(middle + width * half, 0.0)


def _false_fits(scores: TargetScores | None) -> dict[str, float]:
    """Return how often a held-out case was said to fit and did not: of all cases, of those that did not fit."""
    if scores is None:
        return {}
    mode = scores.correction.modes[KNOWN_CARD]
    said = wrong = unfit = total = 0.0
    for each in scores.held["model"]:
        case, correction = each.case, each.correction if mode.applied else 0.0
        most = case.predicted * math.exp(correction) * mode.high
        fitted = not case.out_of_memory and case.measured <= case.card_bytes
        fits = most <= case.card_bytes
        total += case.weight
        unfit += case.weight * (not fitted)
        said += case.weight * fits
        wrong += case.weight * (fits and not fitted)
    return {"rate": wrong / total, "wrong": wrong, "said_to_fit": said, "did_not_fit": unfit, "cells": total}


# --- for machines ---


def summary_to_json(found: Calibration) -> dict[str, Any]:
    """Return the scores of memory and of time, each pooled over its targets, then by target."""
    return {
        "version": found.correction.version,
        "rows": found.correction.rows,
        "replaces": found.correction.replaces,
        "memory": {**_pooled(found, MEMORY), "false_fits": found.correction.false_fits.get("rate")},
        "time": _pooled(found, TIMES),
        "targets": {name: scores.correction.scores for name, scores in found.targets.items()},
        "left_out": len(found.left),
    }


def _pooled(found: Calibration, names: Sequence[str]) -> dict[str, Any]:
    """Pool targets: errors as predictions are made, so that what is not applied counts as the formula."""
    pooled: dict[str, Any] = {}
    for label, mode in (("leave_one_model_out", KNOWN_CARD), ("leave_one_card_out", NEW_CARD)):
        parts = [found.targets[name] for name in names if name in found.targets]
        held = [(part, each) for part in parts for each in part.held[GROUP_OF[mode]] if not each.case.out_of_memory]
        applied = [
            each.corrected_error if part.correction.modes[mode].applied else each.formula_error for part, each in held
        ]
        cases = [each for _, each in held]
        pooled[label] = {
            "cases": len(cases),
            "formula": _errors([each.formula_error for each in cases], cases),
            "corrected": _errors(applied, cases),
        }
        pooled[label]["coverage_90"] = _pooled_coverage(held, mode)
    pooled["coverage_90"] = pooled["leave_one_model_out"]["coverage_90"]
    return pooled


def _pooled_coverage(held: Sequence[tuple[TargetScores, Held]], mode: str) -> float | None:
    """Return the share of held-out cases within their interval, of targets with more than one group to hold out."""
    inside = total = 0.0
    for part, each in held:
        covered = part.correction.scores[GROUP_OF[mode]]["coverage"]
        if covered is not None:
            inside += covered * each.case.weight
            total += each.case.weight
    return inside / total if total else None
