"""Compare estimates with published measurements: error by source, card, method and phase.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.published --what memory|time [--csv FILE]
        [--fit none|other-cards|same-card|all] [--shapes FILE] [--rows] [--json]

FILE is a table of published rows (`benchmarks/published_rows.py` says of what form); without one, the pack is taken that
ships with the package. Rows of one cell, that is of one
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
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.published_memory import predicted_bytes
from benchmarks.published_questions import Question, Reasons, of_pack, of_table
from benchmarks.published_rows import Unmapped
from benchmarks.published_table import read_shapes, read_table
from benchmarks.published_times import constants, predicted_seconds
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import published, workload_id

FITS = ("none", "other-cards", "same-card", "all")
KEYS = ("source", "gpu", "method", "phase")
#: What a method's bytes are compared with where lengths were fitted: LoRA of this rank, under the same versions.
BASE_RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A published figure beside its prediction, both in bytes or both in seconds; `weight` is one over its cell's."""

    asked: Question
    predicted: float
    weight: float = 1.0

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.asked.measured - 1

    @property
    def group(self) -> dict[str, str]:
        """Return what errors are grouped by."""
        workload = self.asked.workload
        method = workload.method if workload.phase == "train" else "-"
        if workload.quantization != "none":
            method = f"{method} {workload.quantization}"
        return {"source": self.asked.source, "gpu": self.asked.gpu.slug, "method": method, "phase": workload.phase}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that is said of one question: compared figures, and the others with the reason."""

    what: str
    fit: str
    rows: int
    compared: tuple[Compared, ...]
    unmapped: Mapping[tuple[str, str], int]


Ask = Callable[[str], tuple[list[Question], Reasons]]


def main() -> int:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="table of published rows (default: the shipped pack)")
    parser.add_argument("--what", choices=("memory", "time"), required=True)
    parser.add_argument("--fit", choices=FITS, default="none", help="published rows that may inform a prediction")
    parser.add_argument("--shapes", type=Path, help="JSON with configs of models that are not known")
    parser.add_argument("--rows", action="store_true", help="print every row as well")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    arguments = parser.parse_args()
    try:
        ask = asking(arguments.csv, arguments.shapes)
        found = compare(ask, arguments.what, arguments.fit)
        more = {"relative": relative(ask), "feasibility": feasibility(ask)} if arguments.what == "memory" else {}
    except (WhichloraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer(found) | more, indent=1) if arguments.json else report(found, rows=arguments.rows))
    return 0


def asking(table: Path | None, shapes: Path | None = None) -> Ask:
    """Return a function from a kind of question to a table's, or the pack's, questions of that kind."""
    if table is None:
        measurements = list(published())
        return lambda kind: (of_pack(measurements, kind), Reasons())
    rows, given = read_table(table), read_shapes(shapes)
    return lambda kind: of_table(rows, kind, given)


# Comparing -------------------------------------------------------------------------------------------------------------


def compare(ask: Ask, what: str, fit: str = "none") -> Comparison:
    """Predict the figures that may judge `what` and that a workload can be made of."""
    questions, unmapped = ask(what)
    if what == "time":
        constants(fit, "")  # fits of another roofline are an error, not a reason
    rows = len(questions) + sum(count for (_, why), count in unmapped.items() if not why.startswith("other software"))
    compared = []
    for asked in questions:
        try:
            compared.append(Compared(asked=asked, predicted=_predicted(asked, fit)))
        except (Unmapped, WhichloraError) as error:
            unmapped[asked.source, str(error)] += 1
    sizes = Counter(one.asked.cell for one in compared)
    weighed = [replace(one, weight=1 / sizes[one.asked.cell]) for one in compared]
    if fit in ("same-card", "all"):
        weighed = [_informed(one, weighed, itself=fit == "all") for one in weighed]
    return Comparison(what=what, fit=fit, rows=rows, compared=tuple(weighed), unmapped=unmapped)


def _predicted(asked: Question, fit: str) -> float:
    versions = dict(asked.versions)
    if asked.time is None:
        return predicted_bytes(asked.workload, asked.gpu, asked.metric, versions)
    return predicted_seconds(asked.source, asked.workload, asked.gpu, asked.time, fit, versions)


def _informed(one: Compared, others: Sequence[Compared], *, itself: bool) -> Compared:
    """Multiply by the median of measured over predicted of the card's other workloads, the more alike the heavier."""
    alike = [
        (other.asked.measured / other.predicted, other.weight * _likeness(one.asked.workload, other.asked.workload))
        for other in others
        if _kind(other) == _kind(one) and (itself or not _same_workload(other, one))
    ]
    factor = weighted_quantile(alike, 0.5) if alike else 1.0
    return replace(one, predicted=one.predicted * factor)


