"""How far predictions may be off, and whether to correct them: on known and on new cards, in training and in generation.

Bounds belong to a stratum: a counter or time in one phase. They are drawn from its own errors where enough groups tell of
it, else from those of its phase, else from all; then the bounds of all strata that are held out together are widened by as
much as groups not seen need. Where groups are too few for that, the formula's own interval is joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .cases import MEMORY, PHASES
from .correction import Mode
from .fit import Table, folds, others, table_of
from .formula_ranges import Bounds
from .intervals import Part, closest, levels, narrowest, widened, width_of
from .scores import WINS, Held, covered, summary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]
    Places = npt.NDArray[np.intp]

#: A counter or time, and a phase.
Stratum = tuple[str, str]
#: Groups below which held-out errors tell too little of others: nothing is applied, and the formula's interval is joined.
FEWEST_GROUPS = 5
#: By how much a correction has to lower the median error: less is not worth a number that was fitted.
LEAST_GAIN = 0.002
#: Groups whose errors bound those of another one in their stratum; where there are fewer, others' errors do too.
FEWEST_ALIKE = 2
#: Groups below which it is not told how often intervals held: the others are too few to have made them.
FEWEST_TOLD = FEWEST_ALIKE + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Bounds of log(measured / given out) by stratum; and those made without a group: its kind, its name, the stratum."""

    bounds: Mapping[Stratum, Bounds]
    without: Mapping[tuple[str, str, Stratum], Bounds]

    @classmethod
    def of_strata(cls, parts: Mapping[Stratum, Spans]) -> Spans:
        """Return the bounds that each stratum has in its own part."""
        bounds = {stratum: part.bounds[stratum] for stratum, part in parts.items()}
        without = {key: each for own, part in parts.items() for key, each in part.without.items() if key[2] == own}
        return cls(bounds=bounds, without=without)

    def of(self, held: Held) -> Bounds:
        """Return the bounds made without what was held out: of a known card the model, else the chip."""
        case = held.case
        stratum = (case.target, case.phase)
        group = ("model", case.model) if held.known else ("chip", case.chip)
        return self.without.get((*group, stratum), self.bounds[stratum])


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """How a target is predicted by phase, what that was decided on, and the spans; None where nothing is known."""

    modes: Mapping[str, Mode]
    summary: Mapping[str, Any]
    spans: Spans | None

    def bounds(self, held: Held) -> Bounds | None:
        """Return the interval of a held-out prediction, in logarithms, made without what was held out; None: unknown."""
        if self.spans is None:
            return None
        low, high = self.spans.of(held)
        if self.modes[held.case.phase].joined:
            return min(low, held.case.own[0]), max(high, held.case.own[1])
        return low, high

    def inside(self, held: Held) -> bool | None:
        """Return whether that interval holds what was measured; None: unknown."""
        bounds = self.bounds(held)
        return None if bounds is None else held.within(bounds, applied=self.modes[held.case.phase].applied)


def strata_of(targets: Sequence[str]) -> list[Stratum]:
    """Return the strata of some targets."""
    return [(target, phase) for target in targets for phase in PHASES[target]]


# --- what is given out ---


def formula_spans(held: Mapping[str, Sequence[Held]], coverage: float) -> dict[str, Spans | None]:
    """Bound the formula's own errors by target, joined to its own interval: predictions with models held out.

    Counters are bounded together, since reserved and process bytes are made of allocated ones; times each by itself.
    None where too few models tell of a target.
    """
    pools = [[name for name in MEMORY if name in held], *([name] for name in held if name not in MEMORY)]
    found: dict[str, Spans | None] = {}
    for pool in pools:
        exact = [each for name in pool for each in held[name] if not each.case.out_of_memory]
        found |= dict.fromkeys(pool, _formula_spans(exact, strata_of(pool), coverage))
    return found


def _formula_spans(held: Sequence[Held], strata: Sequence[Stratum], coverage: float) -> Spans | None:
    """Bound these errors without each model, and, where enough models are left then, without each chip."""
    if _count(held, "model") < FEWEST_GROUPS:
        return None
    whole = spans_of(held, strata, "model", coverage, joined=True)
    without = dict(whole.without)
    for chip in {each.case.chip for each in held}:
        rest = [each for each in held if each.case.chip != chip]
        told = _count(rest, "model") >= FEWEST_GROUPS
        bounds = spans_of(rest, strata, "model", coverage, joined=True).bounds if told else {}
        without |= {("chip", chip, stratum): bounds.get(stratum, (0.0, 0.0)) for stratum in strata}
    return Spans(bounds=whole.bounds, without=without)


