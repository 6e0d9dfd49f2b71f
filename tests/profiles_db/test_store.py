"""Laws of the store: a set of measurements, whoever adds what in which order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whichlora_estimators.errors import BadValue, UnknownName
from whichlora_profiles_db import (
    Filters,
    Measurement,
    Store,
    UnknownMeasurement,
    config_id,
    default_path,
    open_store,
    workload_to_json,
)
from whichlora_profiles_db.rows import COLUMNS
from whichlora_profiles_db.session import reading

from .conftest import content, versions_of
from .records import CONFIG, ENVIRONMENT, FULL, PLAIN, WORKLOAD, measurements, numbered

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Some measurements, some of them in a version without names or with other names.
POOL = versions_of(3)


def test_every_field_comes_back(make: Callable[[], Store]) -> None:
    """What is read equals what was added, with every field of it filled in and with none."""
    store = make()
    assert store.add([FULL, PLAIN]) == 2
    assert store.get(FULL.id) == FULL
    assert store.get(PLAIN.id) == PLAIN
    assert store.query() == [FULL, PLAIN]


@few
@given(st.lists(measurements(), min_size=1, max_size=8))
def test_any_measurement_comes_back(make: Callable[[], Store], some: list[Measurement]) -> None:
    """Reading returns each measurement as it was added, id included, whatever its fields hold."""
    store = make()
    store.add(some)
    found = {one.id: one for batch in store.iterate(batch=3) for one in batch}
    assert found.keys() == {one.id for one in some}
    for one in some:
        assert found[one.id].without_names() == one.without_names()


@few
@given(st.lists(st.sampled_from(POOL), max_size=5), st.lists(st.sampled_from(POOL), max_size=5))
def test_adding_is_a_union(make: Callable[[], Store], left: list[Measurement], right: list[Measurement]) -> None:
    """Adding is commutative and idempotent, also for measurements that some have with and some without names."""
    one, other = make(), make()
    assert one.add(left) == len({each.id for each in left})
    assert one.add(right) == len({each.id for each in right} - {each.id for each in left})
    other.add(right)
    other.add(left)
    assert content(one) == content(other)
    assert one.add(left + right) == 0
    assert content(one) == content(other)


def test_names_are_kept_where_anybody_knew_them(make: Callable[[], Store]) -> None:
    """A measurement that came without host and user, and later with them, has them."""
    store = make()
    assert store.add([FULL.without_names()]) == 1
    assert store.get(FULL.id).environment.host_name is None
    assert store.add([FULL]) == 0
    assert store.get(FULL.id) == FULL


def test_what_is_not_there_is_empty(tmp_path: Path) -> None:
    """A store that does not exist reads as empty and is not made by reading, nor by adding nothing."""
    with open_store(tmp_path / "folder" / "none.duckdb") as store:
        assert store.query() == [] == list(store.iterate())
        assert store.known(["0" * 64]) == set()
        assert store.count() == 0 == store.stats().total == store.stats().file_bytes
        with pytest.raises(UnknownMeasurement):
            store.get("0")
        assert store.add([]) == 0
        assert not store.exists
    assert list(tmp_path.iterdir()) == []


def test_adding_leaves_one_file(tmp_path: Path) -> None:
    """After an addition there is the file, whose folder was made, and nothing beside it."""
    store = open_store(tmp_path / "deep" / "down" / "s.duckdb")
    store.add([PLAIN])
    assert [path.name for path in store.path.parent.iterdir()] == ["s.duckdb"]


def test_get_takes_the_beginning_of_an_id(make: Callable[[], Store]) -> None:
    """The shortest beginning that only one id has finds it; shorter ones and unknown ones are errors."""
    store = make()
    some = {one.id: one for one in map(numbered, range(12))}
    store.add(some.values())
    for id_, one in some.items():
        shared = max(sum(1 for _ in _common(id_, other)) for other in some if other != id_)
        assert store.get(id_[: shared + 1].upper()) == one
        with pytest.raises(UnknownMeasurement, match="several" if shared else "no measurement"):
            store.get(id_[:shared])
    for unknown in ("", "x", "0" * 65, "%"):
        with pytest.raises(UnknownMeasurement):
            store.get(unknown)
    assert store.known([*some, "0" * 64]) == set(some)


def _common(one: str, other: str) -> list[str]:
    length = next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return list(one[:length])


def test_iterating_shows_what_was_there_and_holds_nothing(make: Callable[[], Store]) -> None:
    """Every measurement of the start comes once and in order, while the same loop adds others."""
    store = make()
    some = [numbered(number) for number in range(7)]
    store.add(some)
    seen = []
    for number, batch in enumerate(store.iterate(batch=2)):
        assert len(batch) <= 2
        seen += batch
        assert store.add([numbered(100 + number)]) == 1
    assert sorted(seen, key=lambda one: one.notes) == some
    assert store.count() == 7 + 4
    order = [one.notes for batch in store.iterate() for one in batch]
    assert order == [one.notes for one in seen] + [f"number {100 + number}" for number in range(4)]


WHEN = datetime(2026, 1, 1, tzinfo=timezone.utc)
VARIED = [
    FULL,
    FULL.with_(evidence="published", measured_at=None, source="Somebody's Blog"),
    FULL.with_(device="cpu", measured_at=WHEN, outcome="failed"),
    *(
        PLAIN.with_(
            environment=dataclasses.replace(ENVIRONMENT, gpu=gpu),
            workload=WORKLOAD.with_(model=model, method=method, phase="train", task="causal", quantization="none"),
            measured_at=WHEN + timedelta(days=day),
        )
        for day, (gpu, model, method) in enumerate(
            (gpu, model, method)
            for gpu in ("a100-pcie-40gb", "a100-sxm-80gb", None)
            for model in ("Qwen/Qwen3-8B", "a_model%with'odd\"signs")
            for method in ("lora", "dora")
        )
    ),
]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store with measurements that differ in everything one can filter by."""
    store = open_store(tmp_path_factory.mktemp("varied") / "store.duckdb")
    store.add(VARIED)
    return store


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        ({"gpu": "A100-PCIE-40GB"}, lambda one: one.environment.gpu == "a100-pcie-40gb"),
        ({"gpu": "a100-*"}, lambda one: (one.environment.gpu or "").startswith("a100-")),
        ({"model": "qwen/*"}, lambda one: one.workload.model == "Qwen/Qwen3-8B"),
        ({"model": "*3-?b"}, lambda one: one.workload.model == "Qwen/Qwen3-8B"),
        ({"model": "a_model%with'odd\"signs"}, lambda one: "odd" in one.workload.model),
        ({"model": "a_model_with_odd_signs"}, lambda one: False),
        ({"model": "' OR true --"}, lambda one: False),
        ({"method": ["dora", "nothing"]}, lambda one: one.workload.method == "dora"),
        ({"method": []}, lambda one: False),
        ({"evidence": "measured"}, lambda one: one.evidence == "measured"),
        ({"evidence": ("measured", "PUBLISHED")}, lambda one: one.evidence != "rehearsed"),
        ({"outcome": "failed"}, lambda one: one.outcome == "failed"),
        ({"device": "cpu"}, lambda one: one.device == "cpu"),
        ({"phase": "train"}, lambda one: one.workload.phase == "train"),
        ({"task": "seq2seq"}, lambda one: one.workload.task == "seq2seq"),
        ({"precision": "fp16-mixed"}, lambda one: one.workload.precision == "fp16-mixed"),
        ({"quantization": "nf4"}, lambda one: one.workload.quantization == "nf4"),
        ({"source": "*blog"}, lambda one: one.source == "Somebody's Blog"),
        ({"workload_id": FULL.workload_id}, lambda one: one.workload_id == FULL.workload_id),
        (
            {"since": WHEN + timedelta(days=2)},
            lambda one: one.measured_at and one.measured_at >= WHEN + timedelta(days=2),
        ),
        (
            {"until": WHEN + timedelta(days=2)},
            lambda one: one.measured_at and one.measured_at < WHEN + timedelta(days=2),
        ),
        ({"gpu": "a100*", "method": "dora"}, lambda one: one.environment.gpu and one.workload.method == "dora"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "rows",
)
def test_filters_keep_what_they_say(
    varied: Store, filters: dict[str, Any], keep: Callable[[Measurement], object]
) -> None:
    """A query returns exactly what the condition written in Python keeps; counting and iterating agree."""
    if filters.get("gpu") == "a100*":
        expected = {one.id for one in VARIED if (one.environment.gpu or "")[:4] == "a100" and keep(one)}
    else:
        expected = {one.id for one in VARIED if keep(one)}
    chosen = Filters(**filters)
    found = [one.id for one in varied.query(chosen)]
    assert len(found) == len(set(found)) == varied.count(chosen) == varied.stats(chosen).total
    assert set(found) == expected == {one.id for batch in varied.iterate(chosen, batch=2) for one in batch}


