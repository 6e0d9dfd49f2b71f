"""`whichlora serve`: the lab's server, and the tokens that it takes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from whichlora_estimators.errors import BadValue
from whichlora_profiles_db import open_store

from ..serve.settings import Settings
from ..serve.tokens import Role, Tokens, find_role, tokens_path
from .tables import table

SCHEMA = 1
_DB = click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_ROLES = [role.title for role in Role]


@click.group(invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8642, show_default=True)
@_DB
@click.option("--read", type=click.Choice(["open", "token"]), default="open", show_default=True, help="Who may read.")
@click.option("--read-only", is_flag=True, help="Take nothing in, whatever the token.")
@click.option("--prefix", default="", help="Path under which a reverse proxy shows the server, such as /whichlora.")
@click.option(
    "--rate",
    type=click.FloatRange(0),
    default=50.0,
    show_default=True,
    help="Requests a second per address; 0: no limit.",
)
@click.option("--jobs", type=click.IntRange(1, 64), help="Processes that predict (default: cores, at most 4).")
@click.option(
    "--most-pack-mb", type=click.IntRange(1, 4096), default=256, show_default=True, help="Largest pack taken."
)
@click.pass_context
def serve(
    ctx: click.Context,
    host: str,
    port: int,
    db: Path | None,
    read: str,
    read_only: bool,
    prefix: str,
    rate: float,
    jobs: int | None,
    most_pack_mb: int,
) -> None:
    """Serve one store to a lab: predictions, searches, measurements and a page, over HTTP.

    Whoever pushes measurements needs a token: `whichlora serve tokens create LABEL --role contributor`.
    """
    if ctx.invoked_subcommand is not None:
        return
    from ..serve.run import run

    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise BadValue("not a path prefix", value=prefix, todo="Begin with a slash and end without one: /whichlora.")
    settings = Settings(
        store=open_store(db).path,
        read_needs_token=read == "token",
        read_only=read_only,
        root_path=prefix,
        rate_per_s=rate,
        burst=max(1, int(4 * rate)),
        most_pack_bytes=most_pack_mb * 10**6,
        **({} if jobs is None else {"jobs": jobs}),
    )
    run(settings, host=host, port=port)


@serve.group()
def tokens() -> None:
    """Create, list and revoke the tokens of a store's server; a running one heeds them at once."""


@tokens.command()
@click.argument("label")
@click.option("--role", type=click.Choice(_ROLES), default="contributor", show_default=True)
@_DB
@_JSON
def create(label: str, role: str, db: Path | None, as_json: bool) -> None:
    """Make a token for LABEL, which goes into the ledger of what comes in with it. It is shown this once."""
    made = _tokens(db).create(find_role(role), label)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "token": made, "label": label, "role": role}, indent=1))
        return
    click.echo("Keep it: only its hash is stored. Use it as WHICHLORA_TOKEN or --token.", err=True)
    click.echo(made)


@tokens.command("list")
@_DB
@_JSON
def list_(db: Path | None, as_json: bool) -> None:
    """List all tokens, without their secrets."""
    found = _tokens(db).all()
    fields = [[each.id, each.role.title, each.label, each.created_at, each.revoked_at] for each in found]
    names = ("id", "role", "label", "created_at", "revoked_at")
    if as_json:
        lines = [dict(zip(names, each, strict=True)) for each in fields]
        click.echo(json.dumps({"schema": SCHEMA, "tokens": lines}, indent=1))
        return
    click.echo(table(("id", "role", "label", "created", "revoked"), [[str(x or "") for x in each] for each in fields]))


@tokens.command()
@click.argument("id_", metavar="ID")
@_DB
def revoke(id_: str, db: Path | None) -> None:
    """Revoke the token ID: from now on it is refused."""
    _tokens(db).revoke(id_)
    click.echo(f"{id_} is revoked", err=True)


def _tokens(db: Path | None) -> Tokens:
    return Tokens(tokens_path(open_store(db).path))
