"""Opening the store's file for one short piece of work, and waiting for others who do the same.

DuckDB lets one process write a file, or many read it, and refuses everybody else at once. So nothing here stays open:
each read and each write opens the file, does its work and closes it, and whoever finds it taken tries again, with
growing pauses, until the wait is over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import migrations
from .errors import NotAStore, StoreBusy, StoreError
from .held import Held, held, kept

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.25
# What DuckDB (1.2 to 2.0) says when another process has the file, on POSIX and on Windows, or another part of this one.
_TAKEN = re.compile(r"Could not set lock(?!.*not supported)|used by another process|different configuration", re.DOTALL)
_HOLDER = re.compile(r"\(PID (\d+)\)")
# What it says of files that may well be stores, and what helps.
_REFUSALS = {
    r"locks are not supported": "Its file system has no file locks, which keep writers apart: use another folder.",
    r"[Pp]ermission denied|[Rr]ead-only file system": "It may not be written here: ask for access, or work on a copy.",
    r"newer version of DuckDB": "A newer DuckDB wrote it: upgrade the package duckdb.",
}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_locks: dict[Path, threading.RLock] = {}
_recognized: dict[Path, tuple[int, int] | None] = {}  # device and inode of files that were seen to be stores
_locks_guard = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a connection may reach beside its own file: `files`, what lies in `folders`, other DuckDB `databases`.

    Everything else, and every other setting, is closed before the first statement runs.
    """

    files: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    databases: Mapping[str, Path] = field(default_factory=dict)
    memory_bytes: int = 1 << 30

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files, folders and databases."""
        return (*self.files, *self.folders, *self.databases.values())

    def open(self, connection: DuckDBPyConnection) -> None:
        """Open the databases read-only, allow the files, and lock the rest out."""
        for name, path in self.databases.items():
            connection.execute(f'ATTACH {quoted(str(path))} AS "{name}" (READ_ONLY)')
        for setting, paths in (("allowed_paths", self.files), ("allowed_directories", self.folders)):
            connection.execute(f"SET {setting} = [{', '.join(quoted(str(path)) for path in paths)}]")
        connection.execute("SET enable_external_access = false")
        connection.execute(f"SET memory_limit = '{self.memory_bytes} B'")
        connection.execute("SET lock_configuration = true")


def quoted(text: str) -> str:
    """Return a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def reading(path: Path, *, wait_s: float, outside: Outside | None = None) -> Iterator[DuckDBPyConnection]:
    """Open an existing store read-only, at the latest schema, and close it afterwards.

    `outside` names what else SQL may reach. Raises StoreBusy, NotAStore, StoreTooNew or StoreError.
    """
    if ours := held(path):
        ours.allow(outside.paths if outside else ())
        with ours.reading() as cursor:
            yield cursor
        return
    deadline = _Deadline(wait_s)
    _recognize(path, deadline)
    with _opened(path, deadline, read_only=True, outside=outside) as connection:
        migrations.schema_number(connection, path)  # another process may have upgraded it since we first looked
        yield connection


@contextlib.contextmanager
def reading_as_is(path: Path, *, wait_s: float) -> Iterator[DuckDBPyConnection]:
    """Open a file read-only, whatever its schema: one that belongs to somebody else, and is not brought up to date."""
    with _opened(path, _Deadline(wait_s), read_only=True) as connection:
        yield connection


@contextlib.contextmanager
def writing(path: Path, *, wait_s: float, outside: Outside | None = None) -> Iterator[DuckDBPyConnection]:
    """Open a store, made if absent, for one transaction: committed at the end, rolled back on any exception.

    `outside` names what else SQL may reach. When this returns, what was written is on disk.
    Raises StoreBusy, NotAStore, StoreTooNew or StoreError.
    """
    if ours := held(path):
        ours.allow(outside.paths if outside else ())
        with ours.writing(wait_s=wait_s, databases=outside.databases if outside else {}) as cursor:
            yield cursor
        return
    deadline = _Deadline(wait_s)
    if not exists(path):
        _create(path, deadline)
    _recognize(path, deadline)
    with _opened(path, deadline, read_only=False, outside=outside) as connection:
        migrations.migrate(connection, path)
        connection.execute("BEGIN TRANSACTION")
        yield connection
        connection.execute("COMMIT")


@contextlib.contextmanager
def holding(path: Path, folder: Path, *, wait_s: float) -> Iterator[Held]:
    """Keep a store open, made if absent: `reading` and `writing` in this process share one connection until the end.

    Beside the store, SQL reaches `folder` and nothing else. Raises what `writing` raises.
    """
    deadline, folder = _Deadline(wait_s), folder.resolve()
    if not exists(path):
        _create(path, deadline)
    _recognize(path, deadline)
    connection = _connect(path, deadline, read_only=False, reaches_out=True)
    try:
        migrations.migrate(connection, path)
        Outside(folders=(folder,)).open(connection)
        with kept(Held(path, folder, connection)) as store:
            yield store
    finally:
        connection.close()