def for_known_cards(target: str, held: Sequence[Held], formula: Spans | None, coverage: float) -> Decided:
    """Decide for cards that were measured, with other models: `held` are predictions with models held out."""
    exact = [each for each in held if each.known and not each.case.out_of_memory]
    strata = strata_of([target])
    found = _summaries("model", exact or held, strata)
    if not exact or _count(exact, "model") < FEWEST_GROUPS:
        return _joined(exact, strata, found, formula)
    applied = _applied(found)
    spans = spans_of(exact, strata, "model", coverage, applied=applied)
    return _decided(exact, strata, found, spans, applied)


def for_new_cards(
    held: Mapping[str, Sequence[Held]], formula: Mapping[str, Spans | None], coverage: float
) -> dict[str, Decided]:
    """Decide for cards that were not measured, for all targets of a kind: predictions with chips held out, by target.

    Their intervals are set together: of chips there are too few for each target by itself.
    """
    exact = {name: [each for each in some if not each.case.out_of_memory] for name, some in held.items()}
    found = {name: _summaries("chip", some, strata_of([name])) for name, some in exact.items()}
    told = [name for name, some in exact.items() if _count(some, "chip") > 1]
    errors = [each for name in told for each in exact[name]]
    if _count(errors, "chip") < FEWEST_GROUPS:
        told = []
    applied = {stratum for name in told for stratum in _applied(found[name])}
    spans = spans_of(errors, strata_of(told), "chip", coverage, applied=applied) if told else None
    return {
        name: _decided(some, strata_of([name]), found[name], spans, applied)
        if name in told
        else _joined(some, strata_of([name]), found[name], formula[name])
        for name, some in exact.items()
    }


def _count(held: Sequence[Held], group: str) -> int:
    return len({getattr(each.case, group) for each in held})


def _summaries(group: str, held: Sequence[Held], strata: Sequence[Stratum]) -> dict[Stratum | None, dict[str, Any]]:
    """Sum up errors by stratum, and all of them (None)."""
    by_phase = {stratum: [each for each in held if each.case.phase == stratum[1]] for stratum in strata}
    return {None: summary(group, held), **{stratum: summary(group, some) for stratum, some in by_phase.items()}}


def _applied(found: Mapping[Stratum | None, Mapping[str, Any]]) -> set[Stratum]:
    """Return where the correction wins; in a phase of few groups it has to win in all together as well."""
    whole = found[None]
    overall = whole["groups"] >= FEWEST_GROUPS and whole["wins"] >= WINS
    applied = set()
    for stratum, part in found.items():
        wins = part["wins"] >= WINS and part["gain"] >= LEAST_GAIN
        if stratum and (wins if part["groups"] >= FEWEST_GROUPS else overall and (wins or not part["groups"])):
            applied.add(stratum)
    return applied


def _joined(
    held: Sequence[Held],
    strata: Sequence[Stratum],
    found: Mapping[Stratum | None, Mapping[str, Any]],
    formula: Spans | None,
) -> Decided:
    """Return that nothing is applied, and the formula's interval joined to what is known of its errors."""
    return _decided(held, strata, found, formula, set(), joined=True)


def _decided(
    held: Sequence[Held],
    strata: Sequence[Stratum],
    found: Mapping[Stratum | None, Mapping[str, Any]],
    spans: Spans | None,
    applied: set[Stratum],
    *,
    joined: bool = False,
) -> Decided:
    bounds = {stratum: (0.0, 0.0) if spans is None else spans.bounds[stratum] for stratum in strata}
    modes = {
        stratum[1]: Mode(applied=stratum in applied, low=math.exp(low), high=math.exp(high), joined=joined)
        for stratum, (low, high) in bounds.items()
    }
    decided = Decided(modes=modes, summary={}, spans=spans)
    told = {stratum: _told(decided, part, held, stratum) for stratum, part in found.items()}
    phases = {stratum[1]: part for stratum, part in told.items() if stratum and part["cases"]}
    return replace(decided, summary={**told[None], **({"phases": phases} if len(strata) > 1 else {})})


def _told(decided: Decided, part: Mapping[str, Any], held: Sequence[Held], stratum: Stratum | None) -> dict[str, Any]:
    """Add to a summary how often intervals held, and whether the correction is applied (in any phase, of all)."""
    some = [each for each in held if stratum is None or each.case.phase == stratum[1]]
    modes = [mode for phase, mode in decided.modes.items() if stratum is None or phase == stratum[1]]
    share = covered(some, [decided.inside(each) for each in some]) if part["groups"] >= FEWEST_TOLD else None
    return {**part, "coverage": share, "applied": any(mode.applied for mode in modes)}


