"""Fit corrections: log(measured / predicted) on features, with offsets of cards and stacks that shrink to the pool.

Robust (Huber's loss), with a penalty that a card or stack of few measurements does not overcome: it borrows from the
rest. Running out of memory is a bound from below. What is fitted is chosen, and every error is quoted, on measurements
whose whole group — model, card or source — was held out; the choice is made within each fold anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .cases import Case

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

#: Groups that are held out, by the field of a case.
GROUPS = ("model", "gpu", "source")
#: Folds at most: of fewer groups each is held out by itself.
FOLDS, INNER_FOLDS = 12, 4
#: The choice among candidates is made on this many cases at most.
CHOICE_CASES = 2000
#: Bounds from below are met in so many rounds.
BOUND_ROUNDS = 3
#: Huber's threshold, in robust standard deviations: the usual one, 95% efficient on normal errors.
HUBER = 1.35
#: The median of the absolute errors of a normal distribution, in its standard deviations.
NORMAL_MEDIAN = 0.6745
#: Errors below this, a ten thousandth, are all alike.
SMALLEST_SPREAD = 1e-4
#: Reweighted fits; the weights hardly change after these.
ROUNDS = 5
#: What would correct by more than a factor of two, either way, is no correction: it is held to that.
MOST = math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What may be fitted: which features, and how freely cards and stacks may differ from the pool.

    A card whose measurements weigh `penalty` gets half of the offset that they show. `card_scale` and `stack_scale` are
    prior standard deviations of offsets relative to those of features; 0 for none.
    """

    features: tuple[str, ...]
    penalty: float
    card_scale: float
    stack_scale: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted correction: the intercept, then what each feature, card and stack adds to the log ratio."""

    intercept: float
    coefficients: Mapping[str, float]
    cards: Mapping[str, float]
    stacks: Mapping[str, float]

    def log_ratio(self, case: Case) -> float:
        """Return the correction of a case, in logarithms; cards and stacks that were not fitted add nothing."""
        learnt = sum(value * case.features[name] for name, value in self.coefficients.items())
        total = self.intercept + learnt + self.cards.get(case.gpu, 0.0) + self.stacks.get(case.stack, 0.0)
        return min(max(total, -MOST), MOST)


#: The formula as it is.
NOTHING = Fitted(0.0, {}, {}, {})


def candidates(target: str) -> tuple[Candidate, ...]:
    """Return what is tried for a target, the simplest first."""
    features = _FEATURES["memory" if target in ("allocated", "reserved", "process") else "time"]
    make = partial(Candidate, card_scale=1.0, stack_scale=0.7)
    return (
        Candidate(features=(), penalty=1.0, card_scale=0.0, stack_scale=0.0),
        make(features=(), penalty=3.0),
        make(features=(), penalty=0.3),
        make(features=features, penalty=3.0),
        make(features=features, penalty=0.3),
    )


_FEATURES = {
    "memory": ("activation share", "logits share", "fragmentation", "four bit", "checkpointing", "generation"),
    "time": ("four bit", "int8", "checkpointing", "log tokens", "log seconds"),
}


def fit(cases: Sequence[Case], candidate: Candidate) -> Fitted:
    """Fit a candidate to cases of one target; bounds from below that it breaks are pulled in, the others ignored."""
    exact = [case for case in cases if not case.out_of_memory]
    bounds = [case for case in cases if case.out_of_memory]
    fitted = _fit(exact, candidate)
    for _ in range(BOUND_ROUNDS if bounds else 0):
        broken = [case for case in bounds if fitted.log_ratio(case) < case.log_ratio]
        if not broken:
            break
        fitted = _fit([*exact, *broken], candidate)
    return fitted


def _fit(cases: Sequence[Case], candidate: Candidate) -> Fitted:
    if not cases:
        return NOTHING
    import numpy as np

    design = _Design.of(cases, candidate)
    ratios = np.array([case.log_ratio for case in cases])
    weights = np.array([case.weight for case in cases])
    if design.matrix.shape[1] == 0:
        return Fitted(weighted_quantile(ratios, weights, 0.5), {}, {}, {})
    return design.fitted(*_robust(design.matrix, ratios, weights, candidate.penalty))


def _robust(matrix: Floats, ratios: Floats, weights: Floats, penalty: float) -> tuple[float, Floats]:
    """Fit ridge regression again and again, each time with less weight for what lies far off (Huber's weights)."""
    import numpy as np
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=penalty, solver="cholesky")
    trust = np.ones_like(ratios)
    for _ in range(ROUNDS):
        model.fit(matrix, ratios, sample_weight=weights * trust)
        errors = np.abs(ratios - model.predict(matrix))
        spread = max(weighted_quantile(errors, weights, 0.5) / NORMAL_MEDIAN, SMALLEST_SPREAD)
        trust = np.minimum(1.0, HUBER * spread / np.maximum(errors, 1e-12))
    return float(model.intercept_), model.coef_


