"""From a pack that nobody vouches for to clean tables: runs in a process of its own, within limits.

Everything of a pack may lie: its footer, its statistics, its manifest. So it is read here once, from beginning to end,
without a filter that statistics could mislead, and copied into tables of a DuckDB file of our own; what follows reads
those.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import session
from .checks import printable
from .errors import BadPack
from .packs import KEY, PACK_COLUMNS, Manifest, counts_by, lacking, literal_path, manifest_of
from .rows import select_list

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MOST_FILE_BYTES = 8 << 30
MOST_FOOTER_BYTES = 64 << 20
MOST_ROWS = 20_000_000
MOST_ROWS_A_GROUP = 1 << 20
MOST_GROUP_BYTES = 2 << 30  # uncompressed
MEMORY_BYTES = 1 << 30
STAGED, PACK = "staged.duckdb", "pack.parquet"

#: Bytes that one text may have, and all texts of a column together, a row on average.
LONG_TEXTS = ("workload", "config", "error", "notes", "versions", "phase_peaks")
MOST_LONG_TEXT_BYTES, MOST_TEXT_BYTES = 1 << 20, 1 << 12
MOST_MEAN_TEXT_BYTES = 1 << 14
MOST_SAMPLES, MOST_MEAN_SAMPLES = 1_000_000, 4_096

_TEXTS = tuple(name for name, kind in PACK_COLUMNS.items() if kind == "VARCHAR")
_LISTS = tuple(name for name, kind in PACK_COLUMNS.items() if kind.endswith("[]"))
_MAGIC = b"PAR1"
_ASK = "Ask whoever made it to export it again with whichlora profiles export."


def stage(folder: Path) -> Manifest:
    """Check the form of `folder`/pack.parquet and copy it into tables `staged` and `config` of a file beside it.

    Table `staged` has the pack's columns but `config`, and `row`, counted from 0. Raises BadPack.
    """
    import duckdb

    pack = folder / PACK
    check_envelope(pack)
    with duckdb.connect(str(folder / STAGED), config=session.settings(reaches_out=True)) as connection:
        connection.execute(f"SET temp_directory = {session.quoted(str(folder / 'spilled'))}")
        connection.execute("SET threads = 2")
        # Both believe the statistics in the file.
        connection.execute("SET disabled_optimizers = 'statistics_propagation,compressed_materialization'")
        session.Outside(files=(pack,), memory_bytes=MEMORY_BYTES).open(connection)
        try:
            return _stage(connection, pack)
        except duckdb.Error as error:
            said = str(error).strip().splitlines()[0][:300]
            raise BadPack("a pack that cannot be read through", value=said, todo=_ASK) from error


def check_envelope(path: Path) -> None:
    """Look at a file's size, its first and its last bytes. Raises BadPack unless they can be those of a Parquet file."""
    size = path.stat().st_size
    if size > MOST_FILE_BYTES:
        raise BadPack(
            "a pack larger than any may be", value=size, todo=f"At most {MOST_FILE_BYTES} bytes: export less."
        )
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if size < 12 or head != _MAGIC or tail[4:] != _MAGIC:
        what = "a pack that was cut off" if head == _MAGIC else "not a pack: no Parquet file"
        raise BadPack(what, value=f"{size} bytes", todo=_ASK)
    (footer,) = struct.unpack("<I", tail[:4])
    if not 0 < footer <= min(size - 12, MOST_FOOTER_BYTES):
        raise BadPack("a pack whose footer cannot be", value=footer, todo=_ASK)


def _stage(connection: DuckDBPyConnection, pack: Path) -> Manifest:
    path = [literal_path(pack)]
    found = connection.execute("SELECT key, value FROM parquet_kv_metadata(?) LIMIT 100", path).fetchall()
    manifest = manifest_of(found)
    _check_columns(connection, path, manifest)
    _check_sizes(connection, path, manifest)
    _check_lengths(connection, path)
    _copy(connection, path, manifest)
    _check_rows(connection, manifest)
    return manifest


def _check_columns(connection: DuckDBPyConnection, path: list[Any], manifest: Manifest) -> None:
    """Refuse any column that a pack of its format does not have, any it lacks, and any of another type or nesting."""
    later = lacking(manifest.format)
    expected = {name: kind for name, kind in PACK_COLUMNS.items() if name not in later}
    found = connection.execute("SELECT name, type, num_children FROM parquet_schema(?) LIMIT 1000", path).fetchall()
    depth = len(expected) + 2 * len(_LISTS) + 1
    if len(found) != depth:
        raise BadPack("a pack with other columns than a pack has", value=f"{len(found)} for {depth}", todo=_ASK)
    described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", path).fetchall()
    columns = {name: kind for name, kind, *_ in described}
    for name, kind in expected.items():
        if name not in columns:
            raise BadPack("a pack that lacks a column", value=name, todo=_ASK)
        if columns[name] != kind:
            what = f"a column that is {printable(columns[name][:60])} where a pack has {kind}"
            raise BadPack(what, value=name, todo=_ASK)
    if list(columns) != list(expected):
        raise BadPack("a pack whose columns are not in their order", value=list(columns)[:5], todo=_ASK)


