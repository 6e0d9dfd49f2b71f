"""Numbered steps from an empty file to today's tables."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import NotAStore, StoreTooNew

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_FOLDER = Path(__file__).with_name("migrations")
_TABLES = "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE NOT internal AND NOT temporary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One step of the schema: its number, a name and the SQL that makes it."""

    number: int
    name: str
    sql: str


@cache
def all_migrations() -> tuple[Migration, ...]:
    """Return every migration in order, from the files `0001_name.sql` and so on."""
    found = tuple(_read(path) for path in sorted(_FOLDER.glob("*.sql")))
    assert [one.number for one in found] == list(range(1, len(found) + 1)), "migrations are numbered without gaps"
    return found


def latest() -> int:
    """Return the schema number that this version writes."""
    return len(all_migrations())


def schema_number(connection: DuckDBPyConnection, path: Path) -> int:
    """Return the schema number of an open file, 0 for one without tables.

    Raises NotAStore for a DuckDB file with other tables than ours, and StoreTooNew.
    """
    tables = {name for (name,) in connection.execute(_TABLES).fetchall()}
    if not tables:
        return 0
    if "main.whichlora_migration" not in tables:
        raise NotAStore(path, why="a DuckDB file with other tables")
    row = connection.execute("SELECT max(number) FROM whichlora_migration").fetchone()
    found = int(row[0]) if row and row[0] is not None else 0
    if found > latest():
        raise StoreTooNew(path, found=found, known=latest())
    return found


def migrate(connection: DuckDBPyConnection, path: Path, *, to: int | None = None) -> None:
    """Bring an open file up to schema `to` (by default the latest), one transaction a step.

    What was done is checkpointed at once: a change of tables should not wait in the log for a crash.
    """
    pending = all_migrations()[schema_number(connection, path) : to]
    for migration in pending:
        connection.execute("BEGIN TRANSACTION")
        connection.execute(migration.sql)
        done = [migration.number, migration.name, datetime.now(timezone.utc).replace(tzinfo=None)]
        connection.execute("INSERT INTO whichlora_migration VALUES (?, ?, ?)", done)
        connection.execute("COMMIT")
    if pending:
        connection.execute("CHECKPOINT")


def _read(path: Path) -> Migration:
    number, _, name = path.stem.partition("_")
    return Migration(number=int(number), name=name, sql=path.read_text(encoding="utf-8"))
