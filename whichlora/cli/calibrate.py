"""`whichlora calibrate`: learn from every measurement, and say on held-out ones what that is worth."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from whichlora_calibration.calibrate import Calibration, summary_to_json
from whichlora_calibration.calibrate import calibrate as fit_corrections
from whichlora_calibration.cases import Case, Compared, cases_of
from whichlora_calibration.correction import Score
from whichlora_calibration.current import correction_path, current_correction, save_correction
from whichlora_calibration.forecasts import Forecasts
from whichlora_calibration.modes import FEWEST_GROUPS
from whichlora_calibration.suggest import suggest
from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.gpus import find_gpu
from whichlora_profiles_db import open_store, published, workload_to_json

from .tables import table

SCHEMA = 1
COVERAGES = (0.5, 0.99)


@click.command()
@click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
@click.option(
    "--published/--no-published",
    "with_published",
    default=True,
    show_default=True,
    help="Learn from the published pack that ships with whichlora too.",
)
@click.option("--coverage", type=float, default=0.9, show_default=True, help="Share of runs that intervals shall hold.")
@click.option("--out", type=click.Path(path_type=Path), help="File of the correction (default: the user's, in use).")
@click.option("--dry-run", is_flag=True, help="Print the scores, put nothing in use.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page about what was learnt and how well.")
@click.option("--suggest", "suggested", type=int, help="Name so many short runs that would narrow intervals most.")
@click.option("--gpu", help="The card of --suggest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def calibrate(db: Path | None, with_published: bool, **options: Any) -> None:
    """Fit corrections of memory and time on all measurements of real cards, and put them in use.

    What does not beat the formula on held-out models and cards is not applied. --suggest prints workloads, one JSON
    object a line, for `whichlora verify --workloads`.
    """
    _check(options["coverage"], options["suggested"], options["gpu"])
    compared = _compared(db, with_published)
    if options["suggested"] is not None:
        _suggest(compared.cases, options["suggested"], options["gpu"])
        return
    found = _fit(compared, options["coverage"])
    if not options["dry_run"]:
        path = options["out"] or correction_path()
        save_correction(found.correction, path)
        _tell(f"in use: {path}")
    if options["report"] is not None:
        from ..report_calibration import write_report

        write_report(found, compared, options["report"])
        _tell(f"wrote {options['report']}")
    summary = {"schema": SCHEMA, **summary_to_json(found)}
    click.echo(json.dumps(summary, indent=1) if options["as_json"] else _text(found))


def _check(coverage: float, suggested: int | None, gpu: str | None) -> None:
    """Raise for options that make no sense, or for want of scikit-learn, before anything takes time."""
    if not COVERAGES[0] <= coverage <= COVERAGES[1]:
        raise BadValue("coverage out of range", value=coverage, todo=f"Give {COVERAGES[0]} to {COVERAGES[1]}.")
    todo = "Example: whichlora calibrate --suggest 10 --gpu rtx-4090 > runs.jsonl."
    if suggested is None and gpu is not None:
        raise BadValue("--gpu is the card of --suggest, which is not there", value=gpu, todo=todo)
    if suggested is not None and (gpu is None or suggested < 1):
        raise BadValue("--suggest needs a card and a count of 1 or more", value=f"{suggested}, {gpu}", todo=todo)
    if gpu is not None:
        find_gpu(gpu)
    if suggested is None and importlib.util.find_spec("sklearn") is None:
        raise WhichloraError("calibration needs scikit-learn", todo="Run: pip install 'whichlora[calibrate]'.")


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _compared(db: Path | None, with_published: bool) -> Compared:
    from itertools import chain

    store = open_store(db)
    own = (measurement for batch in store.iterate() for measurement in batch)
    forecasts = Forecasts(Path(click.get_app_dir("whichlora")) / "forecasts")
    try:
        return cases_of(chain(published() if with_published else (), own), forecasts, report=_tell)
    finally:
        forecasts.save()


def _fit(compared: Compared, coverage: float) -> Calibration:
    from .. import __version__

    if not compared.cases:
        todo = (
            "Run `whichlora verify` on a card, or `whichlora profiles import` a pack, or leave the published ones in."
        )
        raise BadValue("no measurements to learn from", todo=todo)
    used = current_correction()
    return fit_corrections(
        compared.cases,
        compared.left,
        rows=compared.rows,
        coverage=coverage,
        replaces=None if used is None else used.version,
        whichlora=__version__,
        report=_tell,
    )


def _suggest(cases: Sequence[Case], count: int, gpu: str) -> None:
    forecasts = Forecasts(Path(click.get_app_dir("whichlora")) / "forecasts")
    for number, workload in enumerate(suggest(find_gpu(gpu), cases, count, forecasts, report=_tell), 1):
        click.echo(json.dumps(workload_to_json(workload.with_(id=f"suggested-{number}"))))
    forecasts.save()


def _text(found: Calibration) -> str:
    rows = [_row(score) for score in found.correction.scores() if score.group != "source"]
    headers = (
        "what",
        "held out",
        "cells",
        "formula",
        "corrected",
        "gain, middle 90%",
        "interval",
        "within it",
        "applied",
    )
    lines = [table(headers, rows, right=range(2, 8))]
    if found.correction.false_fits:
        lines.append(f"said to fit and did not: {found.correction.false_fits['rate']:.1%} of held-out runs")
    if found.left:
        lines.append(f"{len(found.left)} measurements have no formula, such as: {found.left[0].reason}")
    return "\n".join(lines)


def _row(score: Score) -> tuple[str, ...]:
    part, label = score.errors, {"model": "model", "gpu": "card"}[score.group]
    errors = [f"{part[kind]['median_abs_error']:.1%}" for kind in ("formula", "corrected")]
    spread = f"{part['gain_low']:+.1%} to {part['gain_high']:+.1%}"
    few = part["groups"] < FEWEST_GROUPS
    why = f"fewer than {FEWEST_GROUPS} {label}s" if few else "not better on held-out runs"
    applied = "yes" if part["applied"] else f"no: {why}"
    return (
        score.what,
        label,
        str(part["cells"]),
        *errors,
        spread,
        score.interval,
        _share(part["coverage"]),
        applied,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
