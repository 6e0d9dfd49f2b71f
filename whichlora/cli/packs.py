"""`whichlora profiles export|import|check|push|pull|sync|merge`: measurements to and from others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_profiles_db import (
    BadPack,
    Imported,
    Manifest,
    Pulled,
    Pushed,
    check_pack,
    export_pack,
    import_pack,
    merge_store,
    open_store,
    pull,
    push,
)

from .asking import remote_at, token_option
from .listing import choosing_options, chosen_filters

SCHEMA = 1
_SHOWN = 10

_DB = click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_PARTIAL = click.option("--partial", is_flag=True, help="Take the good rows of a pack that has bad ones.")
_AGAIN = click.option("--again", is_flag=True, help="Fetch packs that were refused before once more.")
_WITH_NAMES = click.option("--with-names", is_flag=True, help="Leave host and user names in.")
_PACKS = click.argument("packs", nargs=-1, required=True, metavar="PACK…", type=click.Path(path_type=Path))
_URL = click.argument("url", metavar="URL")


@click.command()
@click.argument("pack", type=click.Path(path_type=Path))
@choosing_options
@_WITH_NAMES
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@_DB
@_JSON
def export(pack: Path, with_names: bool, force: bool, db: Path | None, as_json: bool, **options: Any) -> None:
    """Write measurements of the store into a PACK, one Parquet file, without host and user names."""
    if pack.is_dir():
        raise BadValue("a folder where a file is to be written", value=str(pack), todo="Name a file in it.")
    if pack.exists() and not force:
        raise BadValue("the file is there already", value=str(pack), todo="Name another one, or replace it: --force.")
    made = export_pack(open_store(db), pack, chosen_filters(options), with_names=with_names)
    if as_json:
        _echo_json(pack=str(made.path), sha256=made.sha256, **_manifest_fields(made.manifest))
    else:
        click.echo(f"{made.path}: {_counted(made.manifest)}, SHA-256 {made.sha256}")


@click.command("import")
@_PACKS
@_PARTIAL
@_DB
@_JSON
def import_(packs: tuple[Path, ...], partial: bool, db: Path | None, as_json: bool) -> None:
    """Add what each PACK holds to the store: each whole or, where a row of it cannot be, not at all.

    What is refused is written, with the reasons, into the folder that lies beside the store and ends in .quarantine.
    """
    store = open_store(db)
    done, failed = [], []
    for pack in packs:
        try:
            done.append((pack, import_pack(store, pack, partial=partial, on_rows=_row_teller(pack.name))))
        except BadPack as error:
            failed.append({"pack": str(pack), "error": str(error)})
    if as_json:
        _echo_json(store=str(store.path), imported=[_imported_fields(*each) for each in done], refused=failed)
    else:
        for pack, each in done:
            click.echo(f"{pack}: {_counted(each.manifest)}, {each.added} new{_left_out(each)}")
    _fail([one["error"] for one in failed])


@click.command()
@_PACKS
@_JSON
def check(packs: tuple[Path, ...], as_json: bool) -> None:
    """Check each PACK as an import would, and say what is in it."""
    found, problems = [], []
    for pack in packs:
        try:
            checked = check_pack(pack, limit=_SHOWN, on_rows=_row_teller(pack.name))
        except BadPack as error:
            problems.append(str(error))
            found.append({"pack": str(pack), "error": str(error)})
            continue
        rejected = [{"row": one.row, "id": one.id, "reasons": list(one.reasons)} for one in checked.rejected]
        fields = {"pack": str(pack), "sha256": checked.sha256, **_manifest_fields(checked.manifest)}
        found.append(fields | {"rejected": checked.rejected_count, "rejected_rows": rejected})
        if not as_json:
            click.echo(f"{pack}: {_counted(checked.manifest)}, by {checked.manifest.producer}")
        if checked.rejected_count:
            problems.append(f"{pack}: {checked.rejected_count} rows that cannot be")
            problems += [f"  row {one.row}: {'; '.join(one.reasons)}" for one in checked.rejected]
    if as_json:
        _echo_json(packs=found)
    _fail(problems)


@click.command("push")
@_URL
@choosing_options
@_WITH_NAMES
@token_option
@_DB
@_JSON
def push_(url: str, with_names: bool, token: str | None, db: Path | None, as_json: bool, **options: Any) -> None:
    """Upload what a remote lacks, as packs without host and user names.

    URL: a folder, s3://, gs://, hf://datasets/…, or http(s):// of a `whichlora serve`.
    """
    pushed = push(
        open_store(db), remote_at(url, token), chosen_filters(options), with_names=with_names, on_pack=_tell("push")
    )
    _echo_exchange(url, as_json, pushed=pushed)


@click.command("pull")
@_URL
@_PARTIAL
@_AGAIN
@token_option
@_DB
@_JSON
def pull_(url: str, partial: bool, again: bool, token: str | None, db: Path | None, as_json: bool) -> None:
    """Add what a remote holds and the store has not seen.

    URL: a folder, s3://, gs://, hf://datasets/…, or http(s):// of a `whichlora serve`.
    """
    pulled = pull(
        open_store(db), remote_at(url, token, there=True), partial=partial, again=again, on_pack=_tell("pull")
    )
    _echo_exchange(url, as_json, pulled=pulled)


@click.command()
@_URL
@_PARTIAL
@_AGAIN
@_WITH_NAMES
@token_option
@_DB
@_JSON
def sync(
    url: str, partial: bool, again: bool, with_names: bool, token: str | None, db: Path | None, as_json: bool
) -> None:
    """Pull from a remote, then push to it.

    URL: a folder, s3://, gs://, hf://datasets/…, or http(s):// of a `whichlora serve`.
    """
    store, remote = open_store(db), remote_at(url, token)
    pulled = pull(store, remote, partial=partial, again=again, on_pack=_tell("pull"))
    pushed = push(store, remote, with_names=with_names, on_pack=_tell("push"))
    _echo_exchange(url, as_json, pulled=pulled, pushed=pushed)


@click.command()
@click.argument("other", type=click.Path(path_type=Path))
@_DB
@_JSON
def merge(other: Path, db: Path | None, as_json: bool) -> None:
    """Add all of another store's file to the store: one that you trust, as its rows are not hashed again."""
    store = open_store(db)
    merged = merge_store(store, other)
    if as_json:
        _echo_json(store=str(store.path), other=str(other), rows=merged.rows, added=merged.added)
    else:
        click.echo(f"{store.path}: {merged.added} new of {merged.rows} in {other}")


