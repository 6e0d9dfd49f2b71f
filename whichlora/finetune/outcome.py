"""What a fine-tuning came to: a measurement for the store, a comparison with the prediction, a summary for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from whichlora_calibration import Interval, predict
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, PhasePeak, TimeStats

from .evaluate import Scores
from .recipe import Recipe
from .watch import Seen

#: Raw times that a measurement keeps at most, evenly taken from all.
MOST_TIMES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A peak that was seen beside what was predicted for it."""

    counter: str
    seen_bytes: int
    predicted: Interval

    @property
    def inside(self) -> bool:
        """Whether the interval holds it."""
        return self.predicted.low_bytes <= self.seen_bytes <= self.predicted.high_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: `outcome` is "ok", "stopped" (asked to; it resumes), "oom" or "failed"; the rest as far as known.

    `steps` of `total_steps` are done; `step_s` is the median of this process's steps, `train_s` its training in all.
    """

    outcome: str
    error: str = ""
    steps: int = 0
    total_steps: int = 0
    train_s: float | None = None
    step_s: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    scores: Scores | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    compared: tuple[Compared, ...] = ()
    adapter: str | None = None
    merged: str | None = None
    measurement: str | None = None


def measured_workload(recipe: Recipe, seen: Seen) -> Workload:
    """Return the workload whose peak this run showed: that of its largest batch, padded if any was."""
    if not seen.steps:
        return recipe.workload
    batch_size, width = seen.longest
    return recipe.workload.with_(batch_size=batch_size, seq_len=width, padded=not recipe.data.packing)


def make_measurement(
    recipe: Recipe,
    seen: Seen,
    *,
    on: str,
    outcome: str,
    error: str,
    environment: Environment,
    counts: Mapping[str, int],
) -> Measurement:
    """Return what the store keeps of a run that ended now, whatever its end."""
    phases = {
        name: PhasePeak(allocated_peak_bytes=allocated, reserved_peak_bytes=reserved)
        for name, (allocated, reserved) in seen.peaks.items()
        if allocated and reserved
    }
    train = seen.peaks.get("train")
    counted: dict[str, Any] = dict(counts)
    where = f"in {seen.phase}: " if seen.phase else ""
    return Measurement(
        workload=measured_workload(recipe, seen),
        environment=environment,
        evidence="rehearsed" if on == "null" else "measured",
        device=on,
        outcome="ok" if outcome in ("ok", "stopped") else outcome,
        measured_at=datetime.now(timezone.utc),
        error="" if outcome in ("ok", "stopped") else f"{where}{error}",
        phase_peaks=phases,
        allocated_peak_bytes=train[0] if train and train[0] else None,
        reserved_peak_bytes=train[1] if train and train[1] else None,
        step=_times(seen, on),
        notes=f"finetune: {len(seen.steps)} steps by Transformers' Trainer",
        **counted,
    )


def _times(seen: Seen, on: str) -> TimeStats | None:
    """Return times of the steps as large as the largest, since it is their workload that is kept."""
    times = seen.times_of_longest() if seen.steps and on != "null" else []
    every = max(1, -(-len(times) // MOST_TIMES))
    return TimeStats(samples_s=tuple(times[::every])) if times else None


def compare(recipe: Recipe, workload: Workload, seen: Seen, gpu: Gpu | None) -> tuple[Compared, ...]:
    """Compare the peaks of the steps with what is predicted for the workload that ran, on the card that it ran on."""
    train = seen.peaks.get("train")
    if gpu is None or not train or not train[0]:
        return ()
    try:
        prediction = predict(workload, gpu)
    except WhichloraError:  # no formula: nothing was promised
        return ()
    context_bytes = prediction.estimate.context_bytes
    found = []
    for counter, interval, beside in (
        ("allocated", prediction.allocated, 0),
        ("reserved", prediction.process, context_bytes),
    ):
        predicted = Interval(
            expected_bytes=interval.expected_bytes - beside,
            low_bytes=max(0, interval.low_bytes - beside),
            high_bytes=interval.high_bytes - beside,
            coverage=interval.coverage,
        )
        found.append(Compared(counter=counter, seen_bytes=train[counter == "reserved"], predicted=predicted))
    return tuple(found)


def losses(seen: Seen, on: str) -> dict[str, Any]:
    """Return the first and the last loss, and that of the last evaluation with its perplexity; nothing of the null device."""
    from .evaluate import perplexity

    if on == "null":
        return {}
    found: dict[str, Any] = {}
    if seen.losses:
        found |= {"first_loss": seen.losses[0][1], "last_loss": seen.losses[-1][1]}
    if seen.eval_losses:
        found |= {"eval_loss": seen.eval_losses[-1][1], "perplexity": perplexity(seen.eval_losses[-1][1])}
    return found
