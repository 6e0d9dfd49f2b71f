"""Packs: measurements in one Parquet file, to give to others.

A pack has one row a measurement, in order of id, each id once. Its columns are those of the store's table
`measurement`, then `config` with the model's config as canonical JSON, `host_name` and `user_name`. Under the key
`whichlora` of the file's metadata lies the manifest, as JSON. The same measurements make the same bytes (under one
version of DuckDB), so that the hash of a pack's bytes names its content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whichlora_estimators.errors import WhichloraError

from . import migrations, session
from .checks import is_plain
from .errors import BadPack, StoreError
from .filters import Filters, where
from .measurement import EVIDENCES, OUTCOMES, SCHEMA, Measurement
from .rows import COLUMNS, LATER, RowReader, RowWriter, select_list
from .store import BATCH, Store, insert

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FORMAT = 2
SUFFIX = ".parquet"
KEY = "whichlora"
LONGEST_PRODUCER = 200
ROWS_A_GROUP = 100_000
PACK_COLUMNS: Mapping[str, str] = {**COLUMNS, "config": "VARCHAR", "host_name": "VARCHAR", "user_name": "VARCHAR"}

_NAMES = ", ".join(f'm."{name}"' for name in COLUMNS)
_NAME_OF = "(SELECT min(o.name) FROM origin AS o WHERE o.measurement_id = m.id AND o.kind = '{kind}')"
_COUNTED = ("evidence", "outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a pack says of itself.

    `ids_sha256` is the hash of its ids, in order, each with a line feed; as an id is a hash of content, so is this.
    `counts` has rows by evidence and by outcome. There is no date: equal content makes equal packs.
    """

    rows: int
    ids_sha256: str
    counts: Mapping[str, Mapping[str, int]]
    with_names: bool
    producer: str
    format: int = FORMAT
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A pack that was written: where, the SHA-256 of its bytes, and its manifest."""

    path: Path
    sha256: str
    manifest: Manifest


def export_pack(store: Store, path: Path, filters: Filters | None = None, *, with_names: bool = False) -> Pack:
    """Write what `filters` let through into a pack, which appears under its name complete or not at all.

    Without `with_names`, host and user names stay at home. Raises StoreError where there is nothing to write, or no
    room.
    """
    condition, values = where(filters)
    if not store.exists:
        raise StoreError("no store to export from", value=str(store.path), todo="Name one with --db or WHICHLORA_DB.")
    with _fresh(path) as fresh:
        with session.reading(store.path, wait_s=store.wait_s, outside=session.Outside(files=(fresh,))) as connection:
            manifest = copy_out(connection, fresh, condition, values, with_names=with_names)
        return fresh_pack(fresh, path, manifest)


def write_pack(measurements: Iterable[Measurement], path: Path, *, with_names: bool = False) -> Pack:
    """Write measurements into a pack, which appears under its name complete or not at all; repeated ones once."""
    import tempfile

    import duckdb

    with _fresh(path) as fresh, tempfile.TemporaryDirectory() as folder, duckdb.connect(f"{folder}/s") as connection:
        migrations.migrate(connection, Path(folder))
        remaining = iter(measurements)
        while batch := [each for each, _ in zip(remaining, range(BATCH), strict=False)]:
            insert(connection, RowWriter(batch))
        manifest = copy_out(connection, fresh, "true", [], with_names=with_names)
        return fresh_pack(fresh, path, manifest)


def read_pack(path: Path, *, batch: int = BATCH) -> Iterator[list[Measurement]]:
    """Yield the measurements of a pack that is trusted, such as one that is shipped, in order of id.

    Nothing is compared with the manifest; packs of others go through `import_pack`. Raises BadPack.
    """
    import duckdb

    columns = all_columns(read_manifest(path).format)
    try:
        with duckdb.connect(config={"threads": 1}) as connection:
            rows = connection.execute(f"SELECT {columns} FROM read_parquet(?)", [literal_path(path)])
            while found := rows.fetchmany(batch):
                yield pack_measurements(found)
    except (duckdb.Error, WhichloraError, ValueError) as error:
        todo = f"Check it with whichlora profiles check. ({error})"
        raise BadPack("the pack cannot be read", value=str(path), todo=todo) from error


def read_manifest(path: Path) -> Manifest:
    """Read what a trusted pack says of itself. Raises BadPack."""
    import duckdb

    try:
        with duckdb.connect(config={"threads": 1}) as connection:
            found = connection.execute("SELECT key, value FROM parquet_kv_metadata(?)", [literal_path(path)]).fetchall()
    except duckdb.Error as error:
        raise BadPack("not a Parquet file", value=str(path), todo=f"Ask for the pack again. ({error})") from error
    return manifest_of(found)


def manifest_of(pairs: Iterable[tuple[bytes, bytes]]) -> Manifest:
    """Return the manifest among a Parquet file's metadata. Raises BadPack."""
    found = [value for key, value in pairs if key == KEY.encode()]
    if len(found) != 1:
        todo = "Packs come from whichlora profiles export."
        raise BadPack("a Parquet file that is no pack: it has no manifest", value=len(found), todo=todo)
    try:
        fields = json.loads(found[0])
        if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > FORMAT:
            raise BadPack("a pack of a newer format", value=fields["format"], todo="Upgrade whichlora.")
        return _manifest(fields)
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise BadPack(
            "a pack whose manifest cannot be read", value=str(error)[:200], todo="Ask for it again."
        ) from error


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(**fields)
    kinds = (("rows", int), ("ids_sha256", str), ("with_names", bool), ("producer", str), ("format", int))
    for name, kind in (*kinds, ("schema", int), ("counts", dict)):
        if type(getattr(manifest, name)) is not kind:  # a bool is no int here
            raise TypeError(f"{name} is no {kind.__name__}")
    if len(manifest.producer) > LONGEST_PRODUCER or not is_plain(manifest.producer):
        raise ValueError(f"producer {manifest.producer[:LONGEST_PRODUCER]!r}")
    if not 1 <= manifest.format <= FORMAT or manifest.schema != SCHEMA or manifest.rows < 0:
        raise ValueError(f"format {manifest.format}, schema {manifest.schema}, rows {manifest.rows}")
    return manifest


