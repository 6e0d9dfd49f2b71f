"""Asking a lab's server in place of computing here, and the options that say which one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from whichlora_estimators.errors import UnknownName
from whichlora_estimators.models import bundled_model, load_model
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import Remote, RemoteError, open_remote
from whichlora_profiles_db.remotes import Folder

from ..api import SCHEMA
from .tables import table

_AT_ONCE = 64


def token_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that gives a server's token."""
    text = "Of a server at http(s)://; $WHICHLORA_TOKEN does not show in the list of processes."
    return click.option("--token", help=text)(command)


def remote_at(url: str, token: str | None, *, there: bool = False) -> Remote:
    """Return the remote at a URL; a token goes to servers only. What is only read has to be `there`, if it is a folder."""
    remote = open_remote(url, token=token) if url.startswith(("http://", "https://")) else open_remote(url)
    if there and isinstance(remote, Folder) and not remote.path.is_dir():
        todo = "Check the path; the first push to a folder makes it."
        raise RemoteError("no such folder", value=str(remote.path), todo=todo)
    return remote


def echo_answers(
    server: str, token: str | None, requests: Sequence[dict[str, Any]], *, as_json: bool, offline: bool
) -> None:
    """Have a server predict, and print what it says. Raises RemoteError."""
    from whichlora_profiles_db.http_remote import HttpRemote

    remote = HttpRemote(server, token=token)
    full = [fields | _model(fields["model"], offline) for fields in requests]
    answers: list[dict[str, Any]] = []
    for start in range(0, len(full), _AT_ONCE):
        answers += remote.ask("POST", "/v1/estimates", {"requests": full[start : start + _AT_ONCE]})["predictions"]
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "server": remote.url, "predictions": answers}, indent=1))
        return
    for text in dict.fromkeys(f"{each['model']}: {text}" for each in answers for text in each.get("caveats", ())):
        click.echo(text, err=True)
    headers = ("model", "gpu", "batch", "allocated", "reserved", "process", "verdict", "time", "evidence")
    rows = [_cells(*each) for each in zip(requests, answers, strict=True)]
    click.echo(table(headers, rows, right=range(2, 6)))


def _model(name: str, offline: bool) -> dict[str, Any]:
    """Name a model that the server has too; of any other send the config."""
    try:
        return {"model": bundled_model(name).name}
    except UnknownName:
        shape = load_model(name, offline=offline)
        return {"model": shape.name, "config": dict(shape.config)}


def _cells(fields: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        said = f"{answer['error']['what']}: {answer['error']['value']}"
        return [fields["model"], fields["gpu"], str(fields["batch_size"]), "-", "-", "-", said, "-", "-"]
    counters = ("allocated_peak_bytes", "reserved_peak_bytes", "process_bytes")
    memory = [format_bytes(answer[name]) for name in counters]
    return [
        answer["model"],
        answer["gpu"],
        str(fields["batch_size"]),
        *memory,
        answer["verdict"],
        " + ".join(_times(answer)),
        answer["evidence"],
    ]


def _times(answer: dict[str, Any]) -> Iterable[str]:
    for name, unit in (("step_s", "a step"), ("prefill_s", "prefill"), ("decode_s_per_token", "a token")):
        if answer.get(name) is not None:
            yield f"{format_seconds(answer[name])} {unit}"
