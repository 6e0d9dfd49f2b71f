"""Verifications as measurements of the store: made from what a worker saw, and found again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import (
    Filters,
    Measurement,
    PhasePeak,
    Store,
    TimeStats,
    environment_from_json,
    workload_id,
)

from ..processor import threads
from .place import Place

_LOAD = "load"
_CARD = ("gpu_name", "gpu_total_bytes", "compute_capability")
_SAME = {
    "null": ("gpu", *_CARD),
    "cuda": (*_CARD, "driver_version", "cpu_name"),
    "cpu": ("cpu_name",),
}


def _settings(place: Place) -> str:
    """Return what decides bytes or times and is in no field: how weights come, and settings that workers inherit."""
    found = [os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if os.environ.get(name)]
    if place.device == "cpu":
        return f"weights=random threads={threads()}"
    alloc_conf = f" alloc_conf={found[0]}" if found else ""
    return f"weights=random{alloc_conf}"


def measurement(workload: Workload, place: Place, answer: Mapping[str, Any]) -> Measurement:
    """Return what the store keeps of a run that ended now."""
    known = {**_counts(answer, place), **_times(answer)}
    where = f"in {answer['phase']}: " if answer.get("phase") else ""
    return Measurement(
        workload=workload,
        environment=place.described(environment_from_json(answer["environment"])),
        evidence=place.evidence,
        device=place.device,
        outcome=answer["outcome"],
        measured_at=datetime.now(timezone.utc),
        error="" if answer["outcome"] == "ok" else f"{where}{answer['error']}",
        notes=_settings(place),
        **known,
    )


def _counts(answer: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the counters by the names of their fields; of the null device not its context, which our data gave it."""
    phases = {
        name: PhasePeak(allocated_peak_bytes=allocated, reserved_peak_bytes=reserved)
        for name, (allocated, reserved) in answer.get("peaks", {}).items()
    }
    counts = {
        name: count
        for name, count in answer.get("counts", {}).items()
        if place.device != "null" or name != "process_bytes"
    }
    return {**counts, "phase_peaks": phases, **_peaks(phases)}


def _times(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: TimeStats(samples_s=tuple(samples)) for name, samples in answer.get("times", {}).items()}


def _peaks(phases: Mapping[str, PhasePeak]) -> dict[str, int]:
    """Return the peaks over the steps; loading counts only where it is all there was."""
    steps = [peak for name, peak in phases.items() if name != _LOAD] or list(phases.values())
    counters = ("allocated_peak_bytes", "reserved_peak_bytes")
    return {name: max(getattr(peak, name) for peak in steps) for name in counters} if steps else {}


def remembered(store: Store, workloads: Sequence[Workload], place: Place, *, steps: int) -> dict[int, Measurement]:
    """Return what the store holds of these workloads from the same card, kind of host and libraries, by their place.

    A failure is not remembered: it is tried again. Nor are times with fewer samples than `steps`.
    """
    ids = [workload_id(workload) for workload in workloads]
    if not ids or not store.exists:
        return {}
    asked = Filters(device=place.device, evidence=place.evidence, workload_id=sorted(set(ids)))
    same = {each.workload_id: each for each in reversed(store.query(asked)) if _is_same(each, place, steps)}
    return {number: same[known] for number, known in enumerate(ids) if known in same}


def _is_same(measured: Measurement, place: Place, steps: int) -> bool:
    names = ("versions", "whichlora_version", *_SAME[place.device])
    alike = all(getattr(measured.environment, name) == getattr(place.environment, name) for name in names)
    return alike and measured.notes == _settings(place) and measured.outcome != "failed" and _is_timed(measured, steps)


def _is_timed(measured: Measurement, steps: int) -> bool:
    if measured.device == "null" or measured.outcome == "oom":
        return True
    times = measured.step or measured.prefill
    return times is not None and len(times.samples_s) >= steps