def test_every_filter_is_tried() -> None:
    """The table above has a case for each field of Filters."""
    cases = test_filters_keep_what_they_say.pytestmark[0].args[1]
    assert {name for case in cases for name in case[0]} == {field.name for field in dataclasses.fields(Filters)}


def test_the_latest_comes_first(varied: Store) -> None:
    """A query is in order of time, what has no date last, and a limit cuts its end off."""
    dates = [one.measured_at for one in varied.query()]
    assert dates[-1] is None
    assert dates[:-1] == sorted(filter(None, dates), reverse=True)
    for limit in (0, 3, 100):
        assert varied.query(limit=limit) == varied.query()[:limit]
    with pytest.raises(BadValue):
        varied.query(limit=-1)
    with pytest.raises(BadValue):
        next(varied.iterate(batch=0))


@pytest.mark.parametrize(
    "filters",
    [{"outcome": "okay"}, {"evidence": ["measured", "seen"]}, {"gpu": 3}, {"since": datetime(2026, 1, 1)}],
    ids=str,
)
def test_filters_that_mean_nothing_are_refused(filters: dict[str, Any]) -> None:
    """A misspelt outcome is an error and not an empty list."""
    with pytest.raises((BadValue, UnknownName)):
        Filters(**filters)


def test_stats_count_what_is_there(varied: Store) -> None:
    """Groups are by card and evidence, and their counts are those of the measurements."""
    stats = varied.stats()
    assert stats.total == len(VARIED)
    assert stats.file_bytes == varied.path.stat().st_size
    for group in stats.groups:
        members = [one for one in VARIED if (one.environment.gpu, one.evidence) == (group.gpu, group.evidence)]
        assert group.counts == {
            outcome: sum(one.outcome == outcome for one in members) for outcome in ("ok", "oom", "failed")
        }
        assert group.models == len({one.workload.model for one in members})
        assert group.workloads == len({one.workload_id for one in members})
        dates = [one.measured_at for one in members if one.measured_at]
        assert (group.first_at, group.last_at) == ((min(dates), max(dates)) if dates else (None, None))