def exists(path: Path) -> bool:
    """Say whether there is a file. Raises StoreError where that cannot be seen, which is not the same as none."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        todo = "Check the path, and that its folders may be read."
        raise StoreError(f"the store cannot be found ({error.strerror})", value=str(path), todo=todo) from error
    return True


class _Deadline:
    """Counts down from `wait_s`."""

    def __init__(self, wait_s: float) -> None:
        self._start_s = time.monotonic()
        self._wait_s = wait_s

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._start_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._wait_s - self.waited_s)


@contextlib.contextmanager
def _opened(
    path: Path, deadline: _Deadline, *, read_only: bool, outside: Outside | None = None
) -> Iterator[DuckDBPyConnection]:
    import duckdb

    with _only_us(path, deadline):
        connection = _connect(path, deadline, read_only=read_only, reaches_out=outside is not None)
        try:
            if outside:
                outside.open(connection)
            yield connection
        except duckdb.Error as error:
            done = "read" if read_only else "written"
            todo = f"Nothing was changed. DuckDB says: {_first_line(error)}"
            raise StoreError(f"the store could not be {done}", value=str(path), todo=todo) from error
        finally:
            connection.close()


@contextlib.contextmanager
def _only_us(path: Path, deadline: _Deadline) -> Iterator[None]:
    """Keep the other threads of this process out: DuckDB refuses one file opened in two ways by one process."""
    with _locks_guard:
        lock = _locks.setdefault(path, threading.RLock())
    if not lock.acquire(timeout=deadline.left_s):
        raise StoreBusy(path, waited_s=deadline.waited_s, holder="another thread")
    try:
        yield
    finally:
        lock.release()


def _connect(path: Path, deadline: _Deadline, *, read_only: bool, reaches_out: bool = False) -> DuckDBPyConnection:
    import duckdb

    config = settings(reaches_out=reaches_out)

    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only, config=config)
        except duckdb.Error as error:
            if not _TAKEN.search(str(error)):
                raise _cannot_open(path, error) from error
            if deadline.left_s <= 0:
                raise StoreBusy(path, waited_s=deadline.waited_s, holder=_holder(error)) from error
        time.sleep(min(pause_s * random.uniform(0.5, 1.5), deadline.left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def settings(*, reaches_out: bool = False) -> dict[str, str | bool | int | float | list[str]]:
    """Return DuckDB's settings: nothing from the network or from other files, a file that DuckDB 1.2 can read.

    With `reaches_out`, other files stay open until `Outside.open` has closed them, but for those it names.
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "threads": min(4, os.cpu_count() or 1),
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "storage_compatibility_version": "v1.2.0",
    }
    return config if reaches_out else {"enable_external_access": "false", **config}


def _cannot_open(path: Path, error: Exception) -> StoreError:
    """Say why DuckDB refused a file. Reading its first bytes here is safe: this process has it not open."""
    if path.is_dir():
        return NotAStore(path, why="a folder")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as problem:
        todo = "Check that the file and its folder may be read and written."
        return StoreError(f"the store cannot be opened ({problem.strerror})", value=str(path), todo=todo)
    if not head:
        return NotAStore(path, why="an empty file")
    if head[8:12] != b"DUCK":  # DuckDB's magic, behind the checksum of its first block
        return NotAStore(path, why="not a DuckDB file")
    for said, todo in _REFUSALS.items():
        if re.search(said, str(error)):
            return StoreError("the store cannot be opened", value=str(path), todo=todo)
    return NotAStore(path, why=_first_line(error))


def _recognize(path: Path, deadline: _Deadline) -> None:
    """Look at a file that we meet for the first time, without touching it, and bring our own up to date.

    Raises NotAStore or StoreTooNew.
    """
    identity = _identity(path)
    if _recognized.get(path) == identity is not None:
        return
    with _opened(path, deadline, read_only=True) as connection:
        found = migrations.schema_number(connection, path)
    if found < migrations.latest():
        with _opened(path, deadline, read_only=False) as connection:
            migrations.migrate(connection, path)
    _recognized[path] = identity


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _create(path: Path, deadline: _Deadline) -> None:
    """Make an empty store that appears under its name complete or not at all, and never over another's."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(fresh, deadline)
        _publish(fresh, path, deadline)
    except StoreBusy:
        raise
    except (OSError, StoreError) as error:
        todo = "Check that the folder may be written and has room, or name another file."
        raise StoreError("the store cannot be made", value=str(path), todo=f"{todo} ({_first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def _make(path: Path, deadline: _Deadline) -> None:
    with _opened(path, deadline, read_only=False) as connection:
        migrations.migrate(connection, path)


def _publish(fresh: Path, path: Path, deadline: _Deadline) -> None:
    """Give a complete file its name, unless somebody was faster."""
    try:
        if os.name == "nt":
            fresh.rename(path)  # which refuses to replace on Windows, and only there
        else:
            path.hardlink_to(fresh)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _make(path, deadline)  # a file system without hard links: DuckDB's lock still keeps others out meanwhile


def _holder(error: Exception) -> str:
    found = _HOLDER.search(str(error))
    return f"process {found[1]}" if found else "the other process"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _forget_locks() -> None:
    """After a fork: the locks of threads that exist in the parent only would never be released."""
    global _locks_guard
    _locks.clear()
    _locks_guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
