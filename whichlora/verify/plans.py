"""A plan of `whichlora pick`, run: its survivors one after the other, best first, until one keeps every limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from whichlora_estimators.gpus import Gpu

from ..plan import Candidate, Plan
from .judged import Limits, broken, first_that_keeps, seen_in_run
from .place import Place, find_place
from .records import Verification
from .verifications import Options, Verifier, check_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration that was run: why it does not keep the plan's limits (nothing: it does), and its time.

    `time_s` is that of a generated token, or that of the whole training: the plan's, as much longer or shorter as the median
    step is. None without a time or without a data set.
    """

    candidate: Candidate
    verification: Verification
    time_s: float | None
    rejected: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanVerification:
    """What became of a plan: what was run, in its order; the last one is `best`, if any survivor keeps the limits.

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

    Before the first survivor of a model its inference is run, which has to keep those of stage 1. On "null" the device plays
    the plan's card unless `gpu` names another. Raises what `verify` raises.
    """
    check_all((each.workload for each in (*plan.survivors, *plan.serving)), on)
    if isinstance(on, str):
        on = find_place(on, (gpu or plan.gpu) if on == "null" else gpu)
    with Verifier(on, options or Options()) as verifier:
        run = _PlanRun(plan, on, verifier)
        best = first_that_keeps(plan.survivors, run.serving, run.keeps, satisfy=plan.stage1.satisfy)
    trained = sum(each.candidate.workload.phase == "train" for each in run.checked)
    return PlanVerification(
        place=on,
        checked=tuple(run.checked),
        best=None if best is None else run.checked[-1],
        unchecked=tuple(_unchecked(plan, on)),
        spared=len(plan.survivors) - trained,
    )


class _PlanRun:
    """Runs configurations of a plan and keeps what became of each."""

    def __init__(self, plan: Plan, place: Place, verifier: Verifier) -> None:
        self.plan, self.place, self.verifier = plan, place, verifier
        self.checked: list[Checked] = []

    def serving(self, model: str) -> list[Candidate]:
        """Return a model's inference to be run."""
        return [each for each in self.plan.serving if each.workload.model == model]

    def keeps(self, candidate: Candidate) -> bool:
        """Verify a configuration, and say whether it keeps its limits."""
        verification = self.verifier.verify(candidate.workload)
        seen = seen_in_run(verification)
        time_s = candidate.time_s(seen.times)
        rejected = tuple(broken(seen, self._limits(candidate), time_s))
        self.checked.append(Checked(candidate=candidate, verification=verification, time_s=time_s, rejected=rejected))
        return not rejected

    def _limits(self, candidate: Candidate) -> Limits:
        """Return what a configuration has to keep; times are a card's."""
        if candidate.workload.phase == "generate":
            memory_bytes, time_s = self.plan.stage1.peak_memory_bytes, self.plan.stage1.time_per_token_s
        else:
            memory_bytes, time_s = self.plan.stage2.peak_memory_bytes, self.plan.stage2.total_time_s
        return Limits(memory_bytes=memory_bytes, time_s=time_s if self.place.device == "cuda" else None)


def _unchecked(plan: Plan, place: Place) -> Iterator[str]:
    limits = (plan.stage1.peak_memory_bytes, plan.stage2.peak_memory_bytes)
    if place.device == "cpu" and any(limit is not None for limit in limits):
        yield "memory (that of a card)"
    limits_s = (plan.stage1.time_per_token_s, plan.stage2.total_time_s)
    if place.device != "cuda" and any(limit is not None for limit in limits_s):
        yield "time (that of a card)"
