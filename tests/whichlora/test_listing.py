"""`whichlora profiles list|show|stats` as their users run them, on a store and on the published pack."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from whichlora.cli import main
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Filters, Measurement, TimeStats, measurement_from_json, open_store
from whichlora_profiles_db import published as published_measurements

CONFIG = {"model_type": "llama", "hidden_size": 64}


def measured(day: int, **changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "workload": Workload(model="example/tiny", config=CONFIG, batch_size=2),
        "environment": Environment(gpu="rtx-4090", versions={"torch": "2.14.1"}),
        "evidence": "measured",
        "device": "cuda",
        "outcome": "ok",
        "measured_at": datetime(2026, 1, day, tzinfo=timezone.utc),
        "allocated_peak_bytes": 3 * 2**30,
        "step": TimeStats(samples_s=(0.5, 0.7, 0.6)),
    }
    return Measurement(**fields | changes)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Make a store of three: two runs on different days, one that ran out of memory on another card."""
    path = tmp_path / "store.duckdb"
    oom = {"environment": Environment(gpu="t4"), "outcome": "oom", "error": "out", "allocated_peak_bytes": None}
    open_store(path).add([measured(1), measured(20), measured(10, **oom, step=None)])
    return path


def run(*arguments: object, store: Path) -> Result:
    return CliRunner().invoke(main, ["profiles", *map(str, arguments), "--db", str(store)])


def listed(*arguments: object, store: Path) -> list[dict[str, Any]]:
    done = run("list", *arguments, "--json", store=store)
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)["measurements"]
    return found


def test_a_list_is_in_order_of_date_and_reads_back(store: Path) -> None:
    """The latest comes first, and what is printed as JSON is a measurement again."""
    found = [measurement_from_json(one) for one in listed("--no-published", store=store)]
    assert [one.measured_at.day for one in found if one.measured_at] == [20, 10, 1]
    assert set(found) == set(open_store(store).query())


@pytest.mark.parametrize(
    ("filters", "days"),
    [
        (("--gpu", "RTX 4090"), [20, 1]),
        (("--gpu", "t*"), [10]),
        (("--outcome", "oom"), [10]),
        (("--model", "tiny"), [20, 10, 1]),
        (("--model", "example/tiny", "--since", "2026-01-10"), [20, 10]),
        (("--until", "2026-01-10"), [1]),
        (("--limit", "1"), [20]),
        (("--method", "dora"), []),
    ],
)
def test_filters_choose(filters: tuple[str, ...], days: list[int], store: Path) -> None:
    """Each filter lets through what it names and nothing else."""
    found = listed("--no-published", *filters, store=store)
    assert [datetime.fromisoformat(one["measured_at"]).day for one in found] == days


def test_the_published_pack_is_a_layer_that_filters_apply_to(store: Path) -> None:
    """With the pack every match of both is listed, without it the store's alone, and the store is not written to."""
    before = store.read_bytes()
    shipped = list(published_measurements(Filters(gpu="rtx-4090")))
    both = listed("--gpu", "rtx-4090", "--limit", 0, store=store)
    assert {one["id"] for one in both} == {one.id for one in shipped} | {
        one.id for one in open_store(store).query(Filters(gpu="rtx-4090"))
    }
    assert store.read_bytes() == before


def test_what_the_store_holds_too_is_listed_once(store: Path) -> None:
    """A published measurement that somebody put into the store is not counted twice."""
    one = next(published_measurements(Filters(gpu="l4")))
    open_store(store).add([one])
    assert [each["id"] for each in listed("--gpu", "l4", store=store)] == [one.id]
    counted = json.loads(run("stats", "--gpu", "l4", "--json", store=store).stdout)
    assert counted["total"] == 1


def test_one_is_shown_by_the_beginning_of_its_id(store: Path) -> None:
    """A measurement of the store and one of the pack are found by their first digits; unknown ones are an error."""
    for one in (open_store(store).query()[0], next(published_measurements())):
        shown = json.loads(run("show", one.id[:16], "--json", store=store).stdout)
        assert measurement_from_json(shown) == one
        assert one.workload.model in run("show", one.id[:16], store=store).stdout
    assert run("show", "0123456789abcdef", store=store).exit_code == 2
    assert run("show", "01", store=store).exit_code == 2


def test_stats_add_up(store: Path) -> None:
    """Counts by card, evidence and outcome sum to what is there."""
    counted = json.loads(run("stats", "--json", store=store).stdout)
    assert counted["total"] == 3 + len(list(published_measurements()))
    own = {(g["gpu"], g["evidence"]): g["counts"] for g in counted["groups"] if g["where"] == "store"}
    assert own == {
        ("rtx-4090", "measured"): {"ok": 2, "oom": 0, "failed": 0},
        ("t4", "measured"): {"ok": 0, "oom": 1, "failed": 0},
    }


def test_a_store_that_is_not_there_reads_as_empty(tmp_path: Path) -> None:
    """Listing makes no file."""
    path = tmp_path / "none.duckdb"
    assert listed("--no-published", store=path) == []
    assert run("stats", "--no-published", store=path).exit_code == 0
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [("--since", "yesterday"), ("--limit", "-1"), ("--gpu", "rtx-49090"), ("--evidence", "guessed"), ("--phase", "x")],
)
def test_bad_filters_are_refused(arguments: tuple[str, ...], store: Path) -> None:
    """A filter that cannot match says what is wrong and ends with 2."""
    done = run("list", *arguments, store=store)
    assert done.exit_code == 2
    assert arguments[1] in done.output
