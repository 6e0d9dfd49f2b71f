"""Running the server: one process, one store, until a signal; then what was begun is finished."""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_profiles_db import StoreBusy

from .settings import Settings

if TYPE_CHECKING:
    from .keeper import Keeper

#: How long a store in use is waited for before that is said.
AT_FIRST_S = 2.0

#: How long answers that are under way may take once the server is to stop.
LAST_ANSWERS_S = 30


def run(settings: Settings, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises WhichloraError where the extra is missing, BadValue for an address that cannot be had, StoreBusy for a store
    in use.
    """
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise WhichloraError("the server needs more packages", todo="Run: pip install 'whichlora[serve]'.")
    import uvicorn

    from .app import make_app

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends itself again what ended it, once all is answered
        signal.signal(number, _end)
    with _listening(host, port) as link, _holding(settings) as keeper:
        config = uvicorn.Config(
            make_app(settings, keeper),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS_S,
            timeout_keep_alive=30,
            limit_concurrency=2000,
        )
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"http://{shown}:{port}{settings.root_path}/ serves {settings.store}; Ctrl-C ends it", err=True)
        uvicorn.Server(config).run(sockets=[link])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        todo = f"{error.strerror}. Choose others with --host and --port."
        raise BadValue("cannot listen there", value=f"{host}:{port}", todo=todo) from None


@contextmanager
def _holding(settings: Settings) -> Iterator[Keeper]:
    """Own the store; say so before waiting long for whoever has it, a server that is ending perhaps."""
    from .keeper import Keeper

    with ExitStack() as stack:
        try:
            keeper = stack.enter_context(Keeper(settings.store, jobs=settings.jobs, wait_s=AT_FIRST_S))
        except StoreBusy as error:
            click.echo(f"{settings.store} is in use: waiting for it. {error.todo}", err=True)
            keeper = stack.enter_context(Keeper(settings.store, jobs=settings.jobs))
        yield keeper


def _end(number: int, frame: FrameType | None) -> None:
    """End as after the last line: what was submitted is written, and the store closed."""
    sys.exit(0)
