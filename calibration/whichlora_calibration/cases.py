"""Measurements as cases: what was measured, what the formula says, and what the two may be compared by.

A measurement gives a case for each counter and each time that it holds. Rehearsals give none: they are what the formula
was developed against, and tell nothing of a real card.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import Measurement, published_facts

from .forecasts import Forecast, Forecasts, time_features

MEMORY = ("allocated", "reserved", "process")
TIMES = ("step", "prefill", "decode")
TARGETS = (*MEMORY, *TIMES)

#: Of a published measurement, what each target needs to be trusted for.
_TRUST = {**dict.fromkeys(MEMORY, "memory"), **dict.fromkeys(TIMES, "time")}

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One number that was measured, and the formula's for it, both in bytes or seconds.

    `out_of_memory` says that `measured` is a bound from below: `card_bytes`, which did not suffice. `features` are
    what corrections may hang on, by name. Cases of one `cell`, a workload on a card, weigh as one together.
    """

    measurement_id: str
    target: str
    measured: float
    predicted: float
    out_of_memory: bool
    card_bytes: int
    features: Mapping[str, float]
    model: str
    gpu: str
    stack: str
    source: str
    cell: str
    weight: float = 1.0

    @property
    def log_ratio(self) -> float:
        """Return log(measured / predicted)."""
        return math.log(self.measured / self.predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A measurement that gives no case, and why."""

    measurement_id: str
    reason: str


def cases_of(
    measurements: Iterable[Measurement], forecasts: Forecasts, *, report: Report = lambda _: None
) -> tuple[list[Case], list[Left]]:
    """Return the cases of all measurements on real cards, weighted by cell, and what gave none.

    Predicts each workload once a card; `report` is told how far that is.
    """
    cases: list[Case] = []
    left: list[Left] = []
    for number, measurement in enumerate(measurements, 1):
        if number % 100 == 0:
            report(f"{number} measurements compared with the formula")
        try:
            cases += _cases(measurement, forecasts)
        except WhichloraError as error:
            left.append(Left(measurement_id=measurement.id, reason=str(error)))
    return _weighted(cases), left


def _cases(measurement: Measurement, forecasts: Forecasts) -> Iterator[Case]:
    if measurement.device != "cuda" or measurement.environment.gpu is None or measurement.outcome == "failed":
        return
    trusted, cell = _trust(measurement)
    wanted = [target for target in TARGETS if trusted(target)]
    seen = {target: value for target in wanted if (value := measured(measurement, target)) is not None}
    out_of_memory = measurement.outcome == "oom"
    if not seen and not out_of_memory:
        return
    forecast = forecasts.of(measurement.workload, measurement.environment.gpu, measurement.environment.versions)
    if out_of_memory:
        seen = {"process": float(measurement.environment.gpu_total_bytes or forecast.total_bytes)}
    for target, value in seen.items():
        if target in forecast.predicted:
            yield _case(measurement, forecast, target, value, cell)


def _case(measurement: Measurement, forecast: Forecast, target: str, value: float, cell: str) -> Case:
    environment, predicted = measurement.environment, forecast.predicted[target]
    assert environment.gpu is not None
    return Case(
        measurement_id=measurement.id,
        target=target,
        measured=value,
        predicted=predicted,
        out_of_memory=measurement.outcome == "oom",
        card_bytes=environment.gpu_total_bytes or forecast.total_bytes,
        features=forecast.features if target in MEMORY else time_features(measurement.workload, predicted),
        model=measurement.workload.model,
        gpu=environment.gpu,
        stack=stack_label(environment.versions),
        source=_source(measurement),
        cell=cell,
    )


def measured(measurement: Measurement, target: str) -> float | None:
    """Return what a measurement shows of a target, in bytes or seconds: of times the median, else the mean."""
    if target in MEMORY:
        found = measurement.process_bytes if target == "process" else getattr(measurement, f"{target}_peak_bytes")
        return None if found is None else float(found)
    times = getattr(measurement, "decode_per_token" if target == "decode" else target)
    return None if times is None else next((s for s in (times.median_s, times.mean_s, times.min_s) if s), None)


def stack_label(versions: Mapping[str, str]) -> str:
    """Name a stack by the releases that decide what runs: `torch 2.6, transformers 4.51`; `unknown` without any."""
    named = [f"{name} {_release(versions[name])}" for name in ("torch", "transformers") if name in versions]
    return ", ".join(named) or "unknown"


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _trust(measurement: Measurement) -> tuple[Callable[[str], bool], str]:
    """Return what a measurement may judge, and its cell. What was measured here may judge everything."""
    cell = f"{measurement.workload_id} {measurement.environment.gpu}"
    if measurement.evidence != "published":
        return lambda target: True, cell
    facts = published_facts(measurement)
    return lambda target: _TRUST[target] in facts.trusted_for, facts.cell


def _source(measurement: Measurement) -> str:
    """Name where a measurement is from, by the first word of its citation; `measured` for runs of users."""
    return measurement.source.split()[0] if measurement.evidence == "published" else "measured"


def _weighted(cases: Sequence[Case]) -> list[Case]:
    from dataclasses import replace

    sizes = Counter((case.target, case.cell) for case in cases)
    return [replace(case, weight=1 / sizes[case.target, case.cell]) for case in cases]