def _check_sizes(connection: DuckDBPyConnection, path: list[Any], manifest: Manifest) -> None:
    """Compare what the footer declares with the limits and with the manifest."""
    ((rows, groups, encrypted),) = connection.execute(
        "SELECT num_rows, num_row_groups, encryption_algorithm FROM parquet_file_metadata(?)", path
    ).fetchall()
    if encrypted is not None:
        raise BadPack("an encrypted file", value=str(encrypted), todo=_ASK)
    if not 0 < rows <= MOST_ROWS or rows != manifest.rows or groups > rows:
        todo = f"The manifest says {manifest.rows}; a pack has 1 to {MOST_ROWS:,}. {_ASK}"
        raise BadPack("a number of rows that cannot be", value=rows, todo=todo)
    largest = connection.execute(
        "SELECT max(row_group_num_rows), max(bytes), max(num_values), bool_or(negative) FROM ("
        "SELECT row_group_id, max(row_group_num_rows) AS row_group_num_rows, sum(total_uncompressed_size) AS bytes, "
        "max(num_values) AS num_values, min(total_uncompressed_size) < 0 OR min(num_values) < 0 "
        "OR min(row_group_num_rows) < 0 AS negative FROM parquet_metadata(?) GROUP BY row_group_id)",
        path,
    ).fetchone()
    assert largest
    most_values = MOST_MEAN_SAMPLES * MOST_ROWS_A_GROUP // 64
    for what, value, most in zip(
        ("rows", "bytes", "values"), largest, (MOST_ROWS_A_GROUP, MOST_GROUP_BYTES, most_values), strict=False
    ):
        if value > most or largest[3]:
            raise BadPack(
                f"a row group with a number of {what} that cannot be", value=value, todo=f"{most} at most. {_ASK}"
            )


def _check_lengths(connection: DuckDBPyConnection, path: list[Any]) -> None:
    """Refuse texts and lists that are longer than any honest one, before they are copied anywhere."""
    asked = [f'max(strlen("{name}")), sum(strlen("{name}"))' for name in _TEXTS]
    asked += [f'max(len("{name}")), sum(len("{name}"))' for name in _LISTS]
    ((rows, *found),) = connection.execute(f"SELECT count(*), {', '.join(asked)} FROM read_parquet(?)", path).fetchall()
    for name, (longest, total) in zip((*_TEXTS, *_LISTS), zip(found[::2], found[1::2], strict=True), strict=True):
        most, mean = _limits(name)
        if (longest or 0) > most or (total or 0) > most + rows * mean:
            todo = f"At most {most} in one row, {mean} on average. {_ASK}"
            raise BadPack(f"column {name} is longer than any honest one", value=longest, todo=todo)


def _limits(name: str) -> tuple[int, int]:
    if name in _LISTS:
        return MOST_SAMPLES, MOST_MEAN_SAMPLES
    return (MOST_LONG_TEXT_BYTES if name in LONG_TEXTS else MOST_TEXT_BYTES), MOST_MEAN_TEXT_BYTES


def _copy(connection: DuckDBPyConnection, path: list[Any], manifest: Manifest) -> None:
    """Copy the pack; what packs of its format lack is unknown."""
    kept = {name: kind for name, kind in PACK_COLUMNS.items() if name != "config"}
    columns = select_list(kept, lacking=lacking(manifest.format))
    connection.execute(
        f"CREATE TABLE staged AS SELECT file_row_number AS row, {columns} FROM read_parquet(?, file_row_number = true)",
        path,
    )
    connection.execute("CREATE TABLE config AS SELECT DISTINCT config_id AS id, config FROM read_parquet(?)", path)


def _check_rows(connection: DuckDBPyConnection, manifest: Manifest) -> None:
    """Compare the manifest with the rows: ids in order, each once, as many and as they hash to; every config one."""
    ids, before, rows = hashlib.sha256(), "", 0
    for id_ in _ids(connection):
        if id_ is None or id_ <= before:
            what = "two rows of one id" if id_ == before else "ids that are not in order"
            raise BadPack(f"a pack with {what}", value=id_, todo=_ASK)
        before, rows = id_, rows + 1
        ids.update(f"{id_}\n".encode())
    if rows != manifest.rows or ids.hexdigest() != manifest.ids_sha256:
        raise BadPack("a pack whose rows are not those that its manifest names", value=rows, todo=_ASK)
    counts = counts_by(connection, "staged", [])
    if counts != manifest.counts:
        raise BadPack("a pack whose counts are not those of its manifest", value=counts, todo=_ASK)
    named = connection.execute("SELECT count(*) FROM staged WHERE host_name IS NOT NULL OR user_name IS NOT NULL")
    if not manifest.with_names and named.fetchone() != (0,):
        raise BadPack("a pack with names although its manifest says without", value=KEY, todo=_ASK)
    double = connection.execute(
        "SELECT id FROM config GROUP BY id HAVING count(*) > 1 OR id IS NULL LIMIT 1"
    ).fetchone()
    if double:
        raise BadPack("two configs of one id", value=double[0], todo=_ASK)


def _ids(connection: DuckDBPyConnection) -> Iterator[str | None]:
    found = connection.execute("SELECT id FROM staged ORDER BY row")
    while batch := found.fetchmany(100_000):
        for (id_,) in batch:
            yield id_


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Leave a manifest for the process that asked."""
    import dataclasses

    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)), encoding="utf-8")
