"""What older versions wrote, before there was a column for managed bytes, is taken as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import duckdb

from whichlora_profiles_db import (
    Measurement,
    check_pack,
    import_pack,
    merge_store,
    open_remote,
    open_store,
    pull,
    push,
    read_manifest,
    read_pack,
    remote_stats,
    write_pack,
)
from whichlora_profiles_db.migrations import migrate
from whichlora_profiles_db.packs import KEY, file_sha256
from whichlora_profiles_db.remotes import pack_name
from whichlora_profiles_db.rows import COLUMNS, LATER

from .records import ENVIRONMENT, FULL, numbered

#: Measurements as they were before: without what came later.
OLD = [FULL.with_(**dict.fromkeys(LATER)), *(numbered(number, environment=ENVIRONMENT) for number in range(3))]
WITHOUT = f"* EXCLUDE ({', '.join(LATER)})"


def old_pack(measurements: Sequence[Measurement], path: Path) -> Path:
    """Write a pack of the first format."""
    new = write_pack(measurements, path.with_suffix(".new.parquet"))
    fields = dataclasses.asdict(new.manifest) | {"format": 1}
    with duckdb.connect() as connection:
        connection.execute(
            f"COPY (SELECT {WITHOUT} FROM '{new.path}' ORDER BY id) TO '{path}' "
            f"(FORMAT parquet, KV_METADATA {{{KEY}: '{json.dumps(fields)}'}})"
        )
    new.path.unlink()
    return path


def old_store(measurements: Sequence[Measurement], path: Path) -> Path:
    """Write a store as it was before its last migration."""
    open_store(path.with_suffix(".new")).add(measurements)
    with duckdb.connect(str(path)) as connection:
        migrate(connection, path, to=2)
        connection.execute(f"ATTACH '{path.with_suffix('.new')}' AS new")
        names = ", ".join(f'"{name}"' for name in ("seq", *COLUMNS) if name not in LATER)
        connection.execute(f"INSERT INTO measurement ({names}) SELECT {names} FROM new.measurement")
        for table in ("config", "origin"):
            connection.execute(f"INSERT INTO {table} FROM new.{table}")
    return path


def test_an_old_pack_is_checked_read_and_imported(tmp_path: Path) -> None:
    """A pack of the first format gives the measurements that went in, under their ids."""
    pack, store = old_pack(OLD, tmp_path / "pack.parquet"), open_store(tmp_path / "store.duckdb")
    assert read_manifest(pack).format == 1
    assert check_pack(pack).rejected_count == 0
    assert import_pack(store, pack).added == len(OLD)
    expected = sorted((one.without_names() for one in OLD), key=lambda one: one.id)
    assert sorted(store.query(), key=lambda one: one.id) == expected
    assert [one for batch in read_pack(pack) for one in batch] == expected


def test_an_old_store_is_used_and_merged(tmp_path: Path) -> None:
    """A store of the schema before holds the same measurements once it is opened, and merged without being opened."""
    old, new = old_store(OLD, tmp_path / "old.duckdb"), open_store(tmp_path / "new.duckdb")
    new.add([FULL])
    assert merge_store(new, old).added == len(OLD)
    assert {one.id for one in new.query()} == {FULL.id, *(one.id for one in OLD)}
    opened = open_store(old)
    assert sorted(one.id for one in opened.query()) == sorted(one.id for one in OLD)
    opened.add([FULL])
    assert opened.get(FULL.id) == FULL


def test_packs_of_both_formats_lie_on_one_remote(tmp_path: Path) -> None:
    """Asked in place, and pulled, a remote gives the rows of old packs and of new ones."""
    pack = old_pack(OLD, tmp_path / "pack.parquet")
    remote = open_remote(str(tmp_path / "remote"))
    remote.put(pack_name("rtx-4090", "2026-03", file_sha256(pack)), pack)
    store = open_store(tmp_path / "store.duckdb")
    store.add([FULL])
    push(store, remote)
    assert sum(group.total for group in remote_stats(remote)) == len(OLD) + 1
    other = open_store(tmp_path / "other.duckdb")
    assert pull(other, remote).added == len(OLD) + 1
    assert other.get(FULL.id).managed_peak_bytes == FULL.managed_peak_bytes
