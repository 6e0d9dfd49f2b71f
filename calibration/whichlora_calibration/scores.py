"""How predictions did on held-out groups: errors with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cases import Case
from .fit import GROUPS, candidates, held_out, table_of, weighted_quantile
from .formula_ranges import Bounds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

#: Resamplings of whole groups that say how sure a gain is, and the share of them that a correction must win.
RESAMPLES, WINS = 200, 0.8
#: Logarithms that differ by less are one.
ROUNDING = 1e-9


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

    def within(self, bounds: Bounds, *, applied: bool) -> bool:
        """Return whether what was measured, over what is given out, lies within bounds, both in logarithms."""
        off = self.case.log_ratio - (self.correction if applied else 0.0)
        return bounds[0] - ROUNDING <= off <= bounds[1] + ROUNDING

    def error(self, *, applied: bool) -> float:
        """Return the error of the number that is given out."""
        return self.corrected_error if applied else self.formula_error


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


def covered(held: Sequence[Held], inside: Sequence[bool | None]) -> float | None:
    """Return the share of predictions inside their intervals, of those of which it is known; None for none."""
    known = [(each.case.weight, here) for each, here in zip(held, inside, strict=True) if here is not None]
    return sum(weight * here for weight, here in known) / sum(weight for weight, _ in known) if known else None
