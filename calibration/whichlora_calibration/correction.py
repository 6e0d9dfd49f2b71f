"""Corrections of the formula: what was learnt from measurements, as plain numbers that apply without any library.

A corrected number is the formula's times exp(intercept + Σ coefficient · feature + offset of the card + offset of the
stack). Offsets of a card or stack that nobody measured are 0. Where a correction did not beat the formula on held-out
measurements it is not applied, and the interval is that of the formula's own errors. Both are decided by phase: training
and generation err differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue

from .cases import NAMES, PHASES

SCHEMA = 2
#: Whose modes were those of both phases.
WITHOUT_PHASES = 1
#: Whether the card that is predicted for has measurements of its own in the correction.
KNOWN_CARD, NEW_CARD = "known card", "new card"
#: What is run in each phase, in words.
PHASE_NAMES = {"train": "training", "generate": "generation"}
#: What would correct by more than a factor of two, either way, is no correction: it is held to that.
MOST = math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a target is predicted on a known card, or on a new one: corrected or not, and how far it may be off.

    `low` and `high` bound measured over predicted (whichever of the two predictions applies) at the stated coverage.
    `joined` says that too few groups were held out for these bounds to stand alone: the formula's own are joined to them.
    """

    applied: bool
    low: float
    high: float
    joined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCorrection:
    """The correction of one counter or time, its modes, and the scores that its rows gave it when they were held out.

    `modes` are told apart by phase (`train`, `generate`), then by whether the card is known.
    """

    intercept: float
    coefficients: Mapping[str, float]
    cards: Mapping[str, float]
    stacks: Mapping[str, float]
    modes: Mapping[str, Mapping[str, Mode]]
    scores: Mapping[str, Any]

    def ratio(self, features: Mapping[str, float], phase: str, gpu: str, stack: str = "") -> float:
        """Return what the formula's number is to be multiplied by; 1 where the correction is not applied."""
        if not self.mode(phase, gpu).applied:
            return 1.0
        learnt = sum(value * features[name] for name, value in self.coefficients.items())
        total = self.intercept + learnt + self.cards.get(gpu, 0.0) + self.stacks.get(stack, 0.0)
        return math.exp(min(max(total, -MOST), MOST))

    def mode(self, phase: str, gpu: str) -> Mode:
        """Return how the target is predicted in this phase on this card."""
        return self.modes[phase][KNOWN_CARD if gpu in self.cards else NEW_CARD]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one group's being held out showed: of what (in words), which group, the errors, and the mode decided on them."""

    what: str
    group: str
    errors: Mapping[str, Any]
    mode: Mode | None

    @property
    def interval(self) -> str:
        """The interval in words, as misses of what is predicted: `-0.07% to +1.8%`; `-` where none hangs on the group."""
        if self.mode is None:
            return "-"
        if self.mode.joined and self.mode.low == self.mode.high:
            return "the formula's"
        low, high = (f"{end - 1:+.{2 if abs(end - 1) < 0.01 else 1}%}" for end in (self.mode.low, self.mode.high))
        return f"{low} to {high} and the formula's" if self.mode.joined else f"{low} to {high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """All of a calibration: `version` hashes the rows and the formula, `replaces` names what it was made in place of.

    `samples` are some of the formula's numbers that it was learnt from, by measurement and target: a correction
    belongs to the formula that still gives them.
    """

    version: str
    replaces: str | None
    made_at: str
    whichlora: str
    formula: str
    rows: str
    counts: Mapping[str, int]
    coverage: float
    targets: Mapping[str, TargetCorrection]
    false_fits: Mapping[str, float]
    samples: Mapping[str, float] = field(default_factory=dict)

    def scores(self) -> Iterator[Score]:
        """Yield the held-out scores of every target: by model, by card, by source, and these by phase where it has two."""
        for target, part in self.targets.items():
            for group, card in (("model", KNOWN_CARD), ("gpu", NEW_CARD), ("source", None)):
                if group in part.scores:
                    yield from _scores(target, part, group, card)


def _scores(target: str, part: TargetCorrection, group: str, card: str | None) -> Iterator[Score]:
    name, errors = NAMES[target], part.scores[group]
    modes = {phase: None if card is None else cards[card] for phase, cards in part.modes.items()}
    for phase, mode in modes.items():
        if phase in errors.get("phases", {}):
            what = f"{name}, {PHASE_NAMES[phase]}"
            yield Score(what=what, group=group, errors=errors["phases"][phase], mode=mode)
    if not errors.get("phases"):
        yield Score(what=name, group=group, errors=errors, mode=next(iter(modes.values())))


def correction_to_json(correction: Correction) -> dict[str, Any]:
    """Return the JSON form."""
    import dataclasses

    return {"schema": SCHEMA, **dataclasses.asdict(correction)}


def correction_from_json(fields: Any) -> Correction:
    """Read what `correction_to_json` wrote, now or before there were phases. Raises BadValue for anything else."""
    todo = "Make it anew with `whichlora calibrate`."
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema not in (SCHEMA, WITHOUT_PHASES):
        raise BadValue("not a correction of this version of whichlora", value=schema, todo=todo)
    try:
        targets = {name: _target(name, part, schema) for name, part in fields["targets"].items()}
        rest = {name: value for name, value in fields.items() if name not in ("schema", "targets")}
        return Correction(targets=targets, **rest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadValue("a correction that cannot be read", value=str(error), todo=todo) from None


def _target(target: str, fields: Mapping[str, Any], schema: int) -> TargetCorrection:
    given = fields["modes"]
    if schema == WITHOUT_PHASES:
        given = dict.fromkeys(PHASES[target], given)
    modes = {phase: {card: Mode(**given[phase][card]) for card in (KNOWN_CARD, NEW_CARD)} for phase in PHASES[target]}
    numbers = [fields["intercept"]]
    numbers += (end for cards in modes.values() for mode in cards.values() for end in (mode.low, mode.high))
    for name in ("coefficients", "cards", "stacks"):
        numbers += fields[name].values()
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a coefficient is no number")
    return TargetCorrection(**{**fields, "modes": modes})


def read_correction(path: Path) -> Correction:
    """Read a correction file. Raises BadValue where there is none that can be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        todo = "Make one with `whichlora calibrate`."
        raise BadValue("cannot read the correction", value=str(path), todo=f"{error}. {todo}") from None
    return correction_from_json(fields)


@cache
def shipped_correction() -> Correction:
    """Return the correction that ships with the package: learnt from the published measurements alone."""
    text = resources.files(__package__).joinpath("data/correction.json").read_text(encoding="utf-8")
    return correction_from_json(json.loads(text))
