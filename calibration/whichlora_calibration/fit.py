"""Fit corrections: log(measured / predicted) on features, with offsets of cards and stacks that shrink to the pool.

Robust (Huber's loss), with a penalty that a card or stack of few measurements does not overcome: it borrows from the
rest. Running out of memory is a bound from below. What is fitted is chosen, and every error is quoted, on measurements
whose whole group (model, chip or source) was held out; the choice is made within each fold anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .cases import Case
from .correction import MOST

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]
    Places = npt.NDArray[np.intp]

#: Groups that are held out, by the field of a case.
GROUPS = ("model", "chip", "source")
LABELS = (*GROUPS, "gpu", "stack", "target", "phase")
#: Folds at most: of fewer groups each is held out by itself.
FOLDS, INNER_FOLDS = 12, 4
#: The choice among candidates is made on this many cases at most.
CHOICE_CASES = 2000
#: A simpler candidate is preferred that errs by no more than this share above the least.
SIMPLER = 0.1
#: So many models have to tell of each feature that a candidate fits.
MODELS_A_FEATURE = 4
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
class Table:
    """Cases of one target as columns: log ratios, weights, which are bounds, features by name, and labels as numbers.

    `codes[label]` are places in `names[label]`, for the labels model, chip, source, gpu, stack, target and phase.
    """

    ratios: Floats
    weights: Floats
    bounds: Flags
    features: Mapping[str, Floats]
    names: Mapping[str, tuple[str, ...]]
    codes: Mapping[str, Places]

    def __len__(self) -> int:
        return len(self.ratios)

    def take(self, places: Any) -> Table:
        """Return some of the rows: by place, or by a flag a row."""
        return Table(
            self.ratios[places],
            self.weights[places],
            self.bounds[places],
            {name: values[places] for name, values in self.features.items()},
            self.names,
            {name: values[places] for name, values in self.codes.items()},
        )


def table_of(cases: Sequence[Case] | Table) -> Table:
    """Return cases as columns."""
    if isinstance(cases, Table):
        return cases
    import numpy as np

    names = {label: tuple(sorted({getattr(case, label) for case in cases})) for label in LABELS}
    places = {label: {name: place for place, name in enumerate(names[label])} for label in LABELS}
    codes = {label: np.array([places[label][getattr(case, label)] for case in cases], dtype=int) for label in LABELS}
    return Table(
        np.array([case.log_ratio for case in cases]),
        np.array([case.weight for case in cases]),
        np.array([case.out_of_memory for case in cases], dtype=bool),
        {name: np.array([case.features[name] for case in cases]) for name in (cases[0].features if cases else ())},
        names,
        codes,
    )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted correction: the intercept, then what each feature, card and stack adds to the log ratio."""

    intercept: float
    coefficients: Mapping[str, float]
    cards: Mapping[str, float]
    stacks: Mapping[str, float]

    def log_ratio(self, case: Case) -> float:
        """Return the correction of a case, in logarithms; cards and stacks that were not fitted add nothing."""
        return float(self.log_ratios(table_of([case]))[0])

    def log_ratios(self, table: Table) -> Floats:
        """Return the corrections of many cases."""
        import numpy as np

        total: Floats = np.full(len(table), self.intercept)
        for name, value in self.coefficients.items():
            total += value * table.features[name]
        for label, offsets in (("gpu", self.cards), ("stack", self.stacks)):
            total += np.array([offsets.get(name, 0.0) for name in table.names[label]])[table.codes[label]]
        held: Floats = np.clip(total, -MOST, MOST)
        return held


#: The formula as it is.
NOTHING = Fitted(0.0, {}, {}, {})


def candidates(target: str) -> tuple[Candidate, ...]:
    """Return what is tried for a target, the simplest first."""
    few, all_of_them = _FEATURES["memory" if target in ("allocated", "reserved", "process") else "time"]
    make = partial(Candidate, card_scale=1.0, stack_scale=0.7)
    own = [make(features=features, penalty=penalty) for features in ((), few, all_of_them) for penalty in (3.0, 0.3)]
    return (Candidate(features=(), penalty=1.0, card_scale=0.0, stack_scale=0.0), *own)


_FEATURES = {
    "memory": (
        ("four bit", "activation share"),
        ("activation share", "logits share", "fragmentation", "four bit", "checkpointing", "generation"),
    ),
    "time": (("four bit", "int8"), ("four bit", "int8", "checkpointing", "log tokens", "log seconds")),
}


def fit(cases: Sequence[Case] | Table, candidate: Candidate) -> Fitted:
    """Fit a candidate to cases of one target; bounds from below that it breaks are pulled in, the others ignored."""
    table = table_of(cases)
    fitted = _fit(table.take(~table.bounds), candidate)
    for _ in range(BOUND_ROUNDS if table.bounds.any() else 0):
        broken = table.bounds & (fitted.log_ratios(table) < table.ratios)
        if not broken.any():
            break
        fitted = _fit(table.take(~table.bounds | broken), candidate)
    return fitted


def _fit(table: Table, candidate: Candidate) -> Fitted:
    if not len(table):
        return NOTHING
    design = _Design.of(table, candidate)
    if design.matrix.shape[1] == 0:
        return Fitted(weighted_quantile(table.ratios, table.weights, 0.5), {}, {}, {})
    return design.fitted(*_robust(design.matrix, table.ratios, table.weights, candidate.penalty))


