"""How predictions did on held-out groups: errors with their spread, whether to apply a correction, and its interval.

A mode is decided for cards that were measured, with other models, and for cards that were not. Intervals for new cards
are set for all times together, and for all counters: of chips there are too few for each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cases import Case
from .correction import Mode
from .fit import GROUPS, Table, candidates, folds, held_out, others, table_of, weighted_quantile
from .intervals import Bounds, Part, closest, narrowest, widened, width_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

#: Resamplings of whole groups that say how sure a gain is, and the share of them that a correction must win.
RESAMPLES, WINS = 200, 0.8
#: Groups below which held-out errors tell too little of others: nothing is applied, and the formula's interval is joined.
FEWEST_GROUPS = 5
#: Chips whose errors bound those of another one; where there are fewer, those of the other times (or counters) do too.
FEWEST_CHIPS = 2
#: Nothing is applied, and nothing known of errors.
UNKNOWN = Mode(applied=False, low=1.0, high=1.0, joined=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A case with what was predicted for it while its whole group was held out, in logarithms of the formula's number.

    The formula of the case has seen no run of its chip. `known` says that its card was among those learnt from.
    """

    case: Case
    correction: float
    known: bool = True

    @property
    def formula_error(self) -> float:
        """Return |measured / predicted - 1| of the formula."""
        return abs(math.expm1(self.case.log_ratio))

    @property
    def corrected_error(self) -> float:
        """Return the same of the corrected number."""
        return abs(math.expm1(self.case.log_ratio - self.correction))

    def error(self, *, applied: bool) -> float:
        """Return the error of the number that is given out."""
        return self.corrected_error if applied else self.formula_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """A mode, the summary of what it was decided on, and which held-out predictions its interval held (None: unknown).

    Each of those intervals was made without the prediction's own group.
    """

    mode: Mode
    summary: Mapping[str, Any]
    inside: Sequence[bool | None]


def hold_out(target: str, cases: Sequence[Case]) -> dict[str, list[Held]]:
    """Predict each case while its model, its chip or its source is held out; an entry for each of these.

    Where a model was all that its card was measured with, its chip is held out with it.
    """
    unseen = [case.as_unseen() for case in cases]
    table, tried = table_of(unseen), candidates(target)
    held = {}
    for group in GROUPS:
        corrections, known = held_out(table, group, tried)
        found = zip(unseen, corrections.tolist(), known.tolist(), strict=True)
        held[group] = [Held(case=case, correction=each, known=here) for case, each, here in found]
    held["model"] = [mine if mine.known else new for mine, new in zip(held["model"], held["chip"], strict=True)]
    return held


# --- errors ---


def summary(group: str, held: Sequence[Held]) -> dict[str, Any]:
    """Return held-out errors of formula and corrected, and the gain in the median with its spread over groups."""
    exact = [each for each in held if not each.case.out_of_memory]
    return {
        "cases": len(exact),
        "cells": len({each.case.cell for each in exact}),
        "groups": len({getattr(each.case, group) for each in exact}),
        "formula": errors([each.formula_error for each in exact], exact),
        "corrected": errors([each.corrected_error for each in exact], exact),
        **gain(group, exact, [each.corrected_error for each in exact]),
    }


def errors(found: Sequence[float], held: Sequence[Held]) -> dict[str, float]:
    """Return the median and the 95th percentile of errors, each weighed within its cell."""
    weights = [each.case.weight for each in held]
    return {
        "median_abs_error": weighted_quantile(found, weights, 0.5),
        "p95_abs_error": weighted_quantile(found, weights, 0.95),
    }


def gain(group: str, held: Sequence[Held], after: Sequence[float]) -> dict[str, Any]:
    """Resample whole groups: by how much the median error falls, its middle 90%, and how often it falls at all."""
    import numpy as np

    if not held:
        return {"gain": 0.0, "gain_low": 0.0, "gain_high": 0.0, "wins": 0.0}
    weights = np.array([each.case.weight for each in held])
    old = _Sorted(np.array([each.formula_error for each in held]), weights)
    new = _Sorted(np.array(after), weights)
    names, codes = np.unique([getattr(each.case, group) for each in held], return_inverse=True)
    random = np.random.default_rng(0)
    gains = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[codes]
        gains.append(old.median(times) - new.median(times))
    low, middle, high = (float(each) for each in np.quantile(gains, (0.05, 0.5, 0.95)))
    return {"gain": middle, "gain_low": low, "gain_high": high, "wins": float(np.mean(np.array(gains) > 0))}


class _Sorted:
    """Errors in order, to take the median of again and again with each counted so many times."""

    def __init__(self, errors: Floats, weights: Floats) -> None:
        import numpy as np

        self.order = np.argsort(errors)
        self.errors, self.weights = errors[self.order], weights[self.order]

    def median(self, times: Any) -> float:
        import numpy as np

        summed = np.cumsum(self.weights * times[self.order])
        return float(self.errors[np.searchsorted(summed, 0.5 * summed[-1] * (1 - 1e-12))])


# --- modes ---


def plain_mode(held: Sequence[Held], coverage: float) -> Mode | None:
    """Bound the formula's own errors with models held out; None for too few of them."""
    exact = [each for each in held if not each.case.out_of_memory]
    if len({each.case.model for each in exact}) < FEWEST_GROUPS:
        return None
    return _bounded(exact, "model", coverage, applied=False)[0]