#: How much more another workload tells of one for each thing that they have in common.
_LIKENESS = 8.0


def _likeness(one: Workload, other: Workload) -> float:
    """Weigh another workload of the same card: method, quantization, model, and lengths and batch within a factor of two."""
    lengths = ("batch_size", "seq_len" if one.phase == "train" else "prefill_len")
    near = [
        max(getattr(one, name), getattr(other, name)) <= 2 * min(getattr(one, name), getattr(other, name))
        for name in lengths
    ]
    same = [(one.method, one.quantization) == (other.method, other.quantization), one.config == other.config]
    return float(_LIKENESS ** sum((*near, *same)))


def _kind(one: Compared) -> tuple[str, ...]:
    asked = one.asked
    return asked.source, asked.gpu.slug, asked.workload.phase, asked.metric


def _same_workload(one: Compared, other: Compared) -> bool:
    """Whether two figures are of one workload, whatever its versions."""
    return one.asked.cell == other.asked.cell or bare_id(one.asked.workload) == bare_id(other.asked.workload)


def bare_id(workload: Workload) -> str:
    """Return the id of a workload without the versions that it ran under."""
    return workload_id(workload.with_(versions={}) if getattr(workload, "versions", None) else workload)


def relative(ask: Ask) -> list[dict[str, Any]]:
    """Compare methods with each other where absolute bytes rest on a length that was fitted: ratios to plain LoRA.

    A method's bytes over those of LoRA at rank 32 under the same versions, as published and as predicted.
    """
    groups: dict[tuple[object, ...], list[Question]] = defaultdict(list)
    for asked in ask("memory_relative")[0]:
        groups[asked.source, asked.gpu.slug, asked.versions].append(asked)
    return [each for group in groups.values() for each in _ratios(group)]


def base_of(group: Sequence[Question]) -> Question | None:
    """Return what the other methods of a source and of the same versions are compared with."""
    return next((one for one in group if one.workload.method == "lora" and one.workload.rank == BASE_RANK), None)


def _ratios(group: Sequence[Question]) -> list[dict[str, Any]]:
    base, found = base_of(group), []
    for one in group:
        if base is None or one is base:
            continue
        try:
            predicted = _predicted(one, "none") / _predicted(base, "none")
        except WhichloraError:
            continue
        measured = one.measured / base.measured
        line = {"source": one.source, "gpu": one.gpu.slug, "method": one.workload.method, "cell": one.cell}
        found.append(line | {"measured": measured, "predicted": predicted, "error": predicted / measured - 1})
    return found


def feasibility(ask: Ask) -> dict[str, int]:
    """Count the runs presumed out of memory whose predicted process bytes exceed the card."""
    questions, unmapped = ask("feasibility")
    counts = Counter(rows=len(questions) + sum(unmapped.values()), mapped=0, predicted_not_to_fit=0)
    for asked in questions:
        try:
            needed = _predicted(asked, "none")
        except WhichloraError:
            continue
        counts["mapped"] += 1
        counts["predicted_not_to_fit"] += needed > asked.gpu.total_bytes
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
        "cells": len({one.asked.cell for one in compared}),
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
    classes = grouped(found.compared, lambda one: {"completeness": one.asked.completeness})
    metrics = grouped(found.compared, lambda one: {"metric": one.asked.metric})
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
            figures = f"{one.asked.measured:.6g} measured, {one.predicted:.6g} predicted"
            lines.append(f"{100 * one.error:+7.2f}%  {figures}  {one.asked.run} {one.asked.metric}")
    for each in known["not_mapped"]:
        lines.append(f"not mapped, {each['rows']} rows of {each['source']}: {each['reason'][:160]}")
    return "\n".join(lines)


def _line(name: str, summed: Mapping[str, Any]) -> str:
    figures = [summed[f"{key}_error"] for key in ("median_abs", "p95_abs", "worst_abs", "median")]
    shown = " ".join("       -" if value is None else f"{100 * value:7.2f}%" for value in figures)
    return f"{name[:60]:62}{summed['mapped']:4} {summed['cells']:5} {shown}"


if __name__ == "__main__":
    sys.exit(main())