def _robust(matrix: Floats, ratios: Floats, weights: Floats, penalty: float) -> tuple[float, Floats]:
    """Fit ridge regression again and again, each time with less weight for what lies far off (Huber's weights)."""
    import numpy as np
    import sklearn
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=penalty, solver="cholesky")
    trust = np.ones_like(ratios)
    for _ in range(ROUNDS):
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            model.fit(matrix, ratios, sample_weight=weights * trust)
        errors = np.abs(ratios - model.intercept_ - matrix @ model.coef_)
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
    def of(cls, table: Table, candidate: Candidate) -> _Design:
        import numpy as np

        names = candidate.features
        raw = np.array([table.features[name] for name in names]).reshape(len(names), len(table)).T
        means, spreads = raw.mean(axis=0), raw.std(axis=0)
        spreads[spreads < 1e-9] = np.inf  # what does not vary explains nothing
        card_columns, cards = _indicators(table, "gpu", candidate.card_scale)
        stack_columns, stacks = _indicators(table, "stack", candidate.stack_scale)
        matrix = np.hstack([(raw - means) / spreads, card_columns, stack_columns])
        return cls(matrix, names, means, spreads, cards, stacks, candidate)

    def fitted(self, intercept: float, weights: Floats) -> Fitted:
        split, end = len(self.names), len(self.names) + len(self.cards)
        slopes = weights[:split] / self.spreads
        return Fitted(
            intercept - float(slopes @ self.means),
            dict(zip(self.names, slopes.tolist(), strict=True)),
            dict(zip(self.cards, (weights[split:end] * self.candidate.card_scale).tolist(), strict=True)),
            dict(zip(self.stacks, (weights[end:] * self.candidate.stack_scale).tolist(), strict=True)),
        )


def _indicators(table: Table, label: str, scale: float) -> tuple[Floats, tuple[str, ...]]:
    """Return a column for each card or stack that occurs, `scale` where it does, and their names; none for no scale."""
    import numpy as np

    codes = table.codes[label]
    present = np.unique(codes) if scale else codes[:0]
    return scale * (codes[:, None] == present), tuple(table.names[label][code] for code in present)


# --- what is held out ---


def folds(cases: Sequence[Case] | Table, group: str, most: int = FOLDS) -> list[Places]:
    """Divide the places of cases into folds, none of which shares a group with another; the largest groups first."""
    import numpy as np

    table = table_of(cases)
    codes, names = table.codes[group], table.names[group]
    sizes = np.bincount(codes, minlength=len(names))
    present = [code for code in range(len(names)) if sizes[code]]
    parts: list[list[int]] = [[] for _ in range(min(most, len(present)))]
    totals = [0] * len(parts)
    for code in sorted(present, key=lambda code: (-sizes[code], names[code])):
        smallest = totals.index(min(totals))
        parts[smallest].append(code)
        totals[smallest] += int(sizes[code])
    return [np.flatnonzero(np.isin(codes, part)) for part in parts]


def held_out(cases: Sequence[Case] | Table, group: str, tried: Sequence[Candidate]) -> tuple[Floats, Flags]:
    """Return the log correction of each case, fitted without its group, and whether its card was known even so.

    The candidate is chosen without the group too.
    """
    import numpy as np

    table = table_of(cases)
    corrections, known = np.zeros(len(table)), np.zeros(len(table), dtype=bool)
    for fold in folds(table, group):
        rest = table.take(others(fold, table))
        corrections[fold] = fit(rest, choose(rest, tried)).log_ratios(table.take(fold))
        known[fold] = np.isin(table.codes["gpu"][fold], rest.codes["gpu"])
    return corrections, known


def others(fold: Places, table: Table) -> Flags:
    """Return which rows are not in a fold."""
    import numpy as np

    others = np.ones(len(table), dtype=bool)
    others[fold] = False
    return others


def choose(cases: Sequence[Case] | Table, tried: Sequence[Candidate]) -> Candidate:
    """Return the simplest candidate whose error on held-out models of known cards is about as small as the least."""
    table = table_of(cases)
    some = table.take(slice(None, None, max(1, math.ceil(len(table) / CHOICE_CASES))))
    tried = [candidate for candidate in tried if _enough_models(table, candidate)]
    errors = [_held_out_error(some, candidate) for candidate in tried]
    most = max(min(errors) * (1 + SIMPLER), min(errors) + SMALLEST_SPREAD)
    return next(candidate for candidate, error in zip(tried, errors, strict=True) if error <= most)


def _enough_models(table: Table, candidate: Candidate) -> bool:
    import numpy as np

    varying = [name for name in candidate.features if len(np.unique(table.features[name])) > 1]
    return len(varying) * MODELS_A_FEATURE <= len(set(table.codes["model"].tolist()))


def _held_out_error(table: Table, candidate: Candidate) -> float:
    import numpy as np

    parts = folds(table, "model", INNER_FOLDS)
    if len(parts) < 2:
        return math.inf if candidate.features else 0.0
    errors, known = np.zeros(len(table)), np.zeros(len(table), dtype=bool)
    for fold in parts:
        rest = table.take(others(fold, table))
        errors[fold] = np.abs(table.ratios[fold] - fit(rest, candidate).log_ratios(table.take(fold)))
        known[fold] = np.isin(table.codes["gpu"][fold], rest.codes["gpu"])
    told = ~table.bounds & known if (~table.bounds & known).any() else ~table.bounds
    errors, weights = errors[told], table.weights[told]
    return weighted_quantile(errors, weights, 0.5) + 0.1 * weighted_quantile(errors, weights, 0.9)


def weighted_quantile(values: Any, weights: Any, share: float) -> float:
    """Return the least value below or at which lies this share of the weight; 0 for none."""
    import numpy as np

    if len(values) == 0:
        return 0.0
    order = np.argsort(values)
    summed = np.cumsum(np.asarray(weights, dtype=float)[order])
    place = int(np.searchsorted(summed, share * summed[-1] * (1 - 1e-12)))
    return float(np.asarray(values, dtype=float)[order][min(place, len(order) - 1)])
