"""Tables of the report: every model with its best or closest configuration, and all rows as they were tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from whichlora_estimators.units import format_bytes

from .pick import PickResult, Row
from .plan import closest_miss, survivors
from .report_view import (
    WITHIN,
    Stage,
    batch_of,
    describe,
    evidence_of,
    format_count,
    format_range,
    format_time,
    most_bytes,
    outcome_of,
    seconds_of,
    setup_of,
    short_batch,
    span_of,
)

#: Rows of a stage that the page shows; further ones only make it slow.
SHOWN = 1000


def models_table(result: PickResult, stages: tuple[Stage, Stage]) -> str:
    """Lay out a line per model, largest first: what it satisfies of either stage, its best or closest configuration."""
    inference, training = stages
    best: dict[str, Row] = {}
    for row in survivors(result):
        best.setdefault(row.model, row)
    parameters = {row.model: row.parameters for row in inference.rows}
    lines = []
    for model in reversed(inference.models):
        chosen = result.choice is not None and result.choice.model == model
        cells = [
            f"{'★ ' if chosen else ''}{escape(model)}",
            format_count(parameters[model]),
            _served(inference, model),
            _passed(training, model) if model in result.kept else "-",
            _best(best[model]) if model in best else _closest(closest_miss(result, model)),
        ]
        lines.append((cells, "chosen" if chosen else ""))
    headers = ("model", "parameters", "serves", "fine-tunes", "best configuration, or what came closest")
    return lines_table(headers, lines, right=(1,), wide=4)


def _served(stage: Stage, model: str) -> str:
    seconds = [
        s for row in stage.rows if row.model == model and not row.rejected and (s := seconds_of(row)) is not None
    ]
    fastest = f", from {format_time(min(seconds))} a token" if seconds else ""
    return _passed(stage, model) + fastest


def _passed(stage: Stage, model: str) -> str:
    rows = [row for row in stage.rows if row.model == model]
    if all(batch_of(row) is None for row in rows):
        return "none"
    return f"{sum(not row.rejected for row in rows)} of {len(rows)}"


def _best(row: Row) -> str:
    return f"{escape(describe(row))}: {format_time(seconds_of(row))}, up to {format_bytes(most_bytes(row) or 0)}"


def _closest(row: Row | None) -> str:
    if row is None:
        return "-"
    if batch_of(row) is None:
        return f'<span class="no">{escape("; ".join(row.rejected))}</span>'
    return f'{escape(describe(row))}: <span class="no">{escape("; ".join(row.rejected))}</span>'


def rows_table(stage: Stage) -> str:
    """Lay out the rows of a stage in the order tried, with all reasons; of very many the first of each model."""
    shown = shown_rows(stage.rows)
    headers = (
        "model",
        stage.setup_name,
        "batch",
        "allocated",
        "process bytes",
        stage.time_name,
        "between",
        "result",
        "evidence",
    )
    table = lines_table(
        headers,
        [(_cells(row), "chosen" if row is stage.choice else "") for row in shown],
        right=(2, 3, 4, 5, 6),
        wide=7,
    )
    counts = Counter(outcome_of(row) for row in stage.rows)
    summary = ", ".join(f"{outcome}: {count:,}" for outcome, count in counts.most_common())
    note = f"{len(stage.rows):,} rows: {summary}."
    if len(shown) < len(stage.rows):
        note += f" The table shows {len(shown):,} of them, the first of each model; the counts are of all."
    return f'<p class="note">{note}</p>{table}'


def shown_rows(rows: Sequence[Row], most: int = SHOWN) -> list[Row]:
    """Select up to about `most` rows such that every model keeps its first ones."""
    if len(rows) <= most:
        return list(rows)
    share = max(1, most // len({row.model for row in rows}))
    seen: Counter[str] = Counter()
    selected = []
    for row in rows:
        seen[row.model] += 1
        if seen[row.model] <= share:
            selected.append(row)
    return selected


def _cells(row: Row) -> Iterator[str]:
    yield escape(row.model)
    yield escape(setup_of(row))
    yield short_batch(row)
    yield "-" if row.allocated_peak_bytes is None else format_bytes(row.allocated_peak_bytes)
    yield "-" if row.process_bytes is None else " to ".join(map(format_bytes, row.process_bytes))
    yield format_time(seconds_of(row))
    yield format_range(span_of(row))
    why = escape("; ".join(row.rejected))
    yield f'<span class="no">{why}</span>' if why else f'<span class="yes">{WITHIN}</span>'
    yield escape(evidence_of(row) if batch_of(row) is not None else "-")


def lines_table(
    headers: Sequence[str], lines: Sequence[tuple[Iterable[str], str]], *, right: Sequence[int], wide: int
) -> str:
    """Lay cells out, which must be escaped, in a box that scrolls on its own; the `wide` column may break its lines."""
    sides = [' class="num"' if i in right else ' class="wide"' if i == wide else "" for i in range(len(headers))]
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(headers, sides, strict=True))
    body = "\n".join(_line(cells, sides, kind) for cells, kind in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _line(cells: Iterable[str], sides: Sequence[str], kind: str) -> str:
    inner = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(cells, sides, strict=True))
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"
