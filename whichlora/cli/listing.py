"""`whichlora profiles list|show|stats`: what the store holds, and beside it the published pack."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import (
    Filters,
    GroupStats,
    Measurement,
    Store,
    UnknownMeasurement,
    measurement_to_json,
    open_store,
    published,
    remote_stats,
)
from whichlora_profiles_db.checks import printable

from .asking import remote_at, token_option
from .estimate import setup_text
from .tables import table

SCHEMA = 1
SHOWN = 20
_SHORTEST_ID = 4
_GROUP_HEADERS = ("where", "gpu", "evidence", "ok", "oom", "failed", "models", "workloads", "first", "last")
_NAMES = ("model", "gpu", "method", "evidence", "outcome", "phase", "source")


def filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose measurements, the store, and whether the published pack counts."""
    return choosing_options(store_options(command))


def choosing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose measurements."""
    options = [
        click.option("--model", multiple=True, help="Model, with or without its organisation; * and ? stand for any."),
        click.option("--gpu", multiple=True, help="Card, as `whichlora gpus` lists it."),
        click.option("--method", multiple=True, help="full, lora, dora …"),
        click.option("--evidence", multiple=True, help="rehearsed, measured or published."),
        click.option("--outcome", multiple=True, help="ok, oom or failed."),
        click.option("--phase", multiple=True, help="train or generate."),
        click.option("--source", multiple=True, help="Where it was published; * and ? stand for any."),
        click.option("--since", help="From this day on: 2026-01-31, or 30d for the last 30 days."),
        click.option("--until", help="Before this day."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where measurements are, and --json."""
    options = [
        click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's)."),
        click.option(
            "--published/--no-published",
            "with_published",
            default=True,
            show_default=True,
            help="Look into the published pack that ships with whichlora too.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON for machines."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("list")
@filter_options
@click.option("--limit", type=int, default=SHOWN, show_default=True, help="At most so many, the latest; 0 for all.")
def list_profiles(limit: int, **options: Any) -> None:
    """List measurements, the latest first: your store's, and those that others published."""
    if limit < 0:
        raise BadValue("limit must not be negative", value=limit, todo="Give 0 for all.")
    filters, store = chosen_filters(options), open_store(options["db"])
    own = store.query(filters, limit=limit or None)
    shipped = _not_in(store, list(published(filters))) if options["with_published"] else []
    found = sorted(own + shipped, key=_latest_first)[: limit or None]
    total = store.count(filters) + len(shipped)
    if options["as_json"]:
        shown = [measurement_to_json(one) for one in found]
        click.echo(json.dumps({"schema": SCHEMA, "total": total, "measurements": shown}, indent=1))
        return
    headers = ("id", "date", "evidence", "model", "gpu", "setup", "batch", "allocated", "reserved", "time", "outcome")
    click.echo(table(headers, [_cells(one) for one in found], right=(6, 7, 8, 9)))
    click.echo(f"{len(found)} of {total} measurements", err=True)


@click.command()
@click.argument("id_", metavar="ID")
@store_options
def show(id_: str, db: Path | None, with_published: bool, as_json: bool) -> None:
    """Show the measurement whose ID begins so: what ran, where, with what, and everything that was seen."""
    found = measurement_to_json(_find(id_, open_store(db), with_published=with_published))
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


@click.command()
@click.option("--remote", metavar="URL", help="Count what a remote's packs say, without downloading them.")
@token_option
@filter_options
def stats(remote: str | None, token: str | None, **options: Any) -> None:
    """Count measurements by card and evidence."""
    filters, store = chosen_filters(options), open_store(options["db"])
    if remote is not None:
        _echo_remote(remote, filters, token=token, as_json=options["as_json"])
        return
    known = store.stats(filters)
    shipped = _not_in(store, list(published(filters))) if options["with_published"] else []
    groups = [("store", group) for group in known.groups] + [("published pack", g) for g in _groups(shipped)]
    total = known.total + len(shipped)
    if options["as_json"]:
        where = {"path": str(known.path), "file_bytes": known.file_bytes, "schema": known.schema}
        lines = [_group_fields(place, group) for place, group in groups]
        click.echo(json.dumps({"schema": SCHEMA, "store": where, "total": total, "groups": lines}, indent=1))
        return
    click.echo(table(_GROUP_HEADERS, [_group_cells(place, group) for place, group in groups], right=range(3, 8)))
    size = f"{known.total} measurements, {format_bytes(known.file_bytes)}" if store.exists else "not there yet"
    click.echo(f"{total} measurements; store {known.path}: {size}", err=True)


def _echo_remote(url: str, filters: Filters, *, token: str | None, as_json: bool) -> None:
    groups = remote_stats(remote_at(url, token, there=True), filters)
    total = sum(group.total for group in groups)
    if as_json:
        lines = [_group_fields("remote", group) for group in groups]
        click.echo(json.dumps({"schema": SCHEMA, "remote": url, "total": total, "groups": lines}, indent=1))
        return
    click.echo(table(_GROUP_HEADERS, [_group_cells("remote", group) for group in groups], right=range(3, 8)))
    click.echo(f"{total} measurements in the packs of {url}, as these say", err=True)


# Which -----------------------------------------------------------------------------------------------------------------


def chosen_filters(options: dict[str, Any]) -> Filters:
    """Return the conditions that the options put. Raises BadValue or UnknownName."""
    names: dict[str, Any] = {name: list(options[name]) or None for name in _NAMES}
    names["model"] = [name for given in options["model"] for name in _model_names(given)] or None
    names["gpu"] = [name if _is_pattern(name) else find_gpu(name).slug for name in options["gpu"]] or None
    for name in ("since", "until"):
        names[name] = None if options[name] is None else _moment(name, options[name])
    return Filters(**names)


def _model_names(given: str) -> list[str]:
    return [given] if "/" in given else [given, f"*/{given}"]


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _moment(name: str, text: str) -> datetime:
    """Read a date, a date with a time, or `30d`; without a zone they are of this machine's."""
    try:
        if days := re.fullmatch(r"(\d{1,6})d", text.strip()):
            return datetime.now(timezone.utc) - timedelta(days=int(days[1]))
        return datetime.fromisoformat(text.strip()).astimezone()
    except (ValueError, OverflowError):
        todo = "Write 2026-01-31, 2026-01-31T12:00+00:00, or 30d for the last 30 days."
        raise BadValue(f"--{name} is not a date", value=text, todo=todo) from None


def _not_in(store: Store, shipped: Sequence[Measurement]) -> list[Measurement]:
    """Leave out what the store holds as well."""
    known = store.known(one.id for one in shipped)
    return [one for one in shipped if one.id not in known]


def _latest_first(one: Measurement) -> tuple[float, str]:
    return (-one.measured_at.timestamp() if one.measured_at else float("inf"), one.id)


def _find(id_: str, store: Store, *, with_published: bool) -> Measurement:
    """Return the one measurement whose id begins so, in the store or in the published pack."""
    if len(id_) < _SHORTEST_ID:
        raise BadValue("too short for an id", value=id_, todo=f"Give {_SHORTEST_ID} digits or more.")
    shipped = [one for one in published() if one.id.startswith(id_.lower())] if with_published else []
    try:
        found = {one.id: one for one in [*shipped, store.get(id_)]}
    except UnknownMeasurement:
        if not shipped:
            raise
        found = {one.id: one for one in shipped}
    if len(found) > 1:
        raise UnknownMeasurement("several measurements have such an id", value=id_, todo="Give more digits.")
    return next(iter(found.values()))


# Cells -----------------------------------------------------------------------------------------------------------------


def _cells(one: Measurement) -> tuple[str, ...]:
    memory = (one.allocated_peak_bytes, one.reserved_peak_bytes)
    return (
        one.id[:12],
        _day(one.measured_at),
        one.evidence if one.device == "cuda" or one.evidence == "rehearsed" else f"{one.evidence} ({one.device})",
        one.workload.model,
        one.environment.gpu or "-",
        setup_text(one.workload),
        str(one.workload.batch_size),
        *("-" if value is None else format_bytes(value) for value in memory),
        _time(one),
        one.outcome,
    )


def _day(moment: datetime | None) -> str:
    return moment.date().isoformat() if moment else "-"


def _time(one: Measurement) -> str:
    """Say how long a step took, or a decoded token, or the prefill: the median where it is known, else the mean."""
    for name, times in (("step", one.step), ("token", one.decode_per_token), ("prefill", one.prefill)):
        if times is not None:
            middle = next(s for s in (times.median_s, times.mean_s, times.min_s, times.max_s) if s is not None)
            return f"{format_seconds(middle)} a {name}"
    return "-"


def _lines(found: Any, *, indent: str = "") -> list[str]:
    """Lay JSON out as `key: value` lines, bytes and seconds readable, nested objects indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{printable(key)}:", *_lines(value, indent=f"{indent}  ")]
        elif value not in (None, {}, [], ""):
            lines.append(f"{indent}{printable(key)}: {_readable(key, value)}")
    return lines


def _readable(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({format_bytes(value)})"
    if key.endswith("_s") and isinstance(value, float):
        return format_seconds(value)
    return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else json.dumps(value)


def _groups(measurements: Sequence[Measurement]) -> list[GroupStats]:
    """Count measurements as the store counts its own."""
    by_card: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        by_card.setdefault((one.environment.gpu or "", one.evidence), []).append(one)
    return [_group(gpu or None, evidence, members) for (gpu, evidence), members in sorted(by_card.items())]


def _group(gpu: str | None, evidence: str, members: Sequence[Measurement]) -> GroupStats:
    dates = [one.measured_at for one in members if one.measured_at]
    return GroupStats(
        gpu=gpu,
        evidence=evidence,
        counts={outcome: sum(one.outcome == outcome for one in members) for outcome in ("ok", "oom", "failed")},
        models=len({one.workload.model for one in members}),
        workloads=len({one.workload_id for one in members}),
        first_at=min(dates, default=None),
        last_at=max(dates, default=None),
    )


def _group_fields(place: str, group: GroupStats) -> dict[str, Any]:
    dates = {"first_at": group.first_at, "last_at": group.last_at}
    return {
        "where": place,
        "gpu": group.gpu,
        "evidence": group.evidence,
        "total": group.total,
        "counts": dict(group.counts),
        "models": group.models,
        "workloads": group.workloads,
        **{name: moment.isoformat() if moment else None for name, moment in dates.items()},
    }


def _group_cells(place: str, group: GroupStats) -> tuple[str, ...]:
    counts = (str(group.counts[outcome]) for outcome in ("ok", "oom", "failed"))
    dates = (_day(group.first_at), _day(group.last_at))
    return (place, group.gpu or "-", group.evidence, *counts, str(group.models), str(group.workloads), *dates)