# --- bounds ---


def spans_of(
    held: Sequence[Held],
    strata: Sequence[Stratum],
    group: str,
    coverage: float,
    *,
    applied: set[Stratum] | None = None,
    joined: bool = False,
) -> Spans:
    """Return the bounds of these errors, all of `strata`, and what they are without each group.

    The errors are those of the corrected number in the strata where it is `applied`. `joined`: to the formula's own
    interval, whose errors within need no bounds.
    """
    import numpy as np

    errors = _Errors.of(held, group, applied or set(), joined=joined)
    everything = np.ones(len(held), dtype=bool)
    like = {stratum: errors.alike(stratum, everything, FEWEST_TOLD) for stratum in strata}
    parted = list(errors.parted(strata))

    def at(level: float) -> tuple[Spans, Flags]:
        parts = [errors.part(number, mine, rest, level) for number, _, mine, rest in parted]
        width, widths, inside = width_of(parts, level)
        without = {
            (group, name, stratum): widened(part.bounds, own)
            for (_, stratum, mine, _), part, own in zip(parted, parts, widths, strict=True)
            for name in errors.names(mine)
        }
        bounds = {stratum: widened(errors.drawn(some, level), width) for stratum, some in like.items()}
        return Spans(bounds=bounds, without=without), inside

    tried = [at(level) for level in levels(coverage)]
    inside = [flags for _, flags in tried]
    return Spans.of_strata(
        {stratum: tried[closest(inside, errors.weights_in(stratum), coverage)][0] for stratum in strata}
    )


@dataclass(frozen=True, slots=True)
class _Errors:
    """Errors of held-out predictions in logarithms, the ends of the formula's own intervals, and their groups."""

    table: Table
    off: Floats
    own: tuple[Floats, Floats]
    group: str
    _flags: dict[Stratum, Flags] = field(default_factory=dict)

    @classmethod
    def of(cls, held: Sequence[Held], group: str, applied: set[Stratum], *, joined: bool) -> _Errors:
        import numpy as np

        table = table_of([each.case for each in held])
        learnt = [each.correction if (each.case.target, each.case.phase) in applied else 0.0 for each in held]
        low, high = np.array([each.case.own if joined else (0.0, 0.0) for each in held]).T
        return cls(table, table.ratios - np.array(learnt), (low, high), group)

    def own_of(self, stratum: Stratum) -> Flags:
        """Return which errors are of a stratum."""
        if stratum not in self._flags:
            self._flags[stratum] = self._labelled("target", stratum[0]) & self._labelled("phase", stratum[1])
        return self._flags[stratum]

    def _labelled(self, label: str, name: str) -> Flags:
        names = self.table.names[label]
        found: Flags = self.table.codes[label] == (names.index(name) if name in names else -1)
        return found

    def alike(self, stratum: Stratum, rest: Flags, fewest: int) -> Flags:
        """Return which of the rest bound a stratum's errors: its own, or those of its phase, or all."""
        codes = self.table.codes[self.group]
        for mine in (self.own_of(stratum), self._labelled("phase", stratum[1])):
            if len(set(codes[mine & rest].tolist())) >= fewest:
                found: Flags = mine & rest
                return found
        return rest

    def weights_in(self, stratum: Stratum) -> Floats:
        """Return the weights of a stratum's errors, 0 of others; all as they are where it has none."""
        mine = self.own_of(stratum)
        return self.table.weights * mine if mine.any() else self.table.weights

    def parted(self, strata: Sequence[Stratum]) -> Iterator[tuple[int, Stratum, Places, Flags]]:
        """Yield each fold's errors of each stratum, by their places, and those of other groups that bound them."""
        for number, fold in enumerate(folds(self.table, self.group)):
            for stratum in strata:
                mine = fold[self.own_of(stratum)[fold]]
                if len(mine):
                    yield number, stratum, mine, self.alike(stratum, others(fold, self.table), FEWEST_ALIKE)

    def names(self, places: Places) -> set[str]:
        """Return the groups of some errors."""
        return {self.table.names[self.group][code] for code in self.table.codes[self.group][places]}

    def drawn(self, some: Flags, level: float) -> Bounds:
        """Return the bounds that hold this share of some errors."""
        return narrowest(self.off[some], self.table.weights[some], level)

    def part(self, number: int, mine: Places, rest: Flags, level: float) -> Part:
        """Return the errors of a fold in one stratum, with bounds drawn from the rest."""
        own = (self.own[0][mine], self.own[1][mine])
        return Part(number, mine, self.off[mine], self.table.weights[mine], self.drawn(rest, level), own)
