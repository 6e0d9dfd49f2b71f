"""From measurements to a correction with its held-out scores: fit, hold out, compare, and apply only what is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .cases import MEMORY, PHASES, TARGETS, TIMES, Case, Left, hash_of
from .correction import KNOWN_CARD, NEW_CARD, SCHEMA, Correction, TargetCorrection
from .fit import NOTHING, Fitted, candidates, choose, fit
from .forecasts import formula_hash, unseen_times
from .modes import FEWEST_TOLD, Decided, Spans, for_known_cards, for_new_cards, formula_spans
from .scores import Held, covered, errors, gain, hold_out, summary

COVERAGE = 0.9
#: Cells below which a target is left to the formula.
FEWEST_CELLS = 5
#: Formula's numbers that are kept with a correction.
SAMPLES = 24
#: Which group is held out for whom: a user's card has been measured, with other models, or has not.
GROUP_OF = {KNOWN_CARD: "model", NEW_CARD: "chip"}

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScores:
    """All held-out predictions of a target, by the group that was held out, and what was decided on them in the end.

    `decided` is how it is predicted on known and on new cards.
    """

    target: str
    held: Mapping[str, Sequence[Held]]
    decided: Mapping[str, Decided]
    correction: TargetCorrection

    def ruled(self, each: Held) -> Decided:
        """Return how a held-out prediction would have been given out."""
        return self.decided[KNOWN_CARD if each.known else NEW_CARD]

    def applied(self, each: Held) -> bool:
        """Return whether a held-out prediction would have been given out corrected."""
        return self.ruled(each).modes[each.case.phase].applied

    def inside(self, group: str) -> list[bool | None]:
        """Return which intervals, made without this group of theirs, hold what was measured; None: unknown."""
        held = self.held[group]
        exact = [each.case for each in held if not each.case.out_of_memory]
        groups = {
            phase: {getattr(case, group) for case in exact if case.phase == phase} for phase in PHASES[self.target]
        }
        told = {phase for phase, names in groups.items() if len(names) >= FEWEST_TOLD}
        return [self.ruled(each).inside(each) if each.case.phase in told else None for each in held]


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
    own = {target: [case for case in cases if case.target == target] for target in TARGETS}
    held: dict[str, dict[str, list[Held]]] = {}
    for target, some in own.items():
        if len({case.cell for case in some if not case.out_of_memory}) >= FEWEST_CELLS:
            report(f"fitting {target}: {sum(case.runs for case in some)} runs")
            held[target] = hold_out(target, some)
    formula = formula_spans({target: some["model"] for target, some in held.items()}, coverage)
    new: dict[str, Decided] = {}
    for kind in (MEMORY, TIMES):
        new |= for_new_cards({target: held[target]["chip"] for target in kind if target in held}, formula, coverage)
    scored = {
        target: _score(target, own[target], some, new[target], formula[target], coverage)
        for target, some in held.items()
    }
    rows = hash_of(case.measurement_id for case in cases) if rows is None else rows
    correction = Correction(
        version=hash_of([rows, formula_hash(), str(coverage), str(unseen_times()), str(SCHEMA)])[:16],
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


def _score(
    target: str,
    cases: Sequence[Case],
    held: Mapping[str, Sequence[Held]],
    new: Decided,
    formula: Spans | None,
    coverage: float,
) -> TargetScores:
    """Decide for cards that were measured, fit what is applied to the formula as it is, and sum up."""
    known = for_known_cards(target, held["model"], formula, coverage)
    modes = {phase: {KNOWN_CARD: known.modes[phase], NEW_CARD: new.modes[phase]} for phase in PHASES[target]}
    fitted = NOTHING
    if any(mode.applied for cards in modes.values() for mode in cards.values()):
        fitted = fit(cases, choose([case.as_unseen() for case in cases], candidates(target)))
    correction = TargetCorrection(
        intercept=fitted.intercept,
        coefficients=fitted.coefficients,
        cards=_offsets(cases, fitted),
        stacks=fitted.stacks,
        modes=modes,
        scores={"model": known.summary, "gpu": new.summary, "source": summary("source", held["source"])},
    )
    return TargetScores(target=target, held=held, decided={KNOWN_CARD: known, NEW_CARD: new}, correction=correction)


def _offsets(cases: Sequence[Case], fitted: Fitted) -> dict[str, float]:
    """Return each measured card's offset, 0 where none was fitted: a card that is listed is a known one."""
    return {gpu: fitted.cards.get(gpu, 0.0) for gpu in sorted({case.gpu for case in cases})}


