"""Joining two stores, in SQL: for stores of people who trust each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import migrations, session, union
from .errors import NotAStore, StoreBusy, StoreError
from .rows import COLUMNS, LATER, select_list
from .store import Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY_BYTES = 1 << 30
_PAUSE_S = 0.1
_OTHER = "other_store"
_NEEDED = {
    "measurement": {"seq": "BIGINT", **COLUMNS},
    "config": {"id": "VARCHAR", "config": "VARCHAR"},
    "origin": {"measurement_id": "VARCHAR", "kind": "VARCHAR", "name": "VARCHAR"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How many measurements a store gained, of how many in the other."""

    added: int
    rows: int


def merge_store(store: Store, other: Path) -> Merged:
    """Add to `store` what another store's file holds, in one transaction; the other is only read.

    Content is not hashed again: what comes from people one does not trust comes as a pack. Raises StoreError where the
    two hold different content under one id, and what `Store` raises; then `store` is as it was.
    """
    other = other.expanduser().resolve()
    if other == store.path:
        raise StoreError("a store cannot be merged with itself", value=str(other), todo="Name another one.")
    if not session.exists(other):
        raise StoreError("no such store", value=str(other), todo="Check the path.")
    end_s = time.monotonic() + store.wait_s
    while True:
        try:
            return _merge(store, other)
        except StoreBusy as busy:  # ours is free again while we wait for the other, so that nobody waits in a circle
            if time.monotonic() > end_s:
                raise busy from None
            time.sleep(_PAUSE_S)


def _merge(store: Store, other: Path) -> Merged:
    with session.reading_as_is(other, wait_s=0) as connection:
        migrations.schema_number(connection, other)
    outside = session.Outside(databases={_OTHER: other}, memory_bytes=MEMORY_BYTES)
    with session.writing(store.path, wait_s=store.wait_s, outside=outside) as connection:
        lacking = _check_tables(connection, other)
        columns = select_list({"seq": "BIGINT", **COLUMNS}, lacking=lacking)
        rows = f"(SELECT {columns} FROM {_OTHER}.measurement)"
        if id_ := union.disagreeing(connection, rows):
            todo = (
                "One of the two was changed by hand. Export the other as a pack and import that: it checks every row."
            )
            raise StoreError("the stores hold different content under one id", value=id_, todo=todo)
        added = union.add_rows(connection, rows, order="seq")
        union.add_configs(connection, f"{_OTHER}.config")
        union.add_origins(connection, f"{_OTHER}.origin")
        counted = connection.execute(f"SELECT count(*) FROM {_OTHER}.measurement").fetchone()
    return Merged(added=added, rows=counted[0] if counted else 0)


def _check_tables(connection: DuckDBPyConnection, other: Path) -> list[str]:
    """Raise NotAStore unless the other has our tables, as tables, with our columns; return the later ones it lacks."""
    lacking: list[str] = []
    tables = {
        name
        for (name,) in connection.execute(
            "SELECT table_name FROM duckdb_tables() WHERE database_name = ? AND schema_name = 'main'", [_OTHER]
        ).fetchall()
    }
    for table, columns in _NEEDED.items():
        found = connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() "
            "WHERE database_name = ? AND schema_name = 'main' AND table_name = ?",
            [_OTHER, table],
        ).fetchall()
        there = dict(found)
        if table == "measurement":
            lacking = [name for name in LATER if name not in there]
            there |= {name: columns[name] for name in lacking}
        if table not in tables or there != columns:
            raise NotAStore(other, why=f"its table {table} is not a store's")
    return lacking