@dataclass(frozen=True, slots=True)
class _Design:
    """The matrix of a fit: standardised features, then a column a card and a stack, scaled by their priors."""

    matrix: Floats
    names: tuple[str, ...]
    means: Floats
    spreads: Floats
    cards: tuple[str, ...]
    stacks: tuple[str, ...]
    candidate: Candidate

    @classmethod
    def of(cls, cases: Sequence[Case], candidate: Candidate) -> _Design:
        import numpy as np

        names = candidate.features
        raw = np.array([[case.features[name] for name in names] for case in cases]).reshape(len(cases), len(names))
        means, spreads = raw.mean(axis=0), raw.std(axis=0)
        spreads[spreads < 1e-9] = np.inf  # what does not vary explains nothing
        cards = tuple(sorted({case.gpu for case in cases})) if candidate.card_scale else ()
        stacks = tuple(sorted({case.stack for case in cases})) if candidate.stack_scale else ()
        columns = [(raw - means) / spreads]
        columns.append(candidate.card_scale * _indicators([case.gpu for case in cases], cards))
        columns.append(candidate.stack_scale * _indicators([case.stack for case in cases], stacks))
        return cls(np.hstack(columns), names, means, spreads, cards, stacks, candidate)

    def fitted(self, intercept: float, weights: Floats) -> Fitted:
        split, end = len(self.names), len(self.names) + len(self.cards)
        slopes = weights[:split] / self.spreads
        return Fitted(
            intercept - float(slopes @ self.means),
            dict(zip(self.names, slopes.tolist(), strict=True)),
            dict(zip(self.cards, (weights[split:end] * self.candidate.card_scale).tolist(), strict=True)),
            dict(zip(self.stacks, (weights[end:] * self.candidate.stack_scale).tolist(), strict=True)),
        )


def _indicators(values: Sequence[str], known: tuple[str, ...]) -> Floats:
    import numpy as np

    places = {name: place for place, name in enumerate(known)}
    matrix = np.zeros((len(values), len(known)))
    if known:
        matrix[np.arange(len(values)), [places[value] for value in values]] = 1.0
    return matrix


# --- what is held out ---


def folds(cases: Sequence[Case], group: str, most: int = FOLDS) -> list[list[int]]:
    """Divide the places of cases into folds, none of which shares a group with another; the largest groups first."""
    sizes: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        sizes.setdefault(getattr(case, group), []).append(place)
    parts: list[list[int]] = [[] for _ in range(min(most, len(sizes)))]
    for _, places in sorted(sizes.items(), key=lambda each: (-len(each[1]), each[0])):
        min(parts, key=len).extend(places)
    return parts


def held_out(cases: Sequence[Case], group: str, tried: Sequence[Candidate]) -> list[float]:
    """Return the log correction of each case, fitted without its group; the candidate is chosen without it too."""
    corrections = [0.0] * len(cases)
    for fold in folds(cases, group):
        out = set(fold)
        rest = [case for place, case in enumerate(cases) if place not in out]
        fitted = fit(rest, choose(rest, tried))
        for place in fold:
            corrections[place] = fitted.log_ratio(cases[place])
    return corrections


def choose(cases: Sequence[Case], tried: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the least error on held-out models; the simpler one where they tie."""
    some = thinned(cases, CHOICE_CASES)
    return min(tried, key=lambda candidate: round(_held_out_error(some, candidate), 4))


def _held_out_error(cases: Sequence[Case], candidate: Candidate) -> float:
    errors: list[float] = []
    weights: list[float] = []
    parts = folds(cases, "model", INNER_FOLDS)
    if len(parts) < 2:
        return math.inf if candidate.features else 0.0
    for fold in parts:
        out = set(fold)
        fitted = fit([case for place, case in enumerate(cases) if place not in out], candidate)
        kept = [cases[place] for place in fold if not cases[place].out_of_memory]
        errors += [abs(case.log_ratio - fitted.log_ratio(case)) for case in kept]
        weights += [case.weight for case in kept]
    return weighted_quantile(errors, weights, 0.5) + 0.1 * weighted_quantile(errors, weights, 0.9)


def thinned(cases: Sequence[Case], most: int) -> Sequence[Case]:
    """Return every so many-th case, at most so many."""
    return cases if len(cases) <= most else cases[:: math.ceil(len(cases) / most)]


def weighted_quantile(values: Any, weights: Any, share: float) -> float:
    """Return the least value below or at which lies this share of the weight; 0 for none."""
    import numpy as np

    if len(values) == 0:
        return 0.0
    order = np.argsort(values)
    summed = np.cumsum(np.asarray(weights, dtype=float)[order])
    place = int(np.searchsorted(summed, share * summed[-1] * (1 - 1e-12)))
    return float(np.asarray(values, dtype=float)[order][min(place, len(order) - 1)])
