"""Laws of packs: what went in comes out, and importing is a union whatever the order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whichlora_estimators.workload import workload_from_json
from whichlora_profiles_db import (
    BadPack,
    Filters,
    Measurement,
    NotAStore,
    Store,
    StoreError,
    check_pack,
    export_pack,
    import_pack,
    merge_store,
    open_store,
    published,
    read_manifest,
    read_pack,
    write_pack,
)
from whichlora_profiles_db.pack_reader import PackReader
from whichlora_profiles_db.plausible import implausible
from whichlora_profiles_db.session import writing

from .conftest import content, versions_of
from .records import FULL, PLAIN, measurements, numbered

few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
REHEARSED = Path(__file__).parents[2] / "benchmarks" / "rehearsed.jsonl"
POOL = versions_of(4)
BAD = FULL.with_(outcome="ok", error="", weights_bytes=10**9)


@pytest.fixture(scope="module")
def reader() -> Iterator[PackReader]:
    """Return a reader whose process serves this module."""
    with PackReader(jobs=1) as reader:
        yield reader


@few
@given(st.lists(measurements(), min_size=1, max_size=6))
def test_what_goes_in_comes_out(tmp_path: Path, some: list[Measurement]) -> None:
    """Reading a pack gives what was written, names only where they were asked for, whatever the fields hold."""
    for with_names in (False, True):
        pack = write_pack(some, tmp_path / "pack.parquet", with_names=with_names)
        found = {one.id: one for batch in read_pack(pack.path) for one in batch}
        assert found.keys() == {one.id for one in some}
        assert list(found) == sorted(found)
        for one in some:
            assert found[one.id].without_names() == one.without_names()
            assert with_names or found[one.id] == one.without_names()
        assert read_manifest(pack.path) == pack.manifest
        assert pack.manifest.rows == len(found)


@few
@given(st.lists(st.lists(st.sampled_from(POOL), min_size=1, max_size=5), min_size=2, max_size=3), st.randoms())
def test_importing_is_a_union(
    make: Callable[[], Store], reader: PackReader, lists: list[list[Measurement]], rng: object
) -> None:
    """Packs in any order, some twice, some by way of another store, make the same store."""
    one, other, between = make(), make(), make()
    packs = [write_pack(some, one.path.with_name(f"{n}.pack"), with_names=True).path for n, some in enumerate(lists)]
    for pack in [*packs, packs[0]]:
        import_pack(one, pack, reader=reader)
    for pack in packs[1:]:
        import_pack(between, pack, reader=reader)
    export_pack(between, between.path.with_suffix(".pack"), with_names=True)
    import_pack(other, packs[0], reader=reader)
    import_pack(other, between.path.with_suffix(".pack"), reader=reader)
    merge_store(between, other.path)
    assert content(one) == content(other) == content(between)
    assert one.count() == len({each.id for some in lists for each in some})


def test_equal_content_makes_equal_packs(tmp_path: Path) -> None:
    """A pack's bytes hang on its rows alone: not on their order, nor on when or from where they are exported."""
    some = [FULL, PLAIN, *map(numbered, range(50))]
    store = open_store(tmp_path / "store")
    store.add(reversed(some))
    assert write_pack(some, tmp_path / "a").sha256 == export_pack(store, tmp_path / "b").sha256


def test_names_stay_at_home_unless_asked(tmp_path: Path, make: Callable[[], Store], reader: PackReader) -> None:
    """No byte of an exported pack tells host or user, unless names are asked for; then they arrive."""
    source = make()
    source.add([FULL])
    for with_names in (False, True):
        pack = export_pack(source, tmp_path / f"{with_names}", with_names=with_names)
        target = make()
        import_pack(target, pack.path, reader=reader)
        assert target.query() == [FULL if with_names else FULL.without_names()]
        assert (b"node-7" in pack.path.read_bytes()) <= with_names