def lacking(format_: int) -> list[str]:
    """Return the columns that packs of a format do not have yet."""
    return [name for name, first in LATER.items() if format_ < first]


def all_columns(format_: int) -> str:
    """Return PACK_COLUMNS for a SELECT from a pack of this format."""
    return select_list(PACK_COLUMNS, lacking=lacking(format_))


def pack_measurements(rows: Iterable[tuple[Any, ...]]) -> list[Measurement]:
    """Build the measurements of rows of PACK_COLUMNS."""
    rows = list(rows)
    reader = RowReader({row[_CONFIG_ID]: row[_CONFIG] for row in rows})
    return [reader.measurement(row[:_CONFIG], names_of(row[_CONFIG + 1 :])) for row in rows]


def names_of(names: Sequence[str | None]) -> dict[str, str]:
    """Return host and user name where known, given both in this order."""
    given = zip(("host_name", "user_name"), names, strict=True)
    return {kind: name for kind, name in given if name is not None}


def copy_out(
    connection: DuckDBPyConnection, path: Path, condition: str, values: list[Any], *, with_names: bool
) -> Manifest:
    """Write the rows of table measurement that fulfil `condition` into the file `path`, and return its manifest."""
    manifest = _describe(connection, condition, values, with_names=with_names)
    content = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    kinds = ("host_name", "user_name")
    names = [f"{_NAME_OF.format(kind=kind) if with_names else 'NULL::VARCHAR'} AS {kind}" for kind in kinds]
    connection.execute(
        f"COPY (SELECT {_NAMES}, c.config, {', '.join(names)} "
        f"FROM (SELECT * FROM measurement WHERE {condition}) AS m JOIN config AS c ON c.id = m.config_id ORDER BY m.id) "
        f"TO {session.quoted(str(path))} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROWS_A_GROUP}, "
        f"USE_TMP_FILE false, WRITE_BLOOM_FILTER false, KV_METADATA {{{KEY}: {session.quoted(content)}}})",
        values,
    )
    return manifest


def _describe(connection: DuckDBPyConnection, condition: str, values: list[Any], *, with_names: bool) -> Manifest:
    ids, rows = hashlib.sha256(), 0
    found = connection.execute(f"SELECT id FROM measurement WHERE {condition} ORDER BY id", values)
    while batch := found.fetchmany(100_000):
        rows += len(batch)
        ids.update("".join(f"{id_}\n" for (id_,) in batch).encode())
    if not rows:
        raise StoreError("no measurement to put into a pack", todo="Widen the filters, or measure something.")
    return Manifest(
        rows=rows,
        ids_sha256=ids.hexdigest(),
        counts=counts_by(connection, f"measurement WHERE {condition}", values),
        with_names=with_names,
        producer=producer(),
    )


def counts_by(connection: DuckDBPyConnection, source: str, values: list[Any]) -> dict[str, dict[str, int]]:
    """Return how many rows there are of each evidence and each outcome."""
    counts = {}
    for name, known in zip(_COUNTED, (EVIDENCES, OUTCOMES), strict=True):
        found = dict(connection.execute(f"SELECT {name}, count(*) FROM {source} GROUP BY 1", values).fetchall())
        counts[name] = {each: found[each] for each in known if each in found}
    return counts


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[Path]:
    """Give a name beside `path` for a file that is being written, and that is gone afterwards."""
    fresh = path.absolute().with_name(f".{uuid.uuid4().hex}.new")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = f"Name another file. ({error.strerror})"
        raise StoreError("the folder cannot be made", value=str(fresh.parent), todo=todo) from error
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def fresh_pack(fresh: Path, path: Path, manifest: Manifest) -> Pack:
    """Give a complete file its name, on disk before it is seen."""
    with fresh.open("rb") as file:
        sha256 = file_sha256(fresh)
        os.fsync(file.fileno())
    fresh.replace(path)
    return Pack(path=path, sha256=sha256, manifest=manifest)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def literal_path(path: Path) -> str:
    """Return a path in which DuckDB finds no pattern."""
    text = str(path.absolute())
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in text)


def producer() -> str:
    """Return this program's name and version."""
    from importlib import metadata

    try:
        return f"whichlora {metadata.version('whichlora')}"
    except metadata.PackageNotFoundError:
        return "whichlora of unknown version"


_CONFIG_ID, _CONFIG = list(PACK_COLUMNS).index("config_id"), list(PACK_COLUMNS).index("config")