def test_the_columns_are_those_of_the_table(varied: Store) -> None:
    """Rows are written and read in the names and types that the migrations declare."""
    with reading(varied.path, wait_s=5) as connection:
        rows = connection.execute("SELECT column_name, column_type FROM (DESCRIBE measurement)").fetchall()
        configs = connection.execute("SELECT id, config FROM config").fetchall()
    assert dict(rows) == {"seq": "BIGINT", **COLUMNS}
    assert [(id_, json.loads(text)) for id_, text in configs] == [(config_id(CONFIG), CONFIG), (config_id({}), {})][:1]


def test_a_workload_in_json_is_whole(varied: Store) -> None:
    """The JSON form of what a store gives back is the workload's, every field included."""
    stored = workload_to_json(varied.get(FULL.id).workload)
    whole = {name: getattr(WORKLOAD, name) for name in stored}
    assert stored == json.loads(json.dumps(whole))  # tuples, those within tuples too, are lists
    assert stored.keys() == {field.name for field in dataclasses.fields(WORKLOAD)}


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({"WHICHLORA_DB": "/lab/runs.duckdb", "XDG_DATA_HOME": "/data"}, "linux", "/lab/runs.duckdb"),
        ({"XDG_DATA_HOME": "/data"}, "linux", "/data/whichlora/profiles.duckdb"),
        ({"XDG_DATA_HOME": "relative"}, "linux", "/home/me/.local/share/whichlora/profiles.duckdb"),
        ({"WHICHLORA_DB": ""}, "freebsd14", "/home/me/.local/share/whichlora/profiles.duckdb"),
        ({"XDG_DATA_HOME": "/data"}, "darwin", "/home/me/Library/Application Support/whichlora/profiles.duckdb"),
        ({"LOCALAPPDATA": "/appdata"}, "win32", "/appdata/whichlora/profiles.duckdb"),
        ({}, "win32", "/home/me/AppData/Local/whichlora/profiles.duckdb"),
    ],
    ids=str,
)
def test_the_default_path_is_the_platforms(environ: dict[str, str], platform: str, expected: str) -> None:
    """The variable comes first, then the platform's folder for data."""
    assert default_path(environ, platform=platform, home=Path("/home/me")) == Path(expected)


def test_the_variable_chooses_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WHICHLORA_DB is where a store without a path is, and a path given wins."""
    monkeypatch.setenv("WHICHLORA_DB", str(tmp_path / "lab.duckdb"))
    assert open_store().path == tmp_path / "lab.duckdb"
    assert open_store(tmp_path / "other.duckdb").path == tmp_path / "other.duckdb"
