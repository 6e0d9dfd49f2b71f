"""Corrections of the formula: what was learnt from measurements, as plain numbers that apply without any library.

A corrected number is the formula's times exp(intercept + Σ coefficient · feature + offset of the card + offset of the
stack). Offsets of a card or stack that nobody measured are 0. Where a correction did not beat the formula on held-out
measurements it is not applied, and the interval is that of the formula's own errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue

SCHEMA = 1
#: Whether the card that is predicted for has measurements of its own in the correction.
KNOWN_CARD, NEW_CARD = "known card", "new card"
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
    """The correction of one counter or time, its modes, and the scores that its rows gave it when they were held out."""

    intercept: float
    coefficients: Mapping[str, float]
    cards: Mapping[str, float]
    stacks: Mapping[str, float]
    modes: Mapping[str, Mode]
    scores: Mapping[str, Any]

    def ratio(self, features: Mapping[str, float], gpu: str, stack: str = "") -> float:
        """Return what the formula's number is to be multiplied by; 1 where the correction is not applied."""
        if not self.mode(gpu).applied:
            return 1.0
        learnt = sum(value * features[name] for name, value in self.coefficients.items())
        total = self.intercept + learnt + self.cards.get(gpu, 0.0) + self.stacks.get(stack, 0.0)
        return math.exp(min(max(total, -MOST), MOST))

    def mode(self, gpu: str) -> Mode:
        """Return how the target is predicted on this card."""
        return self.modes[KNOWN_CARD if gpu in self.cards else NEW_CARD]


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


def correction_to_json(correction: Correction) -> dict[str, Any]:
    """Return the JSON form."""
    import dataclasses

    return {"schema": SCHEMA, **dataclasses.asdict(correction)}


def correction_from_json(fields: Any) -> Correction:
    """Read what `correction_to_json` wrote. Raises BadValue for anything else."""
    todo = "Make it anew with `whichlora calibrate`."
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        found = fields.get("schema") if isinstance(fields, dict) else None
        raise BadValue("not a correction of this version of whichlora", value=found, todo=todo)
    try:
        targets = {name: _target(part) for name, part in fields["targets"].items()}
        rest = {name: value for name, value in fields.items() if name not in ("schema", "targets")}
        return Correction(targets=targets, **rest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadValue("a correction that cannot be read", value=str(error), todo=todo) from None


def _target(fields: Mapping[str, Any]) -> TargetCorrection:
    modes = {name: Mode(**mode) for name, mode in fields["modes"].items()}
    numbers = [fields["intercept"], *(value for mode in modes.values() for value in (mode.low, mode.high))]
    for name in ("coefficients", "cards", "stacks"):
        numbers += fields[name].values()
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("a coefficient is no number")
    return TargetCorrection(**{**fields, "modes": {name: modes[name] for name in (KNOWN_CARD, NEW_CARD)}})


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