def for_known_cards(held: Sequence[Held], coverage: float) -> Bounded:
    """Decide for cards that were measured, with other models: `held` are predictions with models held out."""
    exact = [each for each in held if each.known and not each.case.out_of_memory]
    found = summary("model", exact or held)
    if not exact or found["groups"] < FEWEST_GROUPS:
        found |= {"coverage": None, "applied": False}
        return Bounded(mode=UNKNOWN, summary=found, inside=[None] * len(held))
    applied = found["wins"] >= WINS
    mode, flags = _bounded(exact, "model", coverage, applied=applied)
    inside = dict(zip(map(id, exact), flags, strict=True))
    found |= {"coverage": covered(exact, flags), "applied": applied}
    return Bounded(mode=mode, summary=found, inside=[inside.get(id(each)) for each in held])


def _bounded(held: Sequence[Held], group: str, coverage: float, *, applied: bool) -> tuple[Mode, list[bool]]:
    """Return the interval of these errors, and which of them one made without their own group holds."""
    table = table_of([each.case for each in held])
    off = _errors(table, held, held if applied else ())
    parted = folds(table, group)

    def at(level: float) -> tuple[Bounds, Any]:
        parts = [
            Part(number, fold, off[fold], table.weights[fold], _drawn(table, off, others(fold, table), level))
            for number, fold in enumerate(parted)
        ]
        width, inside = width_of(parts, level)
        return widened(narrowest(off, table.weights, level), width), inside

    bounds, inside = closest(at, table.weights, coverage)
    return _mode(bounds, applied=applied), inside.tolist()


def _drawn(table: Table, off: Floats, rest: Any, level: float) -> Bounds:
    return narrowest(off[rest], table.weights[rest], level)


def _mode(bounds: Bounds, *, applied: bool) -> Mode:
    return Mode(applied=applied, low=math.exp(bounds[0]), high=math.exp(bounds[1]))


def _errors(table: Table, held: Sequence[Held], corrected: Sequence[Held]) -> Floats:
    """Return log(measured / predicted) of these, where `predicted` is corrected for some of them."""
    import numpy as np

    some = {id(each) for each in corrected}
    off: Floats = table.ratios - np.array([each.correction if id(each) in some else 0.0 for each in held])
    return off


def for_new_cards(held: Mapping[str, Sequence[Held]], coverage: float) -> dict[str, Bounded]:
    """Decide for cards that were not measured, for all targets of a kind: predictions with chips held out, by target."""
    exact = {name: [each for each in some if not each.case.out_of_memory] for name, some in held.items()}
    found = {name: summary("chip", some) for name, some in exact.items()}
    applied = {name: each["groups"] >= FEWEST_GROUPS and each["wins"] >= WINS for name, each in found.items()}
    told = {name: some for name, some in exact.items() if found[name]["groups"] > 1}
    modes, inside = _together(told, applied, coverage)
    bounded = {}
    for name, some in exact.items():
        flags = [inside.get(id(each)) for each in some]
        share = covered(some, flags) if name in modes else None
        bounded[name] = Bounded(
            mode=modes.get(name, UNKNOWN),
            summary={**found[name], "coverage": share, "applied": applied[name] and name in modes},
            inside=[inside.get(id(each)) for each in held[name]],
        )
    return bounded


def _together(
    told: Mapping[str, Sequence[Held]], applied: Mapping[str, bool], coverage: float
) -> tuple[dict[str, Mode], dict[int, bool]]:
    """Return the intervals of targets, of one width, and which errors those made without their own chip hold."""
    import numpy as np

    held = [each for some in told.values() for each in some]
    if len({each.case.chip for each in held}) < FEWEST_GROUPS:
        return {}, {}
    table = table_of([each.case for each in held])
    off = _errors(table, held, [each for each in held if applied[each.case.target]])
    targets = np.array([each.case.target for each in held])
    like = {name: _alike(table, targets == name, targets != "", FEWEST_CHIPS + 1) for name in told}
    parted = [
        (number, mine, _alike(table, targets == name, others(fold, table), FEWEST_CHIPS))
        for number, fold in enumerate(folds(table, "chip"))
        for name in told
        if len(mine := fold[targets[fold] == name])
    ]

    def at(level: float) -> tuple[dict[str, Bounds], Any]:
        parts = [
            Part(number, mine, off[mine], table.weights[mine], _drawn(table, off, rest, level))
            for number, mine, rest in parted
        ]
        width, inside = width_of(parts, level)
        return {name: widened(_drawn(table, off, some, level), width) for name, some in like.items()}, inside

    bounds, inside = closest(at, table.weights, coverage)
    modes = {name: _mode(each, applied=applied[name]) for name, each in bounds.items()}
    return modes, dict(zip(map(id, held), inside.tolist(), strict=True))


def _alike(table: Table, own: Any, rest: Any, fewest: int) -> Any:
    """Return which rows of the rest bound a target's errors: its own, or all where they are of too few chips."""
    chips = set(table.codes["chip"][own & rest].tolist())
    return own & rest if len(chips) >= fewest else rest


def covered(held: Sequence[Held], inside: Sequence[bool | None]) -> float | None:
    """Return the share of predictions inside their intervals, of those of which it is known; None for none."""
    known = [(each.case.weight, here) for each, here in zip(held, inside, strict=True) if here is not None]
    return sum(weight * here for weight, here in known) / sum(weight for weight, _ in known) if known else None
