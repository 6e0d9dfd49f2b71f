"""A plan of `whichlora pick`, run: its survivors one after the other, best first, until one keeps every limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from whichlora_estimators.gpus import Gpu
from whichlora_estimators.units import format_bytes, format_seconds

from ..plan import Candidate, Plan
from .place import Place, find_place
from .records import Verification
from .verifications import Options, check_on, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A survivor that was run: why it does not keep the plan's limits (nothing: it does), and how long it would train.

    `total_s` is the median step times the plan's number of steps; None without a time or without a data set.
    """

    candidate: Candidate
    verification: Verification
    total_s: float | None
    rejected: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanVerification:
    """What became of a plan: survivors in the order they were run; the last one is `best`, if any keeps the limits.

    `unchecked` names the limits that this place says nothing about; `spared` counts the survivors that need not be run.
    """

    place: Place
    checked: tuple[Checked, ...]
    best: Checked | None
    unchecked: tuple[str, ...]
    spared: int


def verify_plan(
    plan: Plan, *, on: str | Place = "auto", gpu: str | Gpu | None = None, options: Options | None = None
) -> PlanVerification:
    """Run a plan's survivors, the largest model first as the plan ranks them, until one keeps the limits of stage 2.

    On "null" the device plays the plan's card unless `gpu` names another. Raises what `verify` raises.
    """
    for candidate in plan.survivors:
        check_on(candidate.workload, on.device if isinstance(on, Place) else on)
    if isinstance(on, str):
        on = find_place(on, (gpu or plan.gpu) if on == "null" else gpu)
    checked: list[Checked] = []
    for each in _checks(plan, on, options or Options()):
        checked.append(each)
        if not each.rejected:
            break
    best = checked[-1] if checked and not checked[-1].rejected else None
    return PlanVerification(
        place=on,
        checked=tuple(checked),
        best=best,
        unchecked=tuple(_unchecked(plan, on)),
        spared=len(plan.survivors) - len(checked),
    )


def _checks(plan: Plan, place: Place, options: Options) -> Iterator[Checked]:
    for candidate in plan.survivors:
        (verification,) = verify([candidate.workload], on=place, options=options)
        step = verification.measurement.step
        total_s = None if step is None or candidate.steps is None else (step.median_s or 0.0) * candidate.steps
        rejected = tuple(_reasons(plan, place, verification, total_s))
        yield Checked(candidate=candidate, verification=verification, total_s=total_s, rejected=rejected)


def _reasons(plan: Plan, place: Place, verification: Verification, total_s: float | None) -> Iterator[str]:
    """Say in which ways a run did not keep the limits; those of memory are a card's."""
    if verification.outcome != "ok":
        yield f"{'out of memory' if verification.outcome == 'oom' else 'failed'} {verification.measurement.error}"
        return
    limit_bytes, needed_bytes = plan.stage2.peak_memory_bytes, _needed_bytes(verification)
    if place.device != "cpu" and limit_bytes is not None and needed_bytes is not None and needed_bytes > limit_bytes:
        yield f"takes {format_bytes(needed_bytes)}, limit {format_bytes(limit_bytes)}"
    limit_s = plan.stage2.total_time_s
    if place.device == "cuda" and limit_s is not None and total_s is not None and total_s > limit_s:
        yield f"too slow: takes {format_seconds(total_s)}, limit {format_seconds(limit_s)}"


def _needed_bytes(verification: Verification) -> int | None:
    """Return process bytes or, where NVML does not tell, the least that they can be: what PyTorch reserved."""
    return verification.process_bytes or verification.measurement.reserved_peak_bytes


def _unchecked(plan: Plan, place: Place) -> Iterator[str]:
    if plan.stage2.peak_memory_bytes is not None and place.device == "cpu":
        yield "memory (that of a card)"
    if plan.stage2.total_time_s is not None and place.device != "cuda":
        yield "time (that of a card)"
