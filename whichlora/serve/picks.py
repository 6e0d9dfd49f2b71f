"""Searches of `whichlora pick`, each in a process of its own: they tell how far they are, and can be ended."""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from whichlora_estimators.errors import BadValue, WhichloraError

from .work import Busy, serve_parent

#: Searches whose result is kept.
KEPT = 100


class UnknownPick(WhichloraError):
    """A search that there is not, or not any more."""


@dataclass(slots=True)
class Pick:
    """A search: where it is, what it said, what came out."""

    id: str
    state: str = "running"
    progress: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    task: asyncio.Task[None] | None = None
    moved: asyncio.Condition = field(default_factory=asyncio.Condition)

    def as_json(self) -> dict[str, Any]:
        """Return what everybody may know of it."""
        return {
            "id": self.id,
            "state": self.state,
            "progress": list(self.progress),
            "result": self.result,
            "error": self.error,
        }


class Picks:
    """All searches of a server."""

    def __init__(self, *, most: int, limit_s: float) -> None:
        self._most, self._limit_s = most, limit_s
        self._all: OrderedDict[str, Pick] = OrderedDict()

    @property
    def running(self) -> int:
        """How many run."""
        return sum(pick.state == "running" for pick in self._all.values())

    def start(self, fields: dict[str, Any]) -> Pick:
        """Start a search. Raises Busy where too many run, and WhichloraError for a config that cannot be."""
        if self.running >= self._most:
            raise Busy("too many searches run")
        _config(fields)
        pick = Pick(id=secrets.token_hex(8))
        self._all[pick.id] = pick
        pick.task = asyncio.create_task(self._run(pick, fields))
        for old in [each for each, one in self._all.items() if one.state != "running"][: max(0, len(self._all) - KEPT)]:
            del self._all[old]
        return pick

    def get(self, id_: str) -> Pick:
        """Return a search. Raises UnknownPick."""
        if id_ not in self._all:
            raise UnknownPick("no search has this id", value=id_, todo="Start one with POST /v1/picks.")
        return self._all[id_]

    async def cancel(self, id_: str) -> Pick:
        """End a search; one that is done stays as it is."""
        pick = self.get(id_)
        if pick.task is not None and pick.state == "running":
            pick.task.cancel()
            await asyncio.gather(pick.task, return_exceptions=True)
        return pick

    async def close(self) -> None:
        """End them all."""
        for id_ in list(self._all):
            await self.cancel(id_)

    async def follow(self, pick: Pick) -> AsyncIterator[tuple[str, Any]]:
        """Yield what a search says, from the start, and its end."""
        told = 0
        while True:
            async with pick.moved:
                while len(pick.progress) == told and pick.state == "running":
                    await pick.moved.wait()
            for text in pick.progress[told:]:
                yield "progress", {"text": text}
            told = len(pick.progress)
            if pick.state != "running":
                yield pick.state, pick.as_json()
                return

    async def _run(self, pick: Pick, fields: dict[str, Any]) -> None:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_search, args=(theirs, fields), daemon=True)
        end_s = time.monotonic() + self._limit_s
        try:
            await asyncio.to_thread(process.start)
            theirs.close()
            while pick.state == "running":
                await self._hear(pick, ours, end_s)
        except asyncio.CancelledError:
            pick.state = "cancelled"
        finally:
            if process.pid is not None:
                process.kill()
                await asyncio.to_thread(process.join)
            ours.close()
            async with pick.moved:
                pick.moved.notify_all()

    async def _hear(self, pick: Pick, ours: Connection, end_s: float) -> None:
        """Take one message of the process, or see that it is gone or late."""
        kind: str
        said: Any
        try:
            heard = await asyncio.to_thread(ours.poll, 0.2)
            kind, said = ours.recv() if heard else ("nothing", None)
        except (EOFError, OSError):
            kind, said = "error", {"what": "the search broke off", "value": None, "todo": "Try again, or ask for less."}
        if kind == "nothing" and time.monotonic() > end_s:
            what = f"the search takes longer than {self._limit_s:g} s"
            kind, said = "error", {"what": what, "value": None, "todo": "Ask for fewer models, methods or batch sizes."}
        if kind == "progress":
            pick.progress.append(said)
        elif kind == "result":
            pick.state, pick.result = "done", said
        elif kind == "error":
            pick.state, pick.error = "failed", said
        if kind != "nothing":
            async with pick.moved:
                pick.moved.notify_all()


def _config(fields: dict[str, Any]) -> Any:
    """Read a config whose models are all bundled: no file and no Hub is looked at for a request."""
    from whichlora_estimators.models import bundled_model

    from ..pickconfig import config_from_fields

    config = config_from_fields(fields)
    for name in config.models:
        bundled_model(name)
    if config.tokenizers or config.data:
        raise BadValue("a config that names files", todo="Leave out tokenizers and data files; give dataset.samples.")
    return config


def _search(connection: Connection, fields: dict[str, Any]) -> None:
    """Search, in the process of its own."""
    from ..cli.pick import answer
    from ..pick import pick

    serve_parent()
    try:
        result = pick(_config(fields), offline=True, report=lambda text: connection.send(("progress", text)))
        connection.send(("result", answer(result, None)))
    except WhichloraError as error:
        value = None if error.value is None else repr(error.value)[:300]
        connection.send(("error", {"what": error.what, "value": value, "todo": error.todo}))
