"""The store: every measurement of a user or a lab, in one DuckDB file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whichlora_estimators.errors import BadValue, WhichloraError

from . import migrations, session
from .errors import StoreError, UnknownMeasurement
from .filters import Filters, where
from .location import default_path
from .measurement import OUTCOMES, Measurement
from .rows import COLUMNS, RowReader, RowWriter

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

WAIT_S = 60.0
BATCH = 10_000
_ID, _CONFIG_ID = list(COLUMNS).index("id"), list(COLUMNS).index("config_id")

_NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
_INCOMING = ", ".join(f'unnest(?::{kind}[]) AS "{name}"' for name, kind in COLUMNS.items())
_ADD = f"""
INSERT INTO measurement (seq, {_NAMES})
SELECT (SELECT coalesce(max(seq), 0) FROM measurement) + row_number() OVER (), {_NAMES}
FROM (SELECT {_INCOMING}) AS incoming
WHERE NOT EXISTS (SELECT 1 FROM measurement AS known WHERE known.id = incoming.id)
"""
_ADD_CONFIGS = """
INSERT INTO config
SELECT id, config FROM (SELECT unnest(?::VARCHAR[]) AS id, unnest(?::VARCHAR[]) AS config) AS incoming
WHERE NOT EXISTS (SELECT 1 FROM config AS known WHERE known.id = incoming.id)
"""
_ADD_ORIGINS = """
INSERT INTO origin
WITH incoming AS (
    SELECT unnest(?::VARCHAR[]) AS measurement_id, unnest(?::VARCHAR[]) AS kind, unnest(?::VARCHAR[]) AS name
)
FROM incoming
EXCEPT SELECT measurement_id, kind, name FROM origin WHERE measurement_id IN (SELECT measurement_id FROM incoming)
"""
_CONFIGS = "SELECT id, config FROM config WHERE id IN (SELECT unnest(?::VARCHAR[]))"
# Where stores that disagree on a name were joined, the first in alphabetical order stands, whoever was joined to whom.
_ORIGINS = """
SELECT measurement_id, kind, min(name) FROM origin
WHERE measurement_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY measurement_id, kind
"""
_GROUPS = f"""
SELECT gpu, evidence, count(DISTINCT model), count(DISTINCT workload_id), min(measured_at), max(measured_at),
    {", ".join(f"count(*) FILTER (WHERE outcome = '{outcome}')" for outcome in OUTCOMES)}
FROM $source WHERE $condition GROUP BY gpu, evidence ORDER BY gpu NULLS LAST, evidence
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """How many measurements one card has of one evidence: by outcome, and of how many models and workloads."""

    gpu: str | None
    evidence: str
    counts: Mapping[str, int]
    models: int
    workloads: int
    first_at: datetime | None
    last_at: datetime | None

    @property
    def total(self) -> int:
        """All of the group."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What a store holds; `groups` are in order of card and evidence."""

    path: Path
    file_bytes: int
    schema: int
    groups: tuple[GroupStats, ...]

    @property
    def total(self) -> int:
        """All measurements that were asked for."""
        return sum(group.total for group in self.groups)


