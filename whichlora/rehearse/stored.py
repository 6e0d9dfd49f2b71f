"""Rehearsals as measurements of the store, and back: what was rehearsed before need not be again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from whichlora_estimators.gpus import Gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Filters, Measurement, Store, local_environment, workload_id

from .records import EVIDENCE, Rehearsal

_PHASES = ("load", "forward", "backward", "optimizer", "prefill", "decode")


def measurement(rehearsal: Rehearsal, *, settings: str = "") -> Measurement:
    """Return what the store keeps of a rehearsal made now; `settings` are those that no field holds.

    The process's bytes stay out: a rehearsal does not see the CUDA context.
    """
    where = f"in {rehearsal.phase}: " if rehearsal.phase else ""
    return Measurement(
        workload=rehearsal.workload,
        environment=rehearsal.environment,
        evidence=EVIDENCE,
        device="null",
        outcome=rehearsal.outcome,
        measured_at=datetime.now(timezone.utc),
        error="" if rehearsal.outcome == "ok" else f"{where}{rehearsal.error}",
        trainable_params=rehearsal.trainable_params,
        weights_bytes=rehearsal.weights_bytes,
        model_bytes=rehearsal.model_bytes,
        allocated_peak_bytes=rehearsal.allocated_peak_bytes,
        reserved_peak_bytes=rehearsal.reserved_peak_bytes,
        managed_peak_bytes=rehearsal.managed_peak_bytes,
        phase_peaks=rehearsal.phases,
        notes=settings,
    )


def environment_here(gpu: Gpu, *, cuda_version: str) -> Environment:
    """Return this host's software and the card that the null device plays."""
    return local_environment(**card_fields(gpu), versions={"cuda": cuda_version})


def version_of_ours() -> str | None:
    """Return this whichlora's version: in another environment its own metadata are not there."""
    return local_environment(libraries=()).whichlora_version


def card_fields(gpu: Gpu) -> dict[str, Any]:
    """Return the fields of an environment that say which card it was."""
    return {
        "gpu": gpu.slug,
        "gpu_name": gpu.name,
        "gpu_total_bytes": gpu.total_bytes,
        "compute_capability": gpu.compute_capability,
    }


def remembered(
    store: Store, workloads: Sequence[Workload], gpu: Gpu, here: Environment, *, settings: str = ""
) -> dict[int, Rehearsal]:
    """Return what the store knows of these workloads on this card with these libraries and settings, by their place.

    A failure is not remembered: it is tried again. Nor is a paged optimizer whose managed bytes were not stored yet.
    """
    ids = [workload_id(workload) for workload in workloads]
    if not ids or not store.exists:
        return {}
    found = store.query(Filters(gpu=gpu.slug, evidence=EVIDENCE, workload_id=sorted(set(ids))))
    same = {each.workload_id: each for each in reversed(found) if _is_same(each, here, settings)}
    return {
        place: _rehearsal(same[known], workloads[place], gpu)
        for place, known in enumerate(ids)
        if known in same and _has_managed(same[known], workloads[place])
    }


def _has_managed(measured: Measurement, workload: Workload) -> bool:
    paged = workload.phase == "train" and workload.optimizer.startswith("paged")
    return not paged or measured.managed_peak_bytes is not None


def _is_same(measured: Measurement, here: Environment, settings: str) -> bool:
    there = measured.environment
    alike = all(
        getattr(there, name) == getattr(here, name)
        for name in ("versions", "whichlora_version", "gpu_total_bytes", "compute_capability")
    )
    return alike and measured.outcome != "failed" and measured.notes == settings


def _rehearsal(measured: Measurement, workload: Workload, gpu: Gpu) -> Rehearsal:
    where, _, error = measured.error.removeprefix("in ").partition(": ")
    return Rehearsal(
        workload=workload,
        gpu=gpu,
        outcome=measured.outcome,
        error=error,
        phase=where,
        trainable_params=measured.trainable_params,
        weights_bytes=measured.weights_bytes,
        model_bytes=measured.model_bytes,
        managed_peak_bytes=measured.managed_peak_bytes or 0,
        phases={name: measured.phase_peaks[name] for name in _PHASES if name in measured.phase_peaks},
        environment=measured.environment,
    )
