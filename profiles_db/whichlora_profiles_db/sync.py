"""Exchanging measurements with a remote: push what it lacks, pull what we lack, from any number of machines at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import imports, session, union
from .errors import BadPack
from .filters import Filters, where
from .pack_reader import PackReader
from .pack_stage import MOST_FILE_BYTES
from .packs import copy_out, file_sha256
from .remotes import Remote, pack_name, sha256_of
from .store import Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

#: Rows of one pack that is pushed: small enough that a bad line costs little.
ROWS_A_PACK = 1_000_000
OnPack = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """The packs that were uploaded, and how many rows these hold."""

    packs: tuple[str, ...]
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What came from a remote: packs that were taken, new rows, and by name why other packs were not taken.

    `waiting` are packs that were refused before by this version and have not been fetched again.
    """

    packs: tuple[str, ...]
    added: int
    refused: dict[str, str] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A pack on its way: its name on the remote, its file, and which rows of the store it holds."""

    name: str
    path: Path
    rows: int
    ranges: tuple[tuple[int, int], ...]


def push(
    store: Store,
    remote: Remote,
    filters: Filters | None = None,
    *,
    with_names: bool = False,
    on_pack: OnPack | None = None,
) -> Pushed:
    """Upload the measurements that are in none of the remote's packs, one pack a card and month.

    Which rows a pack holds is noted in the store before its upload, and counts only once the pack is seen there: killed
    at any moment, nothing is lost and nothing is uploaded twice. Raises RemoteError, and what `Store` raises.
    """
    if not store.exists:
        return Pushed(packs=(), rows=0)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="whichlora-push-") as name:
        made = _make_packs(store, remote.list(), filters, Path(name), with_names=with_names)
        for number, each in enumerate(made, start=1):
            if on_pack:
                on_pack(number, len(made), each.name)
            remote.put(each.name, each.path)
            each.path.unlink()
    return Pushed(packs=tuple(each.name for each in made), rows=sum(each.rows for each in made))


def pull(
    store: Store,
    remote: Remote,
    *,
    partial: bool = False,
    again: bool = False,
    on_pack: OnPack | None = None,
    reader: PackReader | None = None,
) -> Pulled:
    """Take every pack of the remote that the store has not seen; each whole or not at all.

    A pack that is refused goes into quarantine and does not keep the others from coming; it is fetched again only by
    another version, or with `again` or `partial`. What does not hash to its name (an unfinished upload, damage) is not
    a pack. Raises RemoteError, and what `Store` raises.
    """
    seen = _seen(store)
    new = [name for name in remote.list() if sha256_of(name) not in seen]
    waiting = [] if again or partial else [name for name in new if imports.was_refused(store, sha256_of(name))]
    asked = [name for name in new if name not in set(waiting)]
    refused: dict[str, str] = {}
    added = 0
    with imports.reading(reader) as opened:
        for number, name in enumerate(asked, start=1):
            if on_pack:
                on_pack(number, len(asked), name)
            try:
                added += _take(store, remote, name, partial=partial, reader=opened)
            except BadPack as error:
                refused[name] = str(error)
    taken = tuple(name for name in asked if name not in refused)
    return Pulled(packs=taken, added=added, refused=refused, waiting=tuple(waiting))


def _take(store: Store, remote: Remote, name: str, *, partial: bool, reader: PackReader) -> int:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="whichlora-pull-") as folder:
        pack = Path(folder) / "fetched"
        remote.fetch(name, pack, most_bytes=MOST_FILE_BYTES)
        if file_sha256(pack) != sha256_of(name):
            todo = "An upload that is not complete, or damage; it is looked at again the next time."
            raise BadPack("a pack that does not hash to its name", value=name, todo=todo)
        return imports.import_pack(store, pack, partial=partial, name=name, reader=reader).added


def _seen(store: Store) -> set[str]:
    if not store.exists:
        return set()
    with session.reading(store.path, wait_s=store.wait_s) as connection:
        return {pack for (pack,) in connection.execute("SELECT DISTINCT pack FROM packed").fetchall()}


def _make_packs(
    store: Store, listed: Iterable[str], filters: Filters | None, folder: Path, *, with_names: bool
) -> list[_Made]:
    """Write what the listed packs do not hold into packs of their own, and note what is in them."""
    outside = session.Outside(folders=(folder,))
    with session.reading(store.path, wait_s=store.wait_s, outside=outside) as connection:
        _find_unshared(connection, [sha256_of(name) for name in listed], filters)
        parts = connection.execute("SELECT DISTINCT gpu, month, part FROM unshared ORDER BY ALL").fetchall()
        made = [
            _make_pack(connection, part, folder / f"{number}.parquet", with_names=with_names)
            for number, part in enumerate(parts)
        ]
    if made:
        with session.writing(store.path, wait_s=store.wait_s) as connection:
            for each in made:
                union.note_ranges(connection, sha256_of(each.name), each.ranges)
    return made


def _find_unshared(connection: DuckDBPyConnection, packs: list[str], filters: Filters | None) -> None:
    """Make a table of the rows that none of `packs` holds, with the card, the month and the part they belong to."""
    condition, values = where(filters)
    connection.execute(_SHARED, [packs])
    connection.execute(_UNSHARED.replace("$condition", condition), values)


def _make_pack(connection: DuckDBPyConnection, part: tuple[Any, ...], path: Path, *, with_names: bool) -> _Made:
    rows = "SELECT seq FROM unshared WHERE gpu IS NOT DISTINCT FROM ? AND month IS NOT DISTINCT FROM ? AND part = ?"
    manifest = copy_out(connection, path, f"seq IN ({rows})", list(part), with_names=with_names)
    ranges = connection.execute(
        f"SELECT min(seq), max(seq) FROM ({_ISLANDS.format(rows=rows)}) GROUP BY island", [*part]
    )
    gpu, month, _ = part
    name = pack_name(gpu, month, file_sha256(path))
    return _Made(name=name, path=path, rows=manifest.rows, ranges=tuple(ranges.fetchall()))


_ISLANDS = "SELECT seq, seq - row_number() OVER (ORDER BY seq) AS island FROM ({rows})"
# Ranges that overlap or touch become one, so that each row is compared with one range only.
_SHARED = """
CREATE TEMP TABLE shared AS
WITH found AS (SELECT first_seq, last_seq FROM packed WHERE pack IN (SELECT unnest(?::VARCHAR[]))),
begun AS (
    SELECT *, coalesce(first_seq > 1 + max(last_seq) OVER (
        ORDER BY first_seq, last_seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), true) AS begins FROM found
),
numbered AS (SELECT *, sum(begins::INT) OVER (ORDER BY first_seq, last_seq ROWS UNBOUNDED PRECEDING) AS n FROM begun)
SELECT min(first_seq) AS first_seq, max(last_seq) AS last_seq FROM numbered GROUP BY n
"""
_UNSHARED = f"""
CREATE TEMP TABLE unshared AS
SELECT m.seq, m.gpu, m.month, row_number() OVER (PARTITION BY m.gpu, m.month ORDER BY m.seq) // {ROWS_A_PACK} AS part
FROM (SELECT seq, gpu, strftime(measured_at, '%Y-%m') AS month FROM measurement WHERE $condition) AS m
ASOF LEFT JOIN shared AS s ON m.seq >= s.first_seq
WHERE s.last_seq IS NULL OR s.last_seq < m.seq
"""