def _false_fits(scores: TargetScores | None) -> dict[str, float]:
    """Return how often a held-out case was said to fit and did not: of all cases, of those that did not fit."""
    if scores is None:
        return {}
    said = wrong = unfit = total = 0.0
    for each in scores.held["model"]:
        case, bounds = each.case, scores.ruled(each).bounds(each) or each.case.own
        correction = each.correction if scores.applied(each) else 0.0
        most = case.predicted * math.exp(correction + bounds[1])
        fitted = not case.out_of_memory and case.measured <= case.card_bytes
        fits = most <= case.card_bytes
        total += case.weight
        unfit += case.weight * (not fitted)
        said += case.weight * fits
        wrong += case.weight * (fits and not fitted)
    return {"rate": wrong / total, "wrong": wrong, "said_to_fit": said, "did_not_fit": unfit, "cells": total}


# --- for machines ---


def summary_to_json(found: Calibration) -> dict[str, Any]:
    """Return the scores of memory and of time, each pooled over its targets, memory by phase too, then by target."""
    return {
        "version": found.correction.version,
        "rows": found.correction.rows,
        "replaces": found.correction.replaces,
        "memory": {
            **_pooled(found, MEMORY),
            "phases": {phase: _pooled(found, MEMORY, phase) for phase in PHASES["allocated"]},
            "false_fits": found.correction.false_fits.get("rate"),
        },
        "time": _pooled(found, TIMES),
        "targets": {name: scores.correction.scores for name, scores in found.targets.items()},
        "intervals": {name: _intervals(scores.correction) for name, scores in found.targets.items()},
        "left_out": len(found.left),
    }


def _intervals(correction: TargetCorrection) -> dict[str, Any]:
    """Return where measured over predicted lies, by phase and by whether the card is known."""
    return {
        phase: {card: {"low": mode.low, "high": mode.high, "joined": mode.joined} for card, mode in cards.items()}
        for phase, cards in correction.modes.items()
    }


def _pooled(found: Calibration, names: Sequence[str], phase: str | None = None) -> dict[str, Any]:
    """Pool targets: errors as predictions are made, so that what is not applied counts as the formula."""
    pooled: dict[str, Any] = {}
    for label, mode in (("leave_one_model_out", KNOWN_CARD), ("leave_one_card_out", NEW_CARD)):
        told = [each for each in _told(found, names, GROUP_OF[mode]) if phase in (None, each[0].case.phase)]
        held, after = [each for each, _, _ in told], [error for _, error, _ in told]
        pooled[label] = {
            "cases": len(held),
            "groups": len({getattr(each.case, GROUP_OF[mode]) for each in held}),
            "formula": errors([each.formula_error for each in held], held),
            "corrected": errors(after, held),
            **gain(GROUP_OF[mode], held, after),
            "coverage_90": covered(held, [here for _, _, here in told]),
        }
    pooled["coverage_90"] = pooled["leave_one_model_out"]["coverage_90"]
    return pooled


def _told(found: Calibration, names: Sequence[str], group: str) -> Iterator[tuple[Held, float, bool | None]]:
    """Yield held-out predictions, the error of what would have been given out, and whether its interval held."""
    for name in names:
        scores = found.targets.get(name)
        if scores is None:
            continue
        for each, here in zip(scores.held[group], scores.inside(group), strict=True):
            if not each.case.out_of_memory:
                yield each, each.error(applied=scores.applied(each)), here
