"""Row by row: each row of a staged pack must be what its measurement would be stored as, under its own hash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError

from . import session
from .canonical import canonical_json, text_hash
from .checks import is_unicode, printable
from .pack_stage import STAGED
from .packs import names_of
from .plausible import implausible
from .rows import COLUMNS, RowReader, RowWriter, WorkloadWriter

BATCH = 2_000
#: Rejected rows that are kept in full, of a pack and of a span of its rows; all of them are counted.
MOST_KEPT = 10_000
DEEPEST = 64
_LONGEST_SHOWN = 2_000
_STORED = ", ".join(f's."{name}"' for name in COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that may not enter a store: its place in the pack, the id that it claims, and why."""

    row: int
    id: str
    reasons: tuple[str, ...]


def check_rows(folder: Path, first: int, last: int) -> list[int]:
    """Check rows `first` to `last` (excluded) of a staged pack; return the places of those that are rejected.

    Up to MOST_KEPT of these are written, with reasons and content, into `folder`/rejected-{first}.jsonl.
    """
    rejected = []
    with (folder / f"rejected-{first}.jsonl").open("w", encoding="utf-8") as file:
        for number, row, reasons in _rejected(folder, first, last):
            rejected.append(number)
            if len(rejected) <= MOST_KEPT:
                file.write(json.dumps({"row": number, "id": row[0], "reasons": reasons, "content": _shown(row)}) + "\n")
    return rejected


def _rejected(folder: Path, first: int, last: int) -> Iterator[tuple[int, tuple[Any, ...], list[str]]]:
    import duckdb

    with duckdb.connect(str(folder / STAGED), read_only=True, config=session.settings()) as connection:
        connection.execute("SET threads = 1")
        checker = Checker()
        for start in range(first, last, BATCH):
            span = [start, min(start + BATCH, last)]
            needed = connection.execute(f"SELECT id, config FROM config WHERE id IN ({_IDS})", span).fetchall()
            rows = connection.execute(_ROWS, span).fetchall()
            checker.learn(dict(needed))
            for number, *row in rows:
                if reasons := checker.reasons(tuple(row)):
                    yield number, tuple(row), [printable(reason) for reason in reasons]


_IDS = "SELECT config_id FROM staged WHERE row >= ? AND row < ?"
_ROWS = f"""
SELECT s.row, {_STORED}, s.host_name, s.user_name FROM staged AS s
WHERE s.row >= ? AND s.row < ? ORDER BY s.row
"""


class Checker:
    """Compares rows with what the measurements that they describe would be stored as."""

    def __init__(self) -> None:
        self._good: dict[str, str] = {}
        self._bad: dict[str, str] = {}
        self._reader = RowReader({})
        self._writer = WorkloadWriter()

    def learn(self, configs: dict[str, str]) -> None:
        """Take the configs that the next rows name, each as text by its id; remember what is wrong with them."""
        for id_, text in configs.items():
            if id_ not in self._good and id_ not in self._bad:
                if problem := _problem(id_, text):
                    self._bad[id_] = problem
                else:
                    self._good[id_] = text
                    self._reader.learn(id_, text)

    def reasons(self, row: tuple[Any, ...]) -> list[str]:
        """Return why a row of COLUMNS, host and user may not enter a store; nothing where it may."""
        values = dict(zip(COLUMNS, row, strict=False))
        if problem := self._bad.get(values["config_id"]):
            return [problem]
        try:
            deep = [name for name in ("workload", "versions", "phase_peaks") if is_deep(values[name])]
            if deep:
                return [f"{deep[0]} is nested deeper than {DEEPEST}"]
            measurement = self._reader.measurement(row[: len(COLUMNS)], names_of(row[len(COLUMNS) :]))
            expected = RowWriter([measurement], workloads=self._writer)
        except WhichloraError as error:
            return [str(error)[:_LONGEST_SHOWN]]
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError) as error:
            return [f"not a measurement ({type(error).__name__}: {error})"[:_LONGEST_SHOWN]]
        ((id_, stored),) = expected.measurements.items()
        if values["id"] != id_:
            return [f"the id is not that of the content, which is {id_}"]
        if different := [name for name, one, other in zip(COLUMNS, row, stored, strict=False) if one != other]:
            return [f"{different[0]} contradicts the rest of the row"]
        return implausible(measurement, now=_NOW)


def is_deep(text: str) -> bool:
    """Say whether a JSON text nests deeper than any of ours, whatever its strings hold."""
    if text.count("{") + text.count("[") <= DEEPEST:
        return False
    depth = deepest = 0
    quoted = escaped = False
    for sign in text:
        if quoted:
            quoted, escaped = escaped or sign != '"', not escaped and sign == "\\"
        elif sign == '"':
            quoted = True
        elif sign in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif sign in "}]":
            depth -= 1
    return deepest > DEEPEST


def _problem(id_: str, text: str) -> str:
    if not isinstance(text, str) or text_hash(text) != id_:
        return "the config is not the one that its hash names"
    try:
        if is_deep(text):
            return f"a config nested deeper than {DEEPEST}"
        config = json.loads(text)
        if not isinstance(config, dict):
            return "a config that is no object"
        if canonical_json(config) != text:
            return "a config that is not in canonical JSON"
        if digits := _digits(config):
            return f"a config with a number of {digits} hexadecimal digits"
    except (WhichloraError, ValueError, RecursionError) as error:
        return f"a config that cannot be read ({str(error)[:200]})"
    return ""


def _digits(value: object) -> int:
    """Return the hexadecimal digits of the longest whole number that 64 bits do not hold, 0 where there is none."""
    if isinstance(value, int):
        return 0 if abs(value) < 1 << 64 else len(f"{abs(value):x}")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_digits, inner), default=0)


def _shown(row: Sequence[Any]) -> dict[str, Any]:
    named = dict(zip((*COLUMNS, "host_name", "user_name"), row, strict=True))
    return {name: _clipped(value) for name, value in named.items() if value is not None}


def _clipped(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_LONGEST_SHOWN] if is_unicode(value) else repr(value[:_LONGEST_SHOWN])
    if isinstance(value, list):
        return [_clipped(each) for each in value[:100]]
    return value if isinstance(value, int) else str(value)


_NOW = datetime.now(timezone.utc)
