"""From measurements to a correction with its held-out scores: fit, hold out, compare, and apply only what is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from .cases import MEMORY, TARGETS, TIMES, Case, Left, hash_of
from .correction import KNOWN_CARD, NEW_CARD, Correction, Mode, TargetCorrection
from .fit import NOTHING, Fitted, candidates, choose, fit
from .forecasts import formula_hash, unseen_times
from .scores import (
    UNKNOWN,
    Bounded,
    Held,
    covered,
    errors,
    for_known_cards,
    for_new_cards,
    gain,
    hold_out,
    plain_mode,
    summary,
)

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
    """All held-out predictions of a target, by the group that was held out, and what was chosen in the end.

    `inside` says of those with models and with chips held out, in the same order, whether the measured value lay in an
    interval that was made without the group; None where that cannot be told. `plain` bounds the formula's own errors.
    """

    target: str
    held: Mapping[str, Sequence[Held]]
    inside: Mapping[str, Sequence[bool | None]]
    correction: TargetCorrection
    plain: Mode | None

    def applied(self, each: Held) -> bool:
        """Return whether a held-out prediction would have been given out corrected."""
        return self.correction.modes[KNOWN_CARD if each.known else NEW_CARD].applied


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
    scored: dict[str, TargetScores] = {}
    for kind in (MEMORY, TIMES):
        new = for_new_cards({target: held[target]["chip"] for target in kind if target in held}, coverage)
        for target, bounded in new.items():
            scored[target] = _score(target, own[target], held[target], bounded, coverage, scored.get("allocated"))
    rows = hash_of(case.measurement_id for case in cases) if rows is None else rows
    correction = Correction(
        version=hash_of([rows, formula_hash(), str(coverage), str(unseen_times())])[:16],
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
    new: Bounded,
    coverage: float,
    allocated: TargetScores | None,
) -> TargetScores:
    """Decide for cards that were measured, fit what is applied to the formula as it is, and sum up.

    Where groups were too few, the formula's interval is joined to that of its errors with other models, and where
    those are too few as well, to that of allocated bytes, of which the other bytes are made.
    """
    known, plain = for_known_cards(held["model"], coverage), plain_mode(held["model"], coverage)
    borrowed = plain or (allocated.plain if allocated is not None and target in MEMORY else None) or UNKNOWN
    modes = {
        name: replace(borrowed, joined=True) if found.mode.joined else found.mode
        for name, found in ((KNOWN_CARD, known), (NEW_CARD, new))
    }
    fitted = NOTHING
    if any(mode.applied for mode in modes.values()):
        fitted = fit(cases, choose([case.as_unseen() for case in cases], candidates(target)))
    correction = TargetCorrection(
        intercept=fitted.intercept,
        coefficients=fitted.coefficients,
        cards=_offsets(cases, fitted),
        stacks=fitted.stacks,
        modes=modes,
        scores={"model": known.summary, "gpu": new.summary, "source": summary("source", held["source"])},
    )
    inside = {"model": known.inside, "chip": new.inside}
    return TargetScores(target=target, held=held, inside=inside, correction=correction, plain=plain)


def _offsets(cases: Sequence[Case], fitted: Fitted) -> dict[str, float]:
    """Return each measured card's offset, 0 where none was fitted: a card that is listed is a known one."""
    return {gpu: fitted.cards.get(gpu, 0.0) for gpu in sorted({case.gpu for case in cases})}


def _false_fits(scores: TargetScores | None) -> dict[str, float]:
    """Return how often a held-out case was said to fit and did not: of all cases, of those that did not fit."""
    if scores is None:
        return {}
    modes = scores.correction.modes
    said = wrong = unfit = total = 0.0
    for each in scores.held["model"]:
        case, mode = each.case, modes[KNOWN_CARD if each.known else NEW_CARD]
        correction = each.correction if mode.applied else 0.0
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
        told = list(_told(found, names, GROUP_OF[mode]))
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
        for each, here in zip(scores.held[group], scores.inside[group], strict=True):
            if not each.case.out_of_memory:
                yield each, each.error(applied=scores.applied(each)), here
