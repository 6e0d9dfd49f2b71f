"""Which measurements: conditions that a query puts on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeAlias

from whichlora_estimators.errors import BadValue
from whichlora_estimators.workload import PHASES, PRECISIONS, TASKS

from .checks import check_choice, utc
from .measurement import DEVICES, EVIDENCES, OUTCOMES

Names: TypeAlias = str | Sequence[str] | None

_CHOICES = {
    "evidence": EVIDENCES,
    "device": DEVICES,
    "outcome": OUTCOMES,
    "phase": PHASES,
    "task": TASKS,
    "precision": PRECISIONS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Conditions that all hold; None means any.

    A name is compared without case, and one with `*` or `?` is a pattern; several names mean any of them. `gpu` is the
    slug of our GPU data. `since` is included and `until` is not; both need a time zone, and leave out what has no
    date. Raises BadValue or UnknownName.
    """

    gpu: Names = None
    model: Names = None
    method: Names = None
    evidence: Names = None
    outcome: Names = None
    device: Names = None
    phase: Names = None
    task: Names = None
    precision: Names = None
    quantization: Names = None
    source: Names = None
    workload_id: Names = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            for value in listed(name, getattr(self, name)):
                if name in _CHOICES:
                    check_choice(name, value.lower(), _CHOICES[name])
        for name in ("since", "until"):
            if (moment := getattr(self, name)) is not None:
                object.__setattr__(self, name, utc(name, moment))


NAMES = tuple(field.name for field in dataclasses.fields(Filters) if field.name not in ("since", "until"))


def where(filters: Filters | None) -> tuple[str, list[Any]]:
    """Return an SQL condition on table measurement, and the values of its parameters in order."""
    conditions, values = ["true"], []
    for name in NAMES if filters else ():
        chosen = listed(name, getattr(filters, name))
        if chosen:
            conditions.append(" OR ".join(_matches(name, value) for value in chosen))
            values += [value.lower() for value in chosen]
        elif getattr(filters, name) is not None:
            conditions.append("false")
    for name, comparison in (("since", "measured_at >= ?"), ("until", "measured_at < ?")):
        if filters and (moment := getattr(filters, name)) is not None:
            conditions.append(comparison)
            values.append(moment.astimezone(timezone.utc).replace(tzinfo=None))
    return " AND ".join(f"({condition})" for condition in conditions), values


def listed(name: str, chosen: object) -> tuple[str, ...]:
    """Return the names that a filter allows. Raises BadValue."""
    values = () if chosen is None else (chosen,) if isinstance(chosen, str) else chosen
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise BadValue(f"{name} must be a name or several", value=chosen, todo="Give text or a list of texts.")
    return tuple(values)


def _matches(column: str, value: str) -> str:
    comparison = "GLOB" if "*" in value or "?" in value else "="
    return f'lower("{column}") {comparison} ?'
