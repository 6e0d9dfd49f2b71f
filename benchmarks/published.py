"""Compare estimates with published measurements: error by source, card, method and phase.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.published --csv FILE --what memory|time [--json]
        [--fit none|other-cards|same-card|all] [--shapes FILE] [--rows]

FILE is a table of published rows (`benchmarks/published_rows.py` says of what form). Rows of one cell, that is of one
workload on several dates or versions, together weigh as one. `--fit` says which published rows may inform a prediction:

- none: no published row at all. Memory is the bare formula. Time takes constants fitted on single operators alone.
- other-cards: published rows of other chips (leave one card out).
- same-card: these, and the card's own other workloads (leave one workload out): the prediction is multiplied by the
  median of measured over predicted of that card's and source's other workloads.
- all: every row, its own included: what the shipped constants give, times that median of all of the card's workloads.

Memory's formula is fitted on no published row, so that for it the first two are the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published_memory import predicted_bytes
from benchmarks.published_rows import PROCESS, PublishedRow, Row, Shapes, Unmapped, map_row, source_name, trusted
from benchmarks.published_times import predicted_seconds
from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import workload_id

FITS = ("none", "other-cards", "same-card", "all")
KEYS = ("source", "gpu", "method", "phase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A published row beside its prediction, both in bytes or both in seconds; `weight` is one over its cell's rows."""

    row: PublishedRow
    measured: float
    predicted: float
    weight: float = 1.0

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    @property
    def group(self) -> dict[str, str]:
        """Return what errors are grouped by."""
        workload = self.row.workload
        method = workload.method if workload.phase == "train" else "-"
        if workload.quantization != "none":
            method = f"{method} {workload.quantization}"
        return {"source": self.row.source, "gpu": self.row.gpu.slug, "method": method, "phase": workload.phase}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a table says of one question: compared rows, and the others with the reason."""

    what: str
    fit: str
    rows: int
    compared: tuple[Compared, ...]
    unmapped: Mapping[tuple[str, str], int]


def main() -> int:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="table of published rows")
    parser.add_argument("--what", choices=("memory", "time"), required=True)
    parser.add_argument("--fit", choices=FITS, default="none", help="published rows that may inform a prediction")
    parser.add_argument("--shapes", type=Path, help="JSON with configs of models that are not known")
    parser.add_argument("--rows", action="store_true", help="print every row as well")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    arguments = parser.parse_args()
    try:
        rows = read_table(arguments.csv)
        shapes = json.loads(arguments.shapes.read_text(encoding="utf-8")) if arguments.shapes else None
        found = compare(rows, arguments.what, arguments.fit, shapes)
        more = {"relative": relative(rows, shapes), "feasibility": feasibility(rows, shapes)}
    except (WhichloraError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    more = more if arguments.what == "memory" else {}
    print(json.dumps(answer(found) | more, indent=1) if arguments.json else report(found, rows=arguments.rows))
    return 0


def read_table(path: Path) -> list[Row]:
    """Read a table of published rows. Raises ValueError for one of another form."""
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    missing = {"run_id", "cell", "source", "trusted_for", "completeness"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} is no table of published rows: it lacks {', '.join(sorted(missing))}")
    return rows


# Comparing -------------------------------------------------------------------------------------------------------------


def compare(rows: Sequence[Row], what: str, fit: str = "none", shapes: Shapes | None = None) -> Comparison:
    """Predict the rows that may judge `what` and that a workload can be made of."""
    asked = [row for row in rows if trusted(row, what)]
    unmapped: Counter[tuple[str, str]] = Counter()
    compared = []
    for row in asked:
        try:
            compared.append(_compared(map_row(row, shapes), what, fit))
        except (Unmapped, WhichloraError) as error:
            unmapped[source_name(row), str(error)] += 1
    untrusted = Counter((source_name(r), f"trusted for {r['trusted_for']} only") for r in rows if _other_kind(r, what))
    weighed = _weighed(compared)
    if fit in ("same-card", "all"):
        weighed = [_informed(one, weighed, itself=fit == "all") for one in weighed]
    found = unmapped + untrusted
    return Comparison(what=what, fit=fit, rows=len(asked), compared=tuple(weighed), unmapped=found)


def _other_kind(row: Row, what: str) -> bool:
    """Whether a row may judge this question for other software than Transformers only."""
    return f"{what}_nonHF" in row["trusted_for"].split()


def _compared(row: PublishedRow, what: str, fit: str) -> Compared:
    if what == "time":
        if row.time is None:
            raise Unmapped(f"no time of a step or a token: {row.row['time_metric'] or 'none given'}")
        return Compared(row=row, measured=row.time.seconds, predicted=predicted_seconds(row, fit))
    if row.counter is None or row.measured_bytes is None:
        raise Unmapped(f"memory metric {row.row['mem_metric']!r} is none of PyTorch's counters")
    return Compared(row=row, measured=row.measured_bytes, predicted=predicted_bytes(row, row.counter))


def _weighed(compared: Sequence[Compared]) -> list[Compared]:
    sizes = Counter(one.row.cell for one in compared)
    return [
        Compared(row=one.row, measured=one.measured, predicted=one.predicted, weight=1 / sizes[one.row.cell])
        for one in compared
    ]


def _informed(one: Compared, others: Sequence[Compared], *, itself: bool) -> Compared:
    """Multiply by the median of measured over predicted of the card's other workloads in the same source and phase."""
    alike = [
        (other.measured / other.predicted, other.weight)
        for other in others
        if _kind(other) == _kind(one) and (itself or not _same_workload(other, one))
    ]
    factor = weighted_quantile(alike, 0.5) if alike else 1.0
    return Compared(row=one.row, measured=one.measured, predicted=one.predicted * factor, weight=one.weight)


