"""Conformal intervals: the narrowest bounds that hold their share of held-out errors, as wide as groups not seen need.

Bounds are drawn from some groups' errors (log(measured / predicted)), and it is noted how many times as far from their
middle they would have to be to hold each error of another group. A share of these sets the width: that share with which
groups that had no say, neither in the bounds nor in the width, are covered about as often as was asked. Where an interval
is joined to another one, what that one holds needs no width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .fit import weighted_quantile
from .formula_ranges import Bounds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]
    Places = npt.NDArray[np.intp]

#: Of the misses of an interval, at most this share may lie above it: what takes more than it should costs most.
ABOVE = 0.5
#: So many levels are tried, from the coverage that was asked for to nearly 1.
LEVELS = 20
#: Coverages that differ by less than this weight are one.
NO_MORE = 0.5
#: Bounds are at least so far apart: what repeats to the last digit is no promise to.
LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class Part:
    """Held-out errors with their places and weights, and the bounds drawn from other groups than this `group` of theirs.

    `own` are the ends, an error each, of the intervals that these bounds are joined to: 0 and 0 for none.
    """

    group: int
    places: Places
    errors: Floats
    weights: Floats
    bounds: Bounds
    own: tuple[Floats, Floats]

    def needed(self) -> Floats:
        """Return how many times as far from their middle the bounds have to be to hold each error."""
        import numpy as np

        low, high = self.bounds
        middle, half = (low + high) / 2, max(high - low, LEAST) / 2
        beyond = np.abs(self.errors - middle) / half
        own_low, own_high = self.own
        # What is predicted, a log ratio of 0, is always within.
        within = (np.minimum(middle, own_low) <= self.errors) & (self.errors <= np.maximum(middle, own_high))
        return np.where(within, 0.0, beyond)


def narrowest(errors: Floats, weights: Floats, coverage: float) -> Bounds:
    """Return the narrowest bounds that hold this share of held-out errors and of one more, with few enough above."""
    import numpy as np

    order = np.argsort(errors)
    values, summed = errors[order], np.cumsum(weights[order])
    missed = max(0.0, (1 - coverage) * summed[-1] - coverage)  # one more run shall be within them as often
    above = missed * np.linspace(0.0, ABOVE, 11)
    lows = values[np.searchsorted(summed, (missed - above) * (1 + 1e-12), side="right").clip(0, len(values) - 1)]
    highs = values[np.searchsorted(summed, (summed[-1] - above) * (1 - 1e-12)).clip(0, len(values) - 1)]
    place = int(np.argmin(highs - lows))
    return float(lows[place]), float(highs[place])


def levels(coverage: float) -> list[float]:
    """Return the levels that are tried, from the coverage that was asked for to nearly 1."""
    return [coverage + (1 - coverage) * step / LEVELS for step in range(LEVELS)]


def closest(inside: Sequence[Flags], weights: Floats, coverage: float) -> int:
    """Return the first of these levels' flags that cover the weighted errors about as often as asked.

    About: as close as the closest of them, or half a cell (a weight of 1 is a cell) further.
    """
    total = float(weights.sum())
    misses = [abs(float(weights[flags].sum()) - coverage * total) for flags in inside]
    return next(place for place, miss in enumerate(misses) if miss <= min(misses) + NO_MORE)


def width_of(parts: Sequence[Part], coverage: float) -> tuple[float, list[float], Flags]:
    """Return the width that holds this share of all errors, then those set without each part's group.

    The last says which errors the latter hold.
    """
    import numpy as np

    needed = [part.needed() for part in parts]
    inside, widths = np.zeros(sum(map(len, needed)), dtype=bool), []
    for part, own in zip(parts, needed, strict=True):
        others = [place for place, each in enumerate(parts) if each.group != part.group]
        widths.append(_width(parts, needed, others or range(len(parts)), coverage))
        inside[part.places] = own <= widths[-1]
    return _width(parts, needed, range(len(parts)), coverage), widths, inside


def _width(parts: Sequence[Part], needed: Sequence[Floats], chosen: Sequence[int], coverage: float) -> float:
    import numpy as np

    weights = np.concatenate([parts[place].weights for place in chosen])
    return weighted_quantile(np.concatenate([needed[place] for place in chosen]), weights, coverage)


def widened(bounds: Bounds, width: float) -> Bounds:
    """Return bounds so many times as far from their middle; what is predicted, a log ratio of 0, stays within."""
    middle, half = (bounds[0] + bounds[1]) / 2, max(bounds[1] - bounds[0], LEAST) / 2
    return min(middle - width * half, 0.0), max(middle + width * half, 0.0)
