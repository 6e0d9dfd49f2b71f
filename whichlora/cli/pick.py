"""`whichlora pick`: the largest base model that satisfies every constraint, with its method and batch size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.caveats import caveats
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.methods import find_method
from whichlora_estimators.stack import Stack
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import open_store

from ..advice import Advice, Relaxation, advise
from ..pick import PickResult, Row, row_notes
from ..pick import pick as search
from ..pickconfig import read_config
from ..policy import frontier
from ..records import to_json
from ..report_measured import pairs
from ..report_training import training_facts
from ..report_view import batch_text, evidence_of, format_range, format_time, short_batch
from .estimate import explanation
from .tables import table

#: Rows of a stage that a terminal is shown unless all are asked for, and rows of the frontier.
SHOWN = 40
FRONTIER_SHOWN = 12
SCHEMA = 1


@click.command()
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.yaml")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("pick"), show_default=True, help="Folder to write to."
)
@click.option(
    "--all", "show_all", is_flag=True, help="Show every configuration tried, not the first ones of each stage."
)
@click.option("--advice/--no-advice", default=True, show_default=True, help="Say what the next larger model lacks.")
@click.option("--verify", is_flag=True, help="Rehearse the choice, then verify it on the card if it is here.")
@click.option(
    "--on",
    type=click.Choice(("auto", "cuda", "null")),
    default="auto",
    show_default=True,
    help="Where --verify runs it after the rehearsal. auto: on the card, or nowhere.",
)
@click.option(
    "--db",
    type=click.Path(path_type=Path),
    help="The store (default: the user's).",
)
@click.option("--no-correction", is_flag=True, help="The formula alone, without what `whichlora calibrate` learnt.")
@click.option("--offline", is_flag=True, help="Do not ask the Hugging Face Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def pick(config: Path, out: Path, show_all: bool, advice: bool, as_json: bool, **options: Any) -> None:
    """Find the largest base model that serves and fine-tunes within the limits of CONFIG.yaml.

    Writes plan.json (for later commands) and report.html (tables and plots) to the output folder.
    """
    from ..plan import write_outputs

    asked = read_config(config)
    if options["no_correction"]:
        asked = replace(asked, correction=None)
    result = search(asked, offline=options["offline"], report=_tell)
    if options["verify"]:
        result = _checked(result, options["on"], options["db"])
    advised = advise(result, offline=options["offline"], report=_tell) if advice else None
    if as_json:
        click.echo(json.dumps(answer(result, advised), indent=1))
    else:
        click.echo("\n\n".join(_texts(result, advised, show_all)))
    measured = pairs(result, open_store(options["db"]))
    for path in write_outputs(result, out, advised, measured):
        click.echo(f"wrote {path}", err=True)


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _checked(result: PickResult, where: str, db: Path | None) -> PickResult:
    """Rehearse the choice and, where a card is, verify it there."""
    from ..checked import check
    from ..verify import Place, find_place

    on: str | Place | None = where
    if where != "null":
        try:
            on = place = find_place(where)
            if place.gpu != result.config.gpu:
                _tell(f"verified on {place.environment.gpu_name}, picked for {result.config.gpu.name}")
        except WhichloraError as error:
            if where == "cuda":
                raise
            _tell(f"rehearsed only: {error.what}: {error.value}")
            on = None
    return check(result, on=on, store=open_store(db), report=_tell)


def answer(result: PickResult, advice: Advice | None) -> dict[str, Any]:
    """Return the choice, the frontier and the advice for machines; of models their names, not their configs."""
    stack = result.config.stack

    def row(each: Row) -> dict[str, Any]:
        plain: dict[str, Any] = to_json(each)
        del plain["workload"]["config"]
        plain["caveats"] = list(caveats(each.workload, stack))
        return plain | {"step_s": each.step_s, "time_s": each.time_s, "effective_batch": each.effective_batch}

    return {
        "schema": SCHEMA,
        "kept": list(result.kept),
        "choice": None if result.choice is None else row(result.choice),
        "frontier": [row(each) for each in frontier(result.stage2)],
        "notes": [
            {"text": text, "models": models}
            for text, models in row_notes((*result.stage1, *result.stage2), stack).items()
        ],
        "advice": None if advice is None else to_json(advice, {Row: row}),
    }


def _texts(result: PickResult, advice: Advice | None, show_all: bool) -> Iterator[str]:
    for title, rows in (("Stage 1: inference", result.stage1), ("Stage 2: fine-tuning", result.stage2)):
        yield "\n".join([title, _stage(rows, SHOWN if not show_all else len(rows)), *_notes(rows, result.config.stack)])
    best = frontier(result.stage2)
    if len(best) > 1:
        yield f"Frontier: no other is at least as large, lean and quick\n{_stage(tuple(best), FRONTIER_SHOWN)}"
    yield _conclusion(result)
    if advice is not None and (lines := list(_advice(advice))):
        yield "\n".join(lines)


def _stage(rows: tuple[Row, ...], most: int) -> str:
    lines = [_cells(row) for row in rows[:most]]
    headers = ("model", "setup", "batch", "process up to", "time", "between", "evidence", "result")
    text = table(headers, lines, right=(2, 3, 4))
    return text if len(rows) <= most else f"{text}\n… {len(rows) - most} more (--all, or the report)"


def _notes(rows: tuple[Row, ...], stack: Stack) -> Iterator[str]:
    """Say below a stage what one would not expect of its configurations."""
    for text, models in row_notes(rows, stack).items():
        yield f"Note on {', '.join(models)}: {text}."


def _cells(row: Row) -> tuple[str, ...]:
    memory = "-" if row.process_bytes is None else format_bytes(row.process_bytes[1])
    result = "; ".join(row.rejected) or "ok"
    times = format_time(row.time_s), format_range(row.time)
    return row.model, _setup(row), short_batch(row), memory, *times, evidence_of(row), result


def _setup(row: Row) -> str:
    workload = row.workload
    ranked = f"r{workload.rank}" if find_method(workload.method).has_rank else ""
    length = f"{workload.prefill_len}+{workload.decode_len}" if workload.phase == "generate" else ranked
    return f"{row.method} {length}{', ' if row.variant else ''}{row.variant}"


def _conclusion(result: PickResult) -> str:
    kept = ", ".join(result.kept) or "none"
    if result.choice is None or result.prediction is None:
        return f"Stage 1 kept: {kept}.\nNo configuration satisfies every limit; the reasons are in the tables."
    facts = "".join(f"{name}: {text}\n" for name, text in training_facts(result))
    return f"Stage 1 kept: {kept}.\nChoice: {_named(result.choice)}.\n{facts}\n{explanation(result.prediction)}"


def _named(row: Row) -> str:
    time = "" if row.time_s is None else f", {format_seconds(row.time_s)} in all"
    return f"{row.model} with {_method(row)}, {batch_text(row)}{time}"


def _method(row: Row) -> str:
    rank = f", rank {row.workload.rank}" if find_method(row.workload.method).has_rank else ""
    return f"{row.method}{rank}{', ' if row.variant else ''}{row.variant}"


def _advice(advice: Advice) -> Iterator[str]:
    if advice.relaxation is not None:
        yield from _relaxed(advice.relaxation)
    for gain in advice.gains:
        yield f"With {gain.change}: {'still nothing' if gain.choice is None else _named(gain.choice)}."


def _relaxed(found: Relaxation) -> Iterator[str]:
    moves = "; ".join(map(str, found.moves)) or "no more than this, by a full prediction"
    yield f"Next larger: {_named(found.row)}. It would need {moves}."
    if found.gpu is not None:
        yield f"Smallest card that has it: {found.gpu.name} ({found.gpu.slug}, {format_bytes(found.gpu.total_bytes)})."
