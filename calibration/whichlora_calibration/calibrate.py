"""From measurements to a correction with its held-out scores: fit, hold out, compare, and apply only what is better."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .cases import MEMORY, TARGETS, TIMES, Case, Left
from .correction import KNOWN_CARD, NEW_CARD, Correction, Mode, TargetCorrection
from .fit import NOTHING, Fitted, candidates, choose, fit, folds, held_out, weighted_quantile
from .forecasts import formula_hash

COVERAGE = 0.9
#: Cells below which a target is left to the formula.
FEWEST_CELLS = 5
#: Resamplings of whole groups that say how sure a gain is, and the share of them that a correction must win.
RESAMPLES, WINS = 200, 0.8
#: By how much bounds may be widened (or narrowed) until held-out groups are covered; the last one where none suffices.
WIDTHS = tuple(1.05**step for step in range(-14, 33))
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
    """All held-out predictions of a target, by the group that was held out, and what was chosen in the end."""

    target: str
    held: Mapping[str, Sequence[Held]]
    correction: TargetCorrection


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
    coverage: float = COVERAGE,
    replaces: str | None = None,
    whichlora: str = "",
    report: Report = lambda _: None,
) -> Calibration:
    """Fit a correction of every target that has enough cells, and score it; `replaces` is the version used until now."""
    scored: dict[str, TargetScores] = {}
    for target in TARGETS:
        own = [case for case in cases if case.target == target]
        if len({case.cell for case in own if not case.out_of_memory}) >= FEWEST_CELLS:
            report(f"fitting {target}: {len(own)} cases")
            scored[target] = _score(target, own, coverage)
    rows = _hash(case.measurement_id for case in cases)
    correction = Correction(
        version=_hash([rows, formula_hash(), str(coverage)])[:16],
        replaces=replaces,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        whichlora=whichlora,
        formula=formula_hash(),
        rows=rows,
        counts={target: sum(case.target == target for case in cases) for target in TARGETS},
        coverage=coverage,
        targets={target: scores.correction for target, scores in scored.items()},
        false_fits=_false_fits(scored.get("process")),
    )
    return Calibration(correction=correction, targets=scored, left=tuple(left))


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(texts))).encode()).hexdigest()


def _score(target: str, cases: Sequence[Case], coverage: float) -> TargetScores:
    tried = candidates(target)
    held = {
        group: [
            Held(case=case, correction=correction)
            for case, correction in zip(cases, held_out(cases, group, tried), strict=True)
        ]
        for group in ("model", "gpu", "source")
    }
    scores: dict[str, Any] = {group: _summary(group, some) for group, some in held.items()}
    modes = {}
    for name, group in GROUP_OF.items():
        modes[name], scores[group]["coverage"] = _mode(held[group], group, scores[group], coverage)
        scores[group]["applied"] = modes[name].applied
    fitted = fit(cases, choose(cases, tried)) if any(mode.applied for mode in modes.values()) else NOTHING
    correction = TargetCorrection(
        intercept=fitted.intercept,
        coefficients=fitted.coefficients,
        cards=_offsets(cases, fitted),
        stacks=fitted.stacks,
        modes=modes,
        scores=scores,
    )
    return TargetScores(target=target, held=held, correction=correction)


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

    groups: dict[str, list[int]] = {}
    for place, each in enumerate(held):
        groups.setdefault(getattr(each.case, group), []).append(place)
    before = np.array([each.formula_error for each in held])
    after = np.array([each.corrected_error for each in held])
    weights = np.array([each.case.weight for each in held])
    random = np.random.default_rng(0)
    names = list(groups)
    gains = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(names), size=len(names))
        places = np.concatenate([groups[names[number]] for number in drawn])
        medians = [weighted_quantile(errors[places], weights[places], 0.5) for errors in (before, after)]
        gains.append(medians[0] - medians[1])
    low, middle, high = (float(each) for each in np.quantile(gains, (0.05, 0.5, 0.95)))
    return {"gain": middle, "gain_low": low, "gain_high": high, "wins": float(np.mean(np.array(gains) > 0))}


def _mode(held: Sequence[Held], group: str, summary: Mapping[str, Any], coverage: float) -> tuple[Mode, float | None]:
    """Decide whether to apply a correction, and bound its errors; return the share of held-out cases within the bounds."""
    applied = summary["groups"] > 1 and summary["wins"] >= WINS
    exact = [each for each in held if not each.case.out_of_memory]
    errors = [each.case.log_ratio - (each.correction if applied else 0.0) for each in exact]
    weights = [each.case.weight for each in exact]
    cases = [each.case for each in exact]
    width, covered = 1.0, None
    if summary["groups"] > 1:
        width, covered = _width(cases, errors, group, coverage)
    low, high = _bounds(errors, weights, coverage, width)
    return Mode(applied=applied, low=math.exp(low), high=math.exp(high)), covered


def _width(cases: Sequence[Case], errors: Sequence[float], group: str, coverage: float) -> tuple[float, float]:
    """Return by how much to widen bounds so that groups which they were drawn without are covered, and how far they are."""
    for width in WIDTHS:
        covered = _covered(cases, errors, group, coverage, width)
        if covered >= coverage:
            break
    return width, covered


def _bounds(errors: Sequence[float], weights: Sequence[float], coverage: float, width: float) -> tuple[float, float]:
    """Return conformal bounds: quantiles of held-out errors, about their median so many times as wide."""
    cells = max(1.0, math.fsum(weights))
    tail = max(0.0, (1 - coverage) / 2 - 1 / (2 * cells))
    low, middle, high = (weighted_quantile(errors, weights, share) for share in (tail, 0.5, 1 - tail))
    return middle + width * (low - middle), middle + width * (high - middle)


def _covered(cases: Sequence[Case], errors: Sequence[float], group: str, coverage: float, width: float) -> float:
    """Return the share of cases within bounds that were drawn without their group."""
    inside = total = 0.0
    for fold in folds(cases, group):
        out = set(fold)
        rest = [place for place in range(len(cases)) if place not in out]
        kept = [cases[place].weight for place in rest]
        low, high = _bounds([errors[place] for place in rest], kept, coverage, width)
        inside += sum(cases[place].weight for place in fold if low <= errors[place] <= high)
        total += sum(cases[place].weight for place in fold)
    return inside / total


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
