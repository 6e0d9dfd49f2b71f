"""`whichlora pick`: the largest base model that satisfies every constraint, with its method and batch size."""

from __future__ import annotations

from pathlib import Path

import click

from whichlora_estimators.units import format_bytes, format_seconds

from ..pick import PickResult, Row
from ..pick import pick as search
from ..pickconfig import read_config
from .estimate import explanation
from .tables import table

#: Rows of a stage that a terminal is shown unless all are asked for.
SHOWN = 40


@click.command()
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.yaml")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("pick"), show_default=True, help="Folder to write to."
)
@click.option(
    "--all", "show_all", is_flag=True, help="Show every configuration tried, not the first ones of each stage."
)
@click.option("--offline", is_flag=True, help="Do not ask the Hugging Face Hub.")
def pick(config: Path, out: Path, show_all: bool, offline: bool) -> None:
    """Find the largest base model that serves and fine-tunes within the limits of CONFIG.yaml.

    Writes plan.json (for later commands) and report.html (tables and plots) to the output folder.
    """
    from ..plan import write_outputs

    result = search(read_config(config), offline=offline, report=lambda text: click.echo(text, err=True))
    for title, rows in (("Stage 1: inference", result.stage1), ("Stage 2: fine-tuning", result.stage2)):
        click.echo(f"{title}\n{_stage(rows, show_all)}\n")
    click.echo(_conclusion(result))
    for path in write_outputs(result, out):
        click.echo(f"wrote {path}", err=True)


def _stage(rows: tuple[Row, ...], show_all: bool) -> str:
    shown = rows if show_all else rows[:SHOWN]
    lines = [_cells(row) for row in shown]
    text = table(("model", "setup", "batch", "process up to", "time", "result"), lines, right=(2, 3, 4))
    return text if len(shown) == len(rows) else f"{text}\n… {len(rows) - len(shown)} more (--all)"


def _cells(row: Row) -> tuple[str, ...]:
    workload = row.workload
    length = f"{workload.prefill_len}+{workload.decode_len}" if workload.phase == "generate" else f"r{workload.rank}"
    if row.variant:
        length += f", {row.variant}"
    memory = "-" if row.process_bytes is None else format_bytes(row.process_bytes[1])
    time = "-" if row.time_s is None else format_seconds(row.time_s)
    return row.model, f"{row.method} {length}", str(workload.batch_size), memory, time, "; ".join(row.rejected) or "ok"


def _conclusion(result: PickResult) -> str:
    kept = ", ".join(result.kept) or "none"
    if result.choice is None or result.prediction is None:
        return f"Stage 1 kept: {kept}.\nNo configuration satisfies every limit; the reasons are in the tables."
    workload = result.choice.workload
    time = "" if result.choice.time_s is None else f", {format_seconds(result.choice.time_s)} in all"
    chosen = (
        f"{result.choice.model} with {result.choice.method}, rank {workload.rank}, batch size {workload.batch_size}"
    )
    return f"Stage 1 kept: {kept}.\nChoice: {chosen}{time}.\n\n{explanation(result.prediction)}"
