"""A machine's processor: an entry fitted to what `verify --on cpu` measured on it, and the times that it predicts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from whichlora_calibration import TimeSpan
from whichlora_estimators.errors import BadValue
from whichlora_estimators.host_entry import FEWEST, HostEntry, Work, fit_host, work_of
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Filters, Measurement, Store, TimeStats, local_environment

#: What share of the times of models that were left out lay between the bounds.
COVERAGE = 0.9
_TODO = f"Measure {FEWEST} times each of two small models: whichlora verify --on cpu MODEL… --precision PRECISION."


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """An entry of a processor, and between which multiples of its times those of models lay that it had not seen.

    `models` and `times` count what it was fitted on.
    """

    entry: HostEntry
    low: float
    high: float
    models: int
    times: int

    def predict(self, workload: Workload) -> dict[str, TimeSpan]:
        """Return the least times of a workload here, by the names of `Times`. Raises as `estimate` does."""
        return {
            name: TimeSpan(
                expected_s=seconds,
                low_s=seconds * self.low,
                high_s=seconds * self.high,
                coverage=COVERAGE,
                evidence="corrected",
            )
            for name, done in work_of(workload).items()
            for seconds in [self.entry.seconds(done)]
        }


def threads() -> str:
    """Say on how many threads PyTorch computes here: what decides times beside the processor."""
    return os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())


def processor_here(store: Store, precision: str) -> Processor:
    """Fit an entry to what a store holds from this processor, with as many threads, in a precision.

    Raises BadValue where that is too little.
    """
    return calibrated(measured_here(store, precision))


def measured_here(store: Store, precision: str) -> list[Measurement]:
    """Return the newest measurement of every workload that ran to its end on this processor."""
    if not store.exists:
        return []
    name, setting = local_environment(libraries=()).cpu_name, f"threads={threads()}"
    asked = Filters(device="cpu", evidence="measured", outcome="ok", precision=precision)
    same = (m for m in store.query(asked) if m.environment.cpu_name == name and setting in m.notes.split())
    return list({each.workload_id: each for each in sorted(same, key=_when)}.values())


def _when(measured: Measurement) -> float:
    return measured.measured_at.timestamp() if measured.measured_at else 0.0


def calibrated(measured: Iterable[Measurement]) -> Processor:
    """Fit an entry to measurements of one processor.

    Raises BadValue where no model can be left out, since it then would not show how far the entry is to be trusted.
    """
    by_model: dict[str, list[tuple[Work, float]]] = {}
    for each in measured:
        by_model.setdefault(each.workload.model, []).extend(least_times(each))
    rows = [row for own in by_model.values() for row in own]
    ratios = list(_left_out(by_model))
    if not ratios:
        what = f"{len(rows)} times of {len(by_model)} models"
        raise BadValue("too few times of this processor are known", value=what, todo=_TODO)
    low, high = _bounds(ratios)
    return Processor(entry=fit_host(rows), low=low, high=high, models=len(by_model), times=len(rows))


def least_times(measured: Measurement) -> Iterator[tuple[Work, float]]:
    """Yield the work and the least seconds of each of a measurement's times: whatever else ran only added to them."""
    known: dict[str, TimeStats | None] = {
        "step_s": measured.step,
        "prefill_s": measured.prefill,
        "decode_s_per_token": measured.decode_per_token,
    }
    for name, done in work_of(measured.workload).items():
        stats = known[name]
        if stats is not None and stats.min_s:
            yield done, stats.min_s


def _left_out(by_model: dict[str, list[tuple[Work, float]]]) -> Iterator[float]:
    """Yield measured over predicted times of each model, by an entry fitted on the others."""
    for model, own in by_model.items():
        others = [row for name, rows in by_model.items() if name != model for row in rows]
        if len(others) >= FEWEST:
            entry = fit_host(others)
            yield from (seconds / entry.seconds(done) for done, seconds in own)


def _bounds(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the outermost ratios but for as many at each end as may lie outside."""
    ranked = sorted(ratios)
    outside = math.floor((1 - COVERAGE) / 2 * (len(ranked) + 1))
    return ranked[outside], ranked[-1 - outside]