def test_an_export_is_of_what_was_asked_for(tmp_path: Path, make: Callable[[], Store]) -> None:
    """Filters choose what is exported; nothing to export is an error and makes no file."""
    store = make()
    store.add([FULL, PLAIN])
    pack = export_pack(store, tmp_path / "pack", Filters(evidence="measured"))
    assert [one for batch in read_pack(pack.path) for one in batch] == [FULL.without_names()]
    with pytest.raises(StoreError, match="no measurement"):
        export_pack(store, tmp_path / "none", Filters(model="nothing"))
    assert not (tmp_path / "none").exists()


def test_bad_rows_are_kept_aside_and_good_ones_taken_on_request(
    tmp_path: Path, make: Callable[[], Store], reader: PackReader
) -> None:
    """One bad row keeps the whole pack out; with `partial` the others come; either way the bad one is in quarantine."""
    pack = write_pack([BAD, PLAIN, numbered(1)], tmp_path / "pack").path
    store = make()
    with pytest.raises(BadPack, match="1 of 3 rows that cannot be"):
        import_pack(store, pack, reader=reader)
    assert store.count() == 0
    imported = import_pack(store, pack, partial=True, reader=reader)
    assert (imported.added, imported.rejected_count) == (2, 1)
    assert imported.quarantine
    head, row = map(json.loads, imported.quarantine.read_text(encoding="utf-8").splitlines())
    assert head["pack"] == imported.sha256
    assert row["id"] == BAD.id
    assert row["content"]["weights_bytes"] == 10**9
    assert "below its weights_bytes" in row["reasons"][0]
    (rejected,) = check_pack(pack, reader=reader).rejected
    assert (rejected.id, list(rejected.reasons)) == (BAD.id, row["reasons"])


def test_merging_is_a_union_of_stores(make: Callable[[], Store]) -> None:
    """Merging adds what is new, names included, whichever way round; the other store stays as it is, byte for byte."""
    one, other = make(), make()
    one.add([FULL.without_names(), PLAIN])
    other.add([FULL, numbered(1)])
    before = other.path.read_bytes()
    assert merge_store(one, other.path).added == 1
    assert other.path.read_bytes() == before
    assert merge_store(other, one.path).added == 1
    assert content(one) == content(other)
    assert one.get(FULL.id) == FULL


def test_stores_that_disagree_are_not_merged(tmp_path: Path, make: Callable[[], Store]) -> None:
    """One id with two contents, a file that is no store, the store itself: refused, and nothing is changed."""
    one, other = make(), make()
    one.add([FULL])
    other.add([FULL, PLAIN])
    with writing(other.path, wait_s=5) as connection:
        connection.execute("UPDATE measurement SET weights_bytes = 7 WHERE evidence = 'measured'")
    before = one.path.read_bytes()
    with pytest.raises(StoreError, match=f"different content under one id: '{FULL.id}'"):
        merge_store(one, other.path)
    (tmp_path / "text").write_text("text", encoding="utf-8")
    with pytest.raises(NotAStore):
        merge_store(one, tmp_path / "text")
    with pytest.raises(StoreError, match="itself"):
        merge_store(one, one.path)
    assert one.path.read_bytes() == before


def test_a_script_may_import_at_its_top_level(tmp_path: Path) -> None:
    """A script may import a pack at its top level: reading processes do not run it again."""
    import subprocess

    pack = write_pack([PLAIN], tmp_path / "pack").path
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\n"
        "from whichlora_profiles_db import import_pack, open_store\n"
        f"print(import_pack(open_store(Path({str(tmp_path / 's')!r})), Path({str(pack)!r})).added)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_no_honest_row_is_implausible() -> None:
    """Nothing that was published, and nothing that was rehearsed, is called impossible."""
    assert [(one.source, reasons) for one in published() if (reasons := implausible(one))] == []
    for line in REHEARSED.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        peaks = fields.pop("truth")
        one = PLAIN.with_(
            workload=workload_from_json(fields),
            **{
                name: peaks[name]
                for name in ("weights_bytes", "model_bytes", "allocated_peak_bytes")
                if peaks.get(name)
            },
        )
        assert implausible(one, now=datetime(2027, 1, 1, tzinfo=timezone.utc)) == []