class Store:
    """A set of measurements in a file. Nothing of it is held open between calls, so that others may use it too.

    Every method waits up to `wait_s` for another process and then raises StoreBusy; it raises NotAStore for a file that
    is something else, and StoreTooNew for one of a newer version. A file that does not exist reads as an empty store
    and is made by the first `add`.
    """

    def __init__(self, path: Path, *, wait_s: float = WAIT_S) -> None:
        self.path = path.expanduser().resolve()
        self.wait_s = wait_s

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: whatever was added is already on disk."""

    @property
    def exists(self) -> bool:
        """Whether the file is there. Raises StoreError where that cannot be seen."""
        return session.exists(self.path)

    def add(self, measurements: Iterable[Measurement]) -> int:
        """Add what is not yet in the store and return how much that was; what is, stays as it is.

        Large inputs go in batches, each of them whole or not at all; an input that measures as it goes is drawn from
        while nobody is kept waiting. Adding the same again after an interruption is safe.
        """
        remaining, added = iter(measurements), 0
        while batch := list(islice(remaining, BATCH)):
            added += self._add_batch(batch)
        return added

    def get(self, id: str) -> Measurement:  # noqa: A002
        """Return the measurement whose id this is, or begins with this. Raises UnknownMeasurement."""
        found = self._select("WHERE starts_with(id, ?) ORDER BY id LIMIT 2", [id.lower()]) if id else []
        if not found:
            raise UnknownMeasurement("no measurement has this id", value=id, todo="Take one from a listing.")
        if len(found) > 1:
            raise UnknownMeasurement("several measurements have such an id", value=id, todo="Give more digits.")
        return found[0]

    def known(self, ids: Iterable[str]) -> set[str]:
        """Return those of `ids` that the store holds."""
        rows = self._rows("SELECT id FROM measurement WHERE id IN (SELECT unnest(?::VARCHAR[]))", [list(ids)])
        return {row[0] for row in rows}

    def count(self, filters: Filters | None = None) -> int:
        """Return how many measurements `filters` let through."""
        condition, values = where(filters)
        return self._number(f"SELECT count(*) FROM measurement WHERE {condition}", values)

    def query(self, filters: Filters | None = None, *, limit: int | None = None) -> list[Measurement]:
        """Return the measurements that `filters` let through, the latest first, those without a date last."""
        if limit is not None and limit < 0:
            raise BadValue("limit must not be negative", value=limit, todo="Give None for all.")
        condition, values = where(filters)
        limited, limits = ("", []) if limit is None else (" LIMIT ?", [limit])
        return self._select(f"WHERE {condition} ORDER BY measured_at DESC NULLS LAST, id{limited}", [*values, *limits])

    def iterate(self, filters: Filters | None = None, *, batch: int = BATCH) -> Iterator[list[Measurement]]:
        """Yield the measurements that were there at the start, in lists of up to `batch`, in order of arrival.

        The file is open only while a list is read, never while the caller works on it.
        """
        if batch < 1:
            raise BadValue("batch must be positive", value=batch, todo=f"Leave it at {BATCH}.")
        condition, values = where(filters)
        after, end = 0, self._number("SELECT max(seq) FROM measurement", [])
        # Which rows come next is found out first, from few columns: choosing among whole rows costs several times more.
        span = f"seq > ? AND seq <= ? AND {condition} ORDER BY seq"
        bound = f"SELECT max(seq) FROM (SELECT seq FROM measurement WHERE {span} LIMIT ?)"
        while last := self._number(bound, [after, end, *values, batch]):
            yield self._select(f"WHERE {span}", [after, last, *values])
            after = last

    def stats(self, filters: Filters | None = None) -> StoreStats:
        """Return how much the store holds, by card and evidence."""
        condition, values = where(filters)
        rows = self._rows(groups_sql("measurement", condition), values)
        return StoreStats(
            path=self.path,
            file_bytes=self.path.stat().st_size if self.exists else 0,
            schema=migrations.latest(),
            groups=tuple(group_stats(row) for row in rows),
        )

    def _add_batch(self, batch: list[Measurement]) -> int:
        rows = RowWriter(batch)
        with session.writing(self.path, wait_s=self.wait_s) as connection:
            return insert(connection, rows)

    def _rows(self, sql: str, values: list[Any]) -> list[tuple[Any, ...]]:
        if not self.exists:
            return []
        with session.reading(self.path, wait_s=self.wait_s) as connection:
            return connection.execute(sql, values).fetchall()

    def _number(self, sql: str, values: list[Any]) -> int:
        """Return the one number that `sql` selects, 0 for NULL and where there is no file."""
        rows = self._rows(sql, values)
        return int(rows[0][0] or 0) if rows else 0

    def _select(self, tail: str, values: list[Any]) -> list[Measurement]:
        """Return the measurements of the rows that `tail` chooses, read in one go."""
        if not self.exists:
            return []
        with session.reading(self.path, wait_s=self.wait_s) as connection:
            rows = connection.execute(f"SELECT {_NAMES} FROM measurement {tail}", values).fetchall()
            reader = _reader(connection, rows)
            names = _names(connection, rows)
        return [_measurement(reader, row, names.get(row[_ID], {})) for row in rows]


def open_store(path: Path | None = None, *, wait_s: float = WAIT_S) -> Store:
    """Return the store in `path`, or else where WHICHLORA_DB says, or else in the user's data folder."""
    return Store(path or default_path(), wait_s=wait_s)


def insert(connection: DuckDBPyConnection, rows: RowWriter) -> int:
    """Write what is not there yet and return how many measurements that were; in a transaction of the caller's."""
    counted = connection.execute(_ADD, _columns(rows.measurements.values())).fetchone()
    connection.execute(_ADD_CONFIGS, _columns(rows.configs.items()))
    connection.execute(_ADD_ORIGINS, _columns(sorted(rows.origins)) or [[], [], []])
    return int(counted[0]) if counted else 0


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _reader(connection: DuckDBPyConnection, rows: list[tuple[Any, ...]]) -> RowReader:
    wanted = sorted({row[_CONFIG_ID] for row in rows})
    return RowReader(dict(connection.execute(_CONFIGS, [wanted]).fetchall()))


def _names(connection: DuckDBPyConnection, rows: list[tuple[Any, ...]]) -> dict[str, dict[str, str]]:
    names: dict[str, dict[str, str]] = {}
    for measurement_id, kind, name in connection.execute(_ORIGINS, [[row[_ID] for row in rows]]).fetchall():
        names.setdefault(measurement_id, {})[kind] = name
    return names


def _measurement(reader: RowReader, row: tuple[Any, ...], names: Mapping[str, str]) -> Measurement:
    try:
        return reader.measurement(row, names)
    except (WhichloraError, KeyError, ValueError) as error:  # written by another program, or by one with an error
        todo = f"Remove the row, which is not a measurement. ({error})"
        raise StoreError("a row of the store contradicts itself", value=row[_ID], todo=todo) from error


def groups_sql(source: str, condition: str) -> str:
    """Return the SQL that counts the rows of `source` by card and evidence, for `group_stats` to read."""
    return _GROUPS.replace("$source", source).replace("$condition", condition)


def group_stats(row: tuple[Any, ...]) -> GroupStats:
    """Build the counts of one group from a row that `groups_sql` selects."""
    gpu, evidence, models, workloads, first_at, last_at, *counts = row
    return GroupStats(
        gpu=gpu,
        evidence=evidence,
        counts=dict(zip(OUTCOMES, counts, strict=True)),
        models=models,
        workloads=workloads,
        first_at=first_at and first_at.replace(tzinfo=timezone.utc),
        last_at=last_at and last_at.replace(tzinfo=timezone.utc),
    )
