"""A store that this process keeps open: readers are cursors on snapshots of it, writers take turns.

DuckDB gives a file to one process. A server that answers hundreds at once cannot open it for each, so it holds one
connection; while it does, everything in this process that reads or writes the store goes through that connection.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import StoreBusy, StoreError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True, slots=True)
class Held:
    """A connection that stays open. SQL reaches the store, and files within `folder`; nothing else."""

    path: Path
    folder: Path
    connection: DuckDBPyConnection
    turn: threading.RLock = field(default_factory=threading.RLock)
    opening: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def reading(self) -> Iterator[DuckDBPyConnection]:
        """Give a cursor that sees the store as it is now, whatever is written meanwhile."""
        with self._cursor() as cursor:
            cursor.execute("BEGIN TRANSACTION")
            yield cursor
            cursor.execute("ROLLBACK")

    @contextlib.contextmanager
    def writing(self, *, wait_s: float, databases: Mapping[str, Path]) -> Iterator[DuckDBPyConnection]:
        """Give a cursor within a transaction that is committed at the end, rolled back on any exception."""
        if not self.turn.acquire(timeout=wait_s):
            raise StoreBusy(self.path, waited_s=wait_s, holder="another writer of this process")
        try:
            with self._cursor() as cursor, _attached(cursor, databases):
                cursor.execute("BEGIN TRANSACTION")
                try:
                    yield cursor
                except BaseException:
                    cursor.execute("ROLLBACK")
                    raise
                cursor.execute("COMMIT")
        finally:
            self.turn.release()

    def allow(self, paths: tuple[Path, ...]) -> None:
        """Raise StoreError for paths that are out of reach: what may be reached was settled when the store was opened."""
        for path in paths:
            if not path.resolve().is_relative_to(self.folder):
                todo = f"While the store is held, files go through {self.folder}."
                raise StoreError("a file out of the store's reach", value=str(path), todo=todo)

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[DuckDBPyConnection]:
        import duckdb

        with self.opening:
            cursor = self.connection.cursor()
        try:
            yield cursor
        except duckdb.Error as error:
            todo = f"Nothing was changed. DuckDB says: {str(error).strip().splitlines()[0]}"
            raise StoreError("the store could not be used", value=str(self.path), todo=todo) from error
        finally:
            cursor.close()


@contextlib.contextmanager
def _attached(cursor: DuckDBPyConnection, databases: Mapping[str, Path]) -> Iterator[None]:
    """Open other databases beside the store; a connection that stays must close them itself."""
    attached = []
    try:
        for name, path in databases.items():
            literal = str(path).replace("'", "''")
            cursor.execute(f"ATTACH '{literal}' AS \"{name}\" (READ_ONLY)")
            attached.append(name)
        yield
    finally:
        for name in attached:
            cursor.execute(f'DETACH "{name}"')


_held: dict[Path, Held] = {}


def held(path: Path) -> Held | None:
    """Return the connection that this process keeps to a store, if it does."""
    return _held.get(path)


@contextlib.contextmanager
def kept(store: Held) -> Iterator[Held]:
    """Send every use of a store in this process through one connection until the block ends, then close it."""
    if store.path in _held:
        raise StoreError("the store is held already", value=str(store.path), todo="Serve each store once.")
    _held[store.path] = store
    try:
        yield store
    finally:
        with store.turn:  # whoever writes ends first
            del _held[store.path]
            store.connection.close()
