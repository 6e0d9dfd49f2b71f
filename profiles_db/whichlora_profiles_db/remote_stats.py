"""What a remote holds, asked of its packs where they lie: only the columns that the answer needs are read."""

from __future__ import annotations

import tempfile
from fnmatch import fnmatchcase

from whichlora_estimators.errors import BadValue

from . import session
from .filters import Filters, listed, where
from .packs import literal_path
from .remotes import Folder, FsspecRemote, Remote, RemoteError, month_of, partition
from .store import GroupStats, group_stats, groups_sql

_MEMORY = "1GB"


def remote_stats(remote: Remote, filters: Filters | None = None) -> tuple[GroupStats, ...]:
    """Return how much a remote holds, by card and evidence, reading its packs in place.

    Only packs of the cards and months that `filters` may let through are opened. Rows are counted as the packs say: they
    are not checked, and one that several packs hold counts in each. Raises RemoteError.
    """
    import duckdb

    from .http_remote import HttpRemote  # only now: nothing else that starts with the store needs HTTP

    if isinstance(remote, HttpRemote):
        return remote.stats(filters)
    names = [name for name in remote.list() if may_hold(name, filters)]
    if not names:
        return ()
    condition, values = where(filters)
    with tempfile.TemporaryDirectory() as spilled, duckdb.connect(config=_settings(spilled)) as connection:
        files = _open(connection, remote, names)
        try:
            sql = groups_sql("read_parquet(?, hive_partitioning = false)", condition)
            return tuple(group_stats(row) for row in connection.execute(sql, [files, *values]).fetchall())
        except duckdb.Error as error:
            todo = f"One of its packs cannot be read; pull tells which. ({str(error).splitlines()[0][:300]})"
            raise RemoteError("the remote's packs cannot be asked", value=remote.url, todo=todo) from error


def _settings(spilled: str) -> dict[str, str | bool | int | float | list[str]]:
    """Bound the memory; what is too large for it goes into a folder of ours, not the user's."""
    return {"memory_limit": _MEMORY, "temp_directory": spilled, **session.settings(reaches_out=True)}


def may_hold(name: str, filters: Filters | None) -> bool:
    """Say whether a pack of this name can hold anything that `filters` let through, going by card and month."""
    if filters is None:
        return True
    gpu, month = partition(name)
    if filters.gpu is not None:
        asked = [one.lower() for one in listed("gpu", filters.gpu)]
        if gpu is None or not any(one == gpu or fnmatchcase(gpu, one.replace("[", "[[]")) for one in asked):
            return False
    if filters.since is None and filters.until is None:
        return True
    since, until = month_of(filters.since) or "", month_of(filters.until) or "9999-99"
    return month is not None and since <= month <= until


def _open(connection: object, remote: Remote, names: list[str]) -> list[str]:
    import duckdb

    assert isinstance(connection, duckdb.DuckDBPyConnection)
    if isinstance(remote, Folder):
        session.Outside(folders=(remote.path,)).open(connection)
        return [literal_path(remote.path / name) for name in names]
    if isinstance(remote, FsspecRemote):
        connection.register_filesystem(remote.filesystem)
        return [f"{remote.protocol}://{remote.path(name)}" for name in names]
    todo = "Pull it, and ask the store."
    raise BadValue("the packs of this remote cannot be asked in place", value=remote.url, todo=todo)
