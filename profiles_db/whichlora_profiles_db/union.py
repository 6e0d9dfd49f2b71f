"""The union of a store with the rows of another DuckDB file, in SQL: what is there stays, what is new is added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .rows import COLUMNS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
_ROW = ", ".join(f'{{table}}."{name}"' for name in COLUMNS if name != "id")


def add_rows(connection: DuckDBPyConnection, source: str, *, order: str) -> int:
    """Append the rows of `source` whose ids the store lacks, in this order; return how many."""
    counted = connection.execute(
        f"INSERT INTO measurement (seq, {_NAMES}) "
        f"SELECT (SELECT coalesce(max(seq), 0) FROM measurement) + row_number() OVER (ORDER BY {order}), {_NAMES} "
        f"FROM {source} AS incoming "
        "WHERE NOT EXISTS (SELECT 1 FROM measurement AS known WHERE known.id = incoming.id)"
    ).fetchone()
    return int(counted[0]) if counted else 0


def add_configs(connection: DuckDBPyConnection, source: str) -> None:
    """Add the configs of `source` that the store lacks."""
    connection.execute(
        f"INSERT INTO config SELECT id, config FROM {source} AS incoming "
        "WHERE NOT EXISTS (SELECT 1 FROM config AS known WHERE known.id = incoming.id)"
    )


def add_origins(connection: DuckDBPyConnection, source: str) -> None:
    """Add the names of hosts and users in `source` that the store lacks."""
    connection.execute(
        f"INSERT INTO origin SELECT DISTINCT measurement_id, kind, name FROM {source} AS incoming "
        "WHERE NOT EXISTS (SELECT 1 FROM origin AS known WHERE known.measurement_id = incoming.measurement_id "
        "AND known.kind = incoming.kind AND known.name = incoming.name)"
    )


def disagreeing(connection: DuckDBPyConnection, source: str) -> str | None:
    """Return the first id under which the store and `source` hold different content, None where they agree."""
    one, other = (_ROW.format(table=table) for table in ("known", "incoming"))
    found = connection.execute(
        f"SELECT min(incoming.id) FROM {source} AS incoming JOIN measurement AS known USING (id) "
        f"WHERE hash({one}) <> hash({other})"
    ).fetchone()
    return found[0] if found else None


def note_packed(connection: DuckDBPyConnection, pack: str, ids: str) -> None:
    """Note which rows of the store are in a pack: those whose id is in the query `ids`, as ranges of seq."""
    connection.execute(
        "INSERT INTO packed SELECT ?, min(seq), max(seq) FROM ("
        "SELECT seq, seq - row_number() OVER (ORDER BY seq) AS island FROM measurement "
        f"WHERE id IN ({ids})) GROUP BY island",
        [pack],
    )


def note_ranges(connection: DuckDBPyConnection, pack: str, ranges: Iterable[tuple[int, int]]) -> None:
    """Note which rows of the store are in a pack, given as ranges of seq, both ends included."""
    firsts, lasts = map(list, zip(*ranges, strict=True))
    connection.execute(
        "INSERT INTO packed SELECT * FROM (SELECT ?::VARCHAR AS pack, unnest(?::BIGINT[]) AS first_seq, "
        "unnest(?::BIGINT[]) AS last_seq) AS noted "
        "WHERE NOT EXISTS (SELECT 1 FROM packed AS known WHERE known.pack = noted.pack "
        "AND known.first_seq = noted.first_seq AND known.last_seq = noted.last_seq)",
        [pack, firsts, lasts],
    )


def is_packed(connection: DuckDBPyConnection, pack: str) -> bool:
    """Say whether the rows of a pack are known to be in the store."""
    return connection.execute("SELECT 1 FROM packed WHERE pack = ? LIMIT 1", [pack]).fetchone() is not None