def _kind(one: Compared) -> tuple[object, ...]:
    return one.row.source, one.row.gpu.slug, one.row.workload.phase, one.row.counter == PROCESS


def _same_workload(one: Compared, other: Compared) -> bool:
    """Whether two rows are of one workload, whatever its versions."""
    return one.row.cell == other.row.cell or _bare_id(one.row) == _bare_id(other.row)


def _bare_id(row: PublishedRow) -> str:
    workload = row.workload
    return workload_id(workload.with_(versions={}) if getattr(workload, "versions", None) else workload)


def relative(rows: Iterable[Row], shapes: Shapes | None = None) -> list[dict[str, Any]]:
    """Compare methods with each other where absolute bytes rest on a length that was fitted: ratios to plain LoRA.

    A method's bytes over those of LoRA at rank 32 of the same versions, as published and as predicted.
    """
    groups: dict[tuple[str, str], list[PublishedRow]] = defaultdict(list)
    for row in rows:
        if not trusted(row, "memory_relative"):
            continue
        try:
            one = map_row(row, shapes)
        except Unmapped:
            continue
        groups[one.gpu.slug, row["software"]].append(one)
    return [each for group in groups.values() for each in _ratios(group)]


def _ratios(group: Sequence[PublishedRow]) -> list[dict[str, Any]]:
    base = next((one for one in group if one.workload.method == "lora" and one.workload.rank == 32), None)
    found = []
    for one in group:
        if base is None or one is base or not (one.counter and one.measured_bytes and base.measured_bytes):
            continue
        try:
            predicted = predicted_bytes(one, one.counter) / predicted_bytes(base, one.counter)
        except WhichloraError:
            continue
        measured = one.measured_bytes / base.measured_bytes
        line = {"source": one.source, "gpu": one.gpu.slug, "method": one.workload.method, "cell": one.cell}
        found.append(line | {"measured": measured, "predicted": predicted, "error": predicted / measured - 1})
    return found


def feasibility(rows: Iterable[Row], shapes: Shapes | None = None) -> dict[str, int]:
    """Count the runs presumed out of memory whose predicted process bytes exceed the card."""
    counts = Counter(rows=0, mapped=0, predicted_not_to_fit=0)
    for row in rows:
        if not trusted(row, "feasibility"):
            continue
        counts["rows"] += 1
        try:
            one = map_row(row, shapes)
            needed = predicted_bytes(one, PROCESS)
        except (Unmapped, WhichloraError):
            continue
        counts["mapped"] += 1
        counts["predicted_not_to_fit"] += needed > one.gpu.total_bytes
    return dict(counts)


