"""Nothing that others put into a pack changes a store unless all of it is what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from whichlora_profiles_db import (
    BadPack,
    Store,
    import_pack,
    open_remote,
    open_store,
    pack_reader,
    pull,
    remote_stats,
)
from whichlora_profiles_db.pack_reader import PackReader
from whichlora_profiles_db.packs import KEY, file_sha256
from whichlora_profiles_db.remotes import pack_name

from .hostile import FINE, GOOD, hostile, make, scribbled
from .records import FULL, PLAIN, numbered

HOSTILE = hostile()


@pytest.fixture(scope="module")
def reader() -> Iterator[PackReader]:
    """Return a reader whose process serves all packs of this module."""
    with PackReader(jobs=1) as reader:
        yield reader


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store that shares a measurement with the packs."""
    store = open_store(tmp_path_factory.mktemp("store") / "store.duckdb")
    store.add([FULL, PLAIN])
    return store


def test_there_are_two_hundred() -> None:
    """The packs that follow are two hundred at least."""
    assert len(HOSTILE) >= 200


def test_what_they_are_made_of_is_good(tmp_path: Path, reader: PackReader) -> None:
    """The pack that all of them alter, and the measurement that the impossible ones alter, are taken."""
    store = open_store(tmp_path / "store.duckdb")
    imported = import_pack(store, make([*GOOD, FINE], tmp_path / "pack.parquet"), reader=reader)
    assert imported.added == len(GOOD) + 1 == store.count()


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pack_changes_nothing(tmp_path: Path, store: Store, reader: PackReader, what: str) -> None:
    """The store stays as it is, byte for byte, and the error says what is wrong with which pack and what to do."""
    pack = tmp_path / "pack.parquet"
    HOSTILE[what](pack)
    before = store.path.read_bytes()
    with pytest.raises(BadPack) as caught:
        import_pack(store, pack, reader=reader)
    assert store.path.read_bytes() == before
    assert {path.name for path in store.path.parent.iterdir()} <= {"store.duckdb", "store.duckdb.quarantine"}
    assert len(caught.value.what) > 5
    assert "pack.parquet" in str(caught.value)
    assert len(caught.value.todo) > 10
    assert list(tmp_path.iterdir()) in ([], [pack])


def test_a_bomb_is_not_unpacked(tmp_path: Path, store: Store, reader: PackReader) -> None:
    """A file of a few kilobytes that stands for a terabyte of text is refused without unpacking it."""
    arrow = pytest.importorskip("pyarrow", reason="writes a dictionary that DuckDB would write out")
    parquet = pytest.importorskip("pyarrow.parquet")
    good = parquet.read_table(make(GOOD, tmp_path / "good.parquet"))
    rows = 1_000_000
    word = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), ["a" * 1_000_000])
    columns = [
        word if name == "notes" else arrow.repeat(good[name][0], rows) if name == "id" else arrow.nulls(rows, kind)
        for name, kind in zip(good.schema.names, good.schema.types, strict=True)
    ]
    manifest = json.dumps(json.loads(good.schema.metadata[KEY.encode()]) | {"rows": rows})
    table = arrow.table(columns, names=good.schema.names).replace_schema_metadata({KEY: manifest})
    parquet.write_table(table, tmp_path / "pack.parquet", compression="zstd")
    assert (tmp_path / "pack.parquet").stat().st_size < 1 << 20
    before = store.path.read_bytes()
    with pytest.raises(BadPack, match="longer than any honest one"):
        import_pack(store, tmp_path / "pack.parquet", reader=reader)
    assert store.path.read_bytes() == before


def test_damage_is_refused_or_harmless(tmp_path: Path, reader: PackReader) -> None:
    """Bytes overwritten anywhere in a pack make an error, or were of no content: the store has all of it or nothing."""
    refused = 0
    for percent in range(1, 100, 7):
        pack, store = tmp_path / f"{percent}", open_store(tmp_path / f"{percent}.duckdb")
        scribbled(percent / 100)(pack)
        try:
            import_pack(store, pack, reader=reader)
        except BadPack:
            refused += 1
            assert not store.exists
        else:
            assert sorted(one.id for one in store.query()) == sorted(one.id for one in GOOD)
    assert refused > 7


def test_links_in_a_folder_are_no_packs(tmp_path: Path, store: Store, reader: PackReader) -> None:
    """A link, a folder or a pipe under a pack's name is not read, and keeps no other pack from coming."""
    good = make([FINE], tmp_path / "good.parquet")
    remote = open_remote(str(tmp_path / "remote"))
    remote.put(pack_name("l4", "2026-03", file_sha256(good)), good)
    folder = tmp_path / "remote" / "gpu=l4" / "month=2026-03"
    (folder / f"{'0' * 64}.parquet").symlink_to("/dev/zero")
    (folder / f"{'1' * 64}.parquet").symlink_to(good)
    (folder / f"{'2' * 64}.parquet").symlink_to(tmp_path / "nowhere")
    (folder / f"{'3' * 64}.parquet").mkdir()
    os.mkfifo(folder / f"{'4' * 64}.parquet")
    own = open_store(tmp_path / "own.duckdb")
    pulled = pull(own, remote, reader=reader)
    assert (pulled.added, pulled.refused) == (1, {})
    assert sum(group.total for group in remote_stats(remote)) == 1


def test_the_quarantine_of_a_pack_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rejected rows, from whichever span of the pack, the first are kept in full; all are counted."""
    monkeypatch.setattr(pack_reader, "ROWS_A_REQUEST", 2)
    monkeypatch.setattr(pack_reader, "MOST_KEPT", 3)
    pack = make([numbered(number, process_bytes=10**18) for number in range(7)], tmp_path / "bad.parquet")
    own = open_store(tmp_path / "own.duckdb")
    with pytest.raises(BadPack, match="7 of 7 rows"):
        import_pack(own, pack)
    (kept,) = (tmp_path / "own.duckdb.quarantine").iterdir()
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 1 + 3