def _echo_exchange(url: str, as_json: bool, *, pulled: Pulled | None = None, pushed: Pushed | None = None) -> None:
    if as_json:
        sides: dict[str, Any] = {}
        if pulled:
            sides["pulled"] = {"packs": list(pulled.packs), "added": pulled.added, "refused": dict(pulled.refused)}
            sides["pulled"]["waiting"] = list(pulled.waiting)
        if pushed:
            sides["pushed"] = {"packs": list(pushed.packs), "rows": pushed.rows}
        _echo_json(remote=url, **sides)
    else:
        if pulled:
            click.echo(f"pulled {len(pulled.packs)} packs: {pulled.added} new measurements")
        if pushed:
            click.echo(f"pushed {len(pushed.packs)} packs: {pushed.rows} measurements")
    if pulled and pulled.waiting:
        click.echo(f"{len(pulled.waiting)} packs were refused before; fetch them once more with --again.", err=True)
    _fail(list(pulled.refused.values()) if pulled else [])


def _fail(problems: list[str]) -> None:
    """End with exit code 2 where something was refused, having said what."""
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        sys.exit(2)


def _echo_json(**fields: Any) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **fields}, indent=1))


def _counted(manifest: Manifest) -> str:
    parts = [f"{count} {name}" for name, count in manifest.counts["evidence"].items()]
    return f"{manifest.rows} measurements ({', '.join(parts)}{', with names' if manifest.with_names else ''})"


def _manifest_fields(manifest: Manifest) -> dict[str, Any]:
    return {
        "rows": manifest.rows,
        "counts": manifest.counts,
        "with_names": manifest.with_names,
        "producer": manifest.producer,
    }


def _imported_fields(pack: Path, imported: Imported) -> dict[str, Any]:
    return {
        "pack": str(pack),
        "sha256": imported.sha256,
        "rows": imported.manifest.rows,
        "added": imported.added,
        "rejected": imported.rejected_count,
        "quarantine": imported.quarantine and str(imported.quarantine),
    }


def _left_out(imported: Imported) -> str:
    if not imported.rejected_count:
        return ""
    return f"; {imported.rejected_count} rejected, kept in {imported.quarantine}"


def _tell(what: str) -> Callable[[int, int, str], None]:
    return lambda number, count, name: click.echo(f"[{number}/{count}] {what} {name}", err=True)


def _row_teller(name: str) -> Callable[[int, int], None]:
    """Return what tells how many rows of a large pack are checked."""

    def tell(done: int, rows: int) -> None:
        if rows > done or rows > 100_000:
            click.echo(f"{name}: {done} of {rows} rows checked", err=True)

    return tell