# Telling ---------------------------------------------------------------------------------------------------------------


def weighted_quantile(values: Iterable[tuple[float, float]], share: float) -> float:
    """Return the smallest of (value, weight) pairs up to which `share` of the weight lies."""
    ordered = sorted(values)
    total = sum(weight for _, weight in ordered)
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= share * total * (1 - 1e-12):
            return value
    raise ValueError("no values")


def errors(compared: Sequence[Compared]) -> dict[str, Any]:
    """Sum up the absolute errors of rows, each weighed within its cell."""
    pairs = [(abs(one.error), one.weight) for one in compared]
    none = {"median_abs_error": None, "p95_abs_error": None, "worst_abs_error": None, "median_error": None}
    if not pairs:
        return {"mapped": 0, "cells": 0, **none}
    return {
        "mapped": len(pairs),
        "cells": len({one.row.cell for one in compared}),
        "median_abs_error": weighted_quantile(pairs, 0.5),
        "p95_abs_error": weighted_quantile(pairs, 0.95),
        "worst_abs_error": max(pairs)[0],
        "median_error": weighted_quantile([(one.error, one.weight) for one in compared], 0.5),
    }


def grouped(
    compared: Sequence[Compared], key: Callable[[Compared], Mapping[str, str]]
) -> list[tuple[dict[str, str], list[Compared]]]:
    """Return the groups in order of their keys."""
    groups: dict[tuple[tuple[str, str], ...], list[Compared]] = defaultdict(list)
    for one in compared:
        groups[tuple(key(one).items())].append(one)
    return [(dict(name), group) for name, group in sorted(groups.items())]


def answer(found: Comparison) -> dict[str, Any]:
    """Return what `--json` prints."""
    classes = grouped(found.compared, lambda one: {"completeness": one.row.row["completeness"]})
    metrics = grouped(found.compared, lambda one: {"metric": metric_of(one)})
    return {
        "schema": 1,
        "what": found.what,
        "fit": found.fit,
        "overall": {"rows": found.rows, **errors(found.compared)},
        "by": [name | errors(group) for name, group in grouped(found.compared, lambda one: one.group)],
        "by_completeness": [name | errors(group) for name, group in classes],
        "by_metric": [name | errors(group) for name, group in metrics],
        "not_mapped": [
            {"source": source, "reason": reason, "rows": count}
            for (source, reason), count in sorted(found.unmapped.items())
        ],
    }


def metric_of(one: Compared) -> str:
    """Name what was measured: the counter, or what the time is of."""
    if one.row.time is None or one.measured != one.row.time.seconds:
        return str(one.row.counter)
    return "step" if one.row.workload.phase == "train" else "decode" if one.row.time.decoded_tokens else "prefill"


def report(found: Comparison, *, rows: bool = False) -> str:
    """Lay the comparison out as text."""
    known = answer(found)
    lines = [f"{found.what}, informed by {found.fit}: {found.rows} rows, {len(found.compared)} of them mapped"]
    lines.append(f"{'':62}rows cells   median      p95    worst     bias")
    lines.append(_line("overall", known["overall"]))
    for each in known["by"]:
        lines.append(_line(" ".join(each[key] for key in KEYS), each))
    lines += [_line(each["metric"], each) for each in known["by_metric"]]
    if rows:
        for one in sorted(found.compared, key=lambda one: -abs(one.error)):
            measured = f"{one.measured:.6g} measured, {one.predicted:.6g} predicted"
            lines.append(f"{100 * one.error:+7.2f}%  {measured}  {one.row.row['run_id']} {one.row.row['mem_metric']}")
    for each in known["not_mapped"]:
        lines.append(f"not mapped, {each['rows']} rows of {each['source']}: {each['reason'][:160]}")
    return "\n".join(lines)


def _line(name: str, summed: Mapping[str, Any]) -> str:
    figures = [summed[f"{key}_error"] for key in ("median_abs", "p95_abs", "worst_abs", "median")]
    shown = " ".join("       -" if value is None else f"{100 * value:7.2f}%" for value in figures)
    return f"{name[:60]:62}{summed['mapped']:4} {summed['cells']:5} {shown}"


if __name__ == "__main__":
    sys.exit(main())
