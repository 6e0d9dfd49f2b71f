"""Measurements as cases: what was measured, what the formula says, and what the two may be compared by.

A measurement gives a case for each counter and each time that it holds. Rehearsals give none: they are what the formula
was developed against, and tell nothing of a real card.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import find_gpu
from whichlora_profiles_db import Measurement, published_facts

from .forecasts import Forecast, Forecasts, time_features, unseen_times
from .formula_ranges import Bounds, own_bounds

MEMORY = ("allocated", "reserved", "process")
TIMES = ("step", "prefill", "decode")
TARGETS = (*MEMORY, *TIMES)
#: In which phases a target is met.
PHASES = {
    **dict.fromkeys(MEMORY, ("train", "generate")),
    "step": ("train",),
    **dict.fromkeys(("prefill", "decode"), ("generate",)),
}
#: What people call them.
NAMES = {
    **{name: f"{name} bytes" for name in MEMORY},
    "step": "training step",
    "prefill": "prefill",
    "decode": "decoded token",
}

#: Of a published measurement, what each target needs to be trusted for.
_TRUST = {**dict.fromkeys(MEMORY, "memory"), **dict.fromkeys(TIMES, "time")}

#: Of many runs of one kind, those at these quantiles are kept; one beyond this factor of their middle is odd.
KEPT = (1 / 6, 1 / 2, 5 / 6)
ODD = 1.5

#: Seconds between words of progress.
TELL_S = 3.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One number that was measured, and the formula's for it, both in bytes or seconds.

    `out_of_memory` says that `measured` is a bound from below: `card_bytes`, which did not suffice. `features` are
    what corrections may hang on, by name. Cases of one `cell`, a workload on a card, weigh as one together. `model` is
    its name without whose copy of it was used: copies are no other models. Cards of one `chip` are held out together.
    `unseen` is what the formula would say had it seen no run of this chip; None where it has seen none of this run's
    kind anyway. `own` is the formula's own interval, in logarithms of what is predicted. A case may stand for several
    `runs`.
    """

    measurement_id: str
    target: str
    phase: str
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
    runs: int = 1
    chip: str = ""
    unseen: float | None = None
    own: Bounds = (0.0, 0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chip", self.chip or self.gpu)

    def as_unseen(self) -> Case:
        """Return the case with the formula's number as it is for somebody whose chip was not fitted on."""
        if self.unseen is None:
            return self
        features = {**self.features, "log seconds": math.log10(self.unseen)}
        return replace(self, predicted=self.unseen, features=features, unseen=None)

    @property
    def log_ratio(self) -> float:
        """Return log(measured / predicted)."""
        return math.log(self.measured / self.predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A measurement that gives no case, and why."""

    measurement_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Measurements as cases, what gave none, how many runs with the hash of their ids, and those unlike their repeats."""

    cases: Sequence[Case]
    left: Sequence[Left]
    runs: int
    rows: str
    odd: Sequence[Left]


def cases_of(measurements: Iterable[Measurement], forecasts: Forecasts, *, report: Report = lambda _: None) -> Compared:
    """Return the cases of all measurements on real cards, weighted by cell, and what gave none.

    Predicts each workload once a card. Runs of one workload on one card and stack are repeats: of many, three are kept
    that show their middle and their spread. `report` is told how far that is.
    """
    kinds: dict[tuple[Any, ...], _Kind] = {}
    left: list[Left] = []
    compared: list[str] = []
    told_s = time.monotonic()
    for number, measurement in enumerate(measurements, 1):
        if time.monotonic() - told_s > TELL_S:
            report(f"{number} measurements compared with the formula")
            told_s = time.monotonic()
        if measurement.device != "cuda" or measurement.environment.gpu is None or measurement.outcome == "failed":
            continue
        id_ = forecasts.identities.measurement(measurement)
        try:
            if _compare(measurement, id_, forecasts, kinds):
                compared.append(id_)
        except WhichloraError as error:
            left.append(Left(measurement_id=id_, reason=str(error)))
    cases = [case for kind in kinds.values() for case in kind.cases()]
    odd = [each for kind in kinds.values() for each in kind.odd()]
    return Compared(
        cases=_weighted(cases), left=tuple(left), runs=len(compared), rows=hash_of(compared), odd=tuple(odd)
    )


def hash_of(texts: Iterable[str]) -> str:
    """Hash a set of texts."""
    return hashlib.sha256("\n".join(sorted(set(texts))).encode()).hexdigest()


class _Kind:
    """Runs of one workload on one card and stack, with one number of each: by their ids, and a case to copy."""

    __slots__ = ("first", "runs")

    def __init__(self, first: Case) -> None:
        self.first = first
        self.runs: list[tuple[float, str]] = []

    def cases(self) -> Iterator[Case]:
        """Yield every run of few; of many, the runs at these quantiles."""
        runs = sorted(self.runs)
        if len(runs) > len(KEPT):
            runs = [runs[int(share * len(runs))] for share in KEPT]
        for place, (value, id_) in enumerate(runs):
            count = len(self.runs) // len(runs) + (place < len(self.runs) % len(runs))
            yield replace(self.first, measurement_id=id_, measured=value, runs=count)

    def odd(self) -> Iterator[Left]:
        """Yield the runs that are far from the middle one of at least so many."""
        if len(self.runs) <= len(KEPT):
            return
        middle = sorted(self.runs)[len(self.runs) // 2][0]
        for value, id_ in self.runs:
            if not 1 / ODD <= value / middle <= ODD:
                reason = f"{self.first.target}: {value / middle:.2f} times the middle of {len(self.runs)} like runs"
                yield Left(measurement_id=id_, reason=reason)


def _compare(measurement: Measurement, id_: str, forecasts: Forecasts, kinds: dict[tuple[Any, ...], _Kind]) -> bool:
    """Add what a measurement shows to its kinds; return whether that is anything."""
    environment, out_of_memory = measurement.environment, measurement.outcome == "oom"
    assert environment.gpu is not None
    trusted, cell = _trust(measurement, forecasts)
    seen = {name: value for name in TARGETS if trusted(name) and (value := measured(measurement, name)) is not None}
    if not seen and not out_of_memory:
        return False
    forecast = forecasts.of(measurement.workload, environment.gpu, environment.versions)
    card_bytes = environment.gpu_total_bytes or forecast.total_bytes
    if out_of_memory:
        seen = {"process": float(card_bytes)}
    stack, source = stack_label(environment.versions), _source(measurement)
    for target in seen.keys() & forecast.predicted.keys():
        key = (target, cell, stack, source, out_of_memory, card_bytes, forecast.predicted[target])
        if key not in kinds:
            kinds[key] = _Kind(_case(measurement, id_, forecast, target, cell, card_bytes))
        kinds[key].runs.append((seen[target], id_))
    return True


def _case(measurement: Measurement, id_: str, forecast: Forecast, target: str, cell: str, card_bytes: int) -> Case:
    environment, workload, predicted = measurement.environment, measurement.workload, forecast.predicted[target]
    gpu = find_gpu(environment.gpu or "")
    return Case(
        measurement_id="",
        target=target,
        phase=workload.phase,
        measured=predicted,
        predicted=predicted,
        out_of_memory=measurement.outcome == "oom",
        card_bytes=card_bytes,
        features=forecast.features if target in MEMORY else time_features(workload, predicted),
        model=workload.model.rstrip("/").rpartition("/")[2].lower(),
        gpu=environment.gpu or "",
        stack=stack_label(environment.versions),
        source=_source(measurement),
        cell=cell,
        chip=f"{gpu.compute_capability} {gpu.sm_count}",
        unseen=unseen_times().get(id_, {}).get(target),
        own=own_bounds(target, workload.phase, forecast.predicted),
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


def _trust(measurement: Measurement, forecasts: Forecasts) -> tuple[Callable[[str], bool], str]:
    """Return what a measurement may judge, and its cell. What was measured here may judge everything."""
    cell = f"{forecasts.identities.workload(measurement.workload)} {measurement.environment.gpu}"
    if measurement.evidence != "published":
        return lambda target: True, cell
    facts = published_facts(measurement)
    return lambda target: _TRUST[target] in facts.trusted_for, facts.cell


def _source(measurement: Measurement) -> str:
    """Name where a measurement is from, by the first word of its citation; `measured` for runs of users."""
    return measurement.source.split()[0] if measurement.evidence == "published" else "measured"


def _weighted(cases: Sequence[Case]) -> list[Case]:
    sizes = Counter((case.target, case.cell) for case in cases)
    return [replace(case, weight=1 / sizes[case.target, case.cell]) for case in cases]
