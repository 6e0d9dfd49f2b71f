"""What publications say, as questions to answer: a workload, a card, and bytes or seconds that somebody measured there.

They come from a table of published rows, or from the pack that ships with the package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.published_rows import (
    ALLOCATED,
    PROCESS,
    RESERVED,
    PublishedRow,
    PublishedTime,
    Row,
    Shapes,
    Unmapped,
    map_row,
    source_name,
    trusted,
)
from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement, TimeStats, published_facts

MEMORY, TIME = "memory", "time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A published figure: `metric` names the counter, or what the time is of; `measured` is in bytes or seconds."""

    source: str
    gpu: Gpu
    workload: Workload
    cell: str
    completeness: str
    run: str
    versions: tuple[tuple[str, str], ...]
    metric: str
    measured: float
    time: PublishedTime | None = None


Reasons = Counter[tuple[str, str]]


def of_table(rows: Iterable[Row], kind: str, shapes: Shapes | None = None) -> tuple[list[Question], Reasons]:
    """Return the questions of a table's rows that are trusted for `kind`, and the reasons why others are none.

    `kind` is memory, time, memory_relative or feasibility; the latter ask for process bytes, none being measured.
    """
    found, reasons = [], Reasons()
    for row in rows:
        if f"{MEMORY if kind.startswith(MEMORY) else kind}_nonHF" in row["trusted_for"].split():
            reasons[source_name(row["source"]), "other software than Transformers"] += 1
        if not trusted(row, kind):
            continue
        try:
            mapped = map_row(row, shapes)
            found.append(_time_question(mapped) if kind == TIME else _memory_question(mapped, kind))
        except Unmapped as reason:
            reasons[source_name(row["source"]), str(reason)] += 1
    return found, reasons


def _memory_question(mapped: PublishedRow, kind: str) -> Question:
    if kind == "feasibility":
        return _question(mapped, PROCESS, 0.0)
    if mapped.counter is None or mapped.measured_bytes is None:
        raise Unmapped(f"memory metric {mapped.row['mem_metric']!r} is none of PyTorch's counters")
    return _question(mapped, mapped.counter, mapped.measured_bytes)


def _time_question(mapped: PublishedRow) -> Question:
    if mapped.time is None:
        raise Unmapped(f"no time of a step or a token: {mapped.row['time_metric'] or 'none given'}")
    return _question(mapped, kind_of_time(mapped.time), mapped.time.seconds, mapped.time)


def _question(mapped: PublishedRow, metric: str, measured: float, time: PublishedTime | None = None) -> Question:
    return Question(
        source=mapped.source,
        gpu=mapped.gpu,
        workload=mapped.workload,
        cell=mapped.cell,
        completeness=mapped.row["completeness"],
        run=mapped.row["run_id"],
        versions=tuple(mapped.environment.versions.items()),
        metric=metric,
        measured=measured,
        time=time,
    )


def kind_of_time(time: PublishedTime) -> str:
    """Name what a time is of."""
    if time.decoded_tokens:
        return "generation" if time.prefills else "decoded token"
    return "prefill" if time.prefills else "step"


def of_pack(measurements: Iterable[Measurement], kind: str) -> list[Question]:
    """Return the questions of published measurements that are trusted for `kind`."""
    found: list[Question] = []
    for one in measurements:
        if kind in published_facts(one).trusted_for and one.environment.gpu:
            gpu = find_gpu(one.environment.gpu)
            found += _times(one, gpu) if kind == TIME else _bytes(one, gpu, kind)
    return found


def _bytes(one: Measurement, gpu: Gpu, kind: str) -> Iterator[Question]:
    if kind == "feasibility":
        yield _of_measurement(one, gpu, PROCESS, 0.0)
        return
    for counter in (ALLOCATED, RESERVED):
        if (measured := getattr(one, counter)) is not None:
            yield _of_measurement(one, gpu, counter, measured)


def _times(one: Measurement, gpu: Gpu) -> Iterator[Question]:
    """Ask for the step, or for a decoded token, or for the prefill of a run that did not decode."""
    if one.step is not None:
        accumulated = getattr(one.workload, "accumulation", 1)
        seconds = _mean(one.step)
        time = PublishedTime(seconds=seconds, micro_steps=accumulated, optimizer_steps=1)
        yield _of_measurement(one, gpu, "step", seconds, time)
    elif one.decode_per_token is not None:
        seconds = _mean(one.decode_per_token)
        time = PublishedTime(seconds=seconds, decoded_tokens=1)
        yield _of_measurement(one, gpu, "decoded token", seconds, time)
    elif one.prefill is not None:
        seconds = _mean(one.prefill)
        yield _of_measurement(one, gpu, "prefill", seconds, PublishedTime(seconds=seconds, prefills=1))


def _mean(times: TimeStats) -> float:
    assert times.mean_s is not None  # all that publications give
    return times.mean_s


def _of_measurement(
    one: Measurement, gpu: Gpu, metric: str, measured: float, time: PublishedTime | None = None
) -> Question:
    known = published_facts(one)
    return Question(
        source=source_name(one.source),
        gpu=gpu,
        workload=one.workload,
        cell=known.cell,
        completeness=known.completeness,
        run=one.id[:12],
        versions=tuple(one.environment.versions.items()),
        metric=metric,
        measured=measured,
        time=time,
    )


def merged(reasons: Sequence[Reasons]) -> Reasons:
    """Add reasons up."""
    return sum(reasons, Reasons())
