"""A choice that has run: survivors of a search, best first, are rehearsed, then verified on the card if it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from whichlora_calibration import Verdict, predict
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import Measurement, Store

from .pick import PickResult, Row, choose, memory_limit, total_s
from .policy import by_policy

#: Rows that are tried before the search's own order is trusted again.
MOST_TRIED = 8

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a rehearsal or a run showed of a row: None where it did not say."""

    evidence: str
    outcome: str
    error: str
    allocated_peak_bytes: int | None
    process_bytes: int | None
    step_s: float | None = None


def check(
    result: PickResult, *, on: str | None = None, store: Store | None = None, report: Report = lambda _: None
) -> PickResult:
    """Return the search with its choice rehearsed; with `on` ("auto", "cuda", "null" …) verified there as well.

    Rows are tried best first, those that straddle a limit included, until one keeps every limit with the bytes (and the
    time, on a card) that were seen; what was seen replaces what was predicted, in the row and in its evidence.
    Raises WhichloraError where the training stack or the card is missing.
    """
    config, rows = result.config, list(result.stage2)
    places = {id(row): place for place, row in enumerate(rows)}
    candidates = by_policy(config, [row for row in rows if not row.rejected or row.undecided])
    for row in candidates[:MOST_TRIED]:
        seen = row
        for look in _looks(result, on, store):
            report(f"{row.model} {row.method}, batch {row.workload.batch_size}: to be {look.__name__}")
            seen = _with(result, seen, look(seen))
            if seen.rejected:
                report(f"  {'; '.join(seen.rejected)}")
                break
        rows[places[id(row)]] = seen
        if not seen.rejected:
            prediction = predict(row.workload, config.gpu, stack=config.stack, correction=config.correction)
            return replace(result, stage2=tuple(rows), choice=seen, prediction=prediction)
    tried = {id(row) for row in candidates[:MOST_TRIED]}
    left = [row for row in result.stage2 if id(row) not in tried]
    report(f"none of the first {min(MOST_TRIED, len(candidates))} kept the limits; the choice is by formula again")
    choice, found = choose(config, left)
    return replace(result, stage2=tuple(rows), choice=choice, prediction=found)


def _looks(result: PickResult, on: str | None, store: Store | None) -> Iterator[Callable[[Row], _Seen]]:
    def rehearsed(row: Row) -> _Seen:
        from .rehearse import rehearse

        (found,) = rehearse([row.workload], result.config.gpu, jobs=1, store=store)
        return _Seen(
            evidence="rehearsed",
            outcome=found.outcome,
            error=found.error,
            allocated_peak_bytes=found.allocated_peak_bytes,
            process_bytes=found.process_bytes,
        )

    def verified(row: Row) -> _Seen:
        from .verify import Options, verify

        assert on is not None
        (found,) = verify([row.workload], on=on, gpu=result.config.gpu, options=Options(store=store))
        return _measured(found.measurement)

    yield rehearsed
    if on is not None:
        yield verified


def _measured(found: Measurement) -> _Seen:
    return _Seen(
        evidence=found.evidence,
        outcome=found.outcome,
        error=found.error,
        allocated_peak_bytes=found.allocated_peak_bytes,
        process_bytes=found.process_bytes,
        step_s=None if found.step is None else found.step.median_s,
    )


def _with(result: PickResult, row: Row, seen: _Seen) -> Row:
    """Put what was seen into a row, and judge it by that."""
    config = result.config
    if seen.outcome != "ok":
        what = "out of memory" if seen.outcome == "oom" else f"failed: {seen.error}"
        return replace(
            row, verdict=Verdict.DOES_NOT_FIT, rejected=(f"{seen.evidence}: {what}",), evidence=seen.evidence
        )
    step_s = seen.step_s or row.step_s
    time_s = row.time_s if step_s is None else total_s(config, row.workload, step_s)
    process = row.process_bytes if seen.process_bytes is None else (seen.process_bytes, seen.process_bytes)
    limit_bytes, limit_s = memory_limit(config, "train"), config.stage2.total_time_s
    reasons = []
    if process is not None and process[1] > limit_bytes:
        reasons.append(f"{seen.evidence}: {format_bytes(process[1])} of {format_bytes(limit_bytes)}")
    if time_s is not None and limit_s is not None and time_s > limit_s:
        reasons.append(f"{seen.evidence}: takes {format_seconds(time_s)}, limit {format_seconds(limit_s)}")
    return replace(
        row,
        allocated_peak_bytes=seen.allocated_peak_bytes or row.allocated_peak_bytes,
        process_bytes=process,
        step_s=step_s,
        time_s=time_s,
        verdict=Verdict.DOES_NOT_FIT if reasons else Verdict.FITS,
        rejected=tuple(reasons),
        evidence=seen.evidence,
    )
