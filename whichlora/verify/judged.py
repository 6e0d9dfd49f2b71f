"""A run against limits: what was seen of a configuration, which limits it does not keep, and the first that keeps them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from whichlora_calibration import TimeSpan
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import TimeStats

from ..rehearse import Rehearsal
from .records import Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a configuration has to keep; None: as much as it likes."""

    memory_bytes: int | None
    time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a rehearsal or a run showed: None, or no time, where it did not say.

    `process_bytes` are the least that they can be where nobody tells them; `times` has `step`, or `prefill` and `decode`.
    """

    evidence: str
    outcome: str
    error: str
    allocated_peak_bytes: int | None
    process_bytes: int | None
    times: Mapping[str, TimeSpan] = field(default_factory=dict)


def seen_in_rehearsal(found: Rehearsal) -> Seen:
    """Return what a rehearsal showed: no times."""
    return Seen(
        evidence="rehearsed",
        outcome=found.outcome,
        error=f"in {found.phase}: {found.error}" if found.phase else found.error,
        allocated_peak_bytes=found.allocated_peak_bytes,
        process_bytes=found.process_bytes,
    )


def seen_in_run(found: Verification) -> Seen:
    """Return what a verification showed: memory of a card, real or not, and times where something was computed."""
    measured, host = found.measurement, found.device == "cpu"
    stats = {"step": measured.step, "prefill": measured.prefill, "decode": measured.decode_per_token}
    typical = {"step": "step_s", "prefill": "prefill_s", "decode": "decode_s_per_token"}
    return Seen(
        evidence=measured.evidence,
        outcome=found.outcome,
        error=measured.error,
        allocated_peak_bytes=None if host else measured.allocated_peak_bytes,
        process_bytes=None if host else found.process_bytes or measured.reserved_peak_bytes,
        times={name: _span(each, found.typical_s[typical[name]]) for name, each in stats.items() if each is not None},
    )


def _span(stats: TimeStats, typical_s: float) -> TimeSpan:
    """Return the span that all timed steps kept."""
    low_s, high_s = min(stats.samples_s, default=typical_s), max(stats.samples_s, default=typical_s)
    return TimeSpan(
        expected_s=typical_s,
        low_s=min(low_s, typical_s),
        high_s=max(high_s, typical_s),
        coverage=1.0,
        evidence="measured",
    )


def broken(seen: Seen, limits: Limits, time_s: float | None) -> Iterator[str]:
    """Say which limits a run did not keep; `time_s` is that of a token or of a whole training, by what was seen."""
    if seen.outcome != "ok":
        yield f"{seen.evidence}: {'out of memory' if seen.outcome == 'oom' else 'failed'} {seen.error}".strip()
        return
    if limits.memory_bytes is not None and seen.process_bytes is not None and seen.process_bytes > limits.memory_bytes:
        yield f"{seen.evidence}: takes {format_bytes(seen.process_bytes)}, limit {format_bytes(limits.memory_bytes)}"
    if limits.time_s is not None and time_s is not None and time_s > limits.time_s:
        yield f"{seen.evidence}: too slow: takes {format_seconds(time_s)}, limit {format_seconds(limits.time_s)}"


class _Configuration(Protocol):
    @property
    def workload(self) -> Workload: ...


T = TypeVar("T", bound=_Configuration)


def first_that_keeps(
    training: Iterable[T], serving: Callable[[str], Sequence[T]], keeps: Callable[[T], bool], *, satisfy: str
) -> T | None:
    """Return the first training configuration that keeps its limits, on a model that serves within its own.

    `serving` are a model's configurations for inference: `any` or `all` of them must keep theirs. They are run before the
    model's first training, and nothing is run in vain. None is a model that there is nothing to serve of.
    """
    enough = all if satisfy == "all" else any
    serves: dict[str, bool] = {}
    for each in training:
        model = each.workload.model
        if model not in serves:
            asked = serving(model)
            serves[model] = not asked or enough(map(keeps, asked))
        if serves[model] and keeps(each):
            return each
    return None
