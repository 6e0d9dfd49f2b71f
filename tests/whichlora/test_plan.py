"""plan.json: what it holds, that it reads back, what is refused; and its folder, which is whole or untouched."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora import BadValue, PickResult, config_from_fields, pick
from whichlora.plan import (
    SCHEMA,
    closest_miss,
    make_plan,
    misses,
    plan_from,
    plan_from_json,
    read_plan,
    survivors,
    write_outputs,
)

SMALL: dict[str, Any] = {
    "gpu": "l4",
    "stage1_profile": {
        "model_names": ["facebook/opt-125m", "gpt2", "meta-llama/Llama-2-70b-hf"],
        "prefill_length": 64,
        "tokens_to_generate": 16,
        "time_per_token_ms": 50,
    },
    "stage2_profile": {"batch_size": [1, 4, 64], "total_time_mins": 60, "peak_memory_gb": 6},
    "methods": ["lora", "qlora"],
    "ranks": [4, 8],
    "seq_len": 256,
    "dataset": {"samples": 1000},
    "epochs": 2,
}
TIGHT = {**SMALL, "stage2_profile": {"batch_size": [1, 4], "total_time_mins": 0.001}}


@pytest.fixture(scope="module")
def found() -> PickResult:
    return pick(config_from_fields(SMALL), offline=True)


@pytest.fixture(scope="module")
def nothing() -> PickResult:
    return pick(config_from_fields(TIGHT), offline=True)


@pytest.mark.parametrize("which", ["found", "nothing"])
def test_plan_reads_back_as_it_was(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Writing and reading a plan loses nothing, whether something was chosen or not."""
    result = request.getfixturevalue(which)
    write_outputs(result, tmp_path / "out")
    assert read_plan(tmp_path / "out") == read_plan(tmp_path / "out" / "plan.json") == make_plan(result)


def test_choice_is_complete(found: PickResult) -> None:
    """The choice carries its whole workload, the steps of its training, and all bytes with intervals around them."""
    choice = make_plan(found).choice
    assert choice is not None
    assert found.choice is not None
    assert choice.workload == found.choice.workload
    schedule = choice.schedule
    assert schedule is not None
    assert (choice.epochs, schedule.epochs, schedule.samples) == (2, 2, 1000)
    assert schedule.total_steps == 2 * -(-1000 // choice.workload.batch_size)
    assert (schedule.real_tokens, schedule.computed_tokens, schedule.longest_tokens) == (256_000, 256_000, 256)
    predicted = choice.predicted
    assert predicted is not None
    assert predicted.evidence == "formula"
    assert predicted.step is not None
    assert predicted.total is not None
    assert predicted.total.expected_s == pytest.approx(schedule.total_steps * predicted.step.expected_s)
    assert predicted.total.low_s < predicted.total.expected_s < predicted.total.high_s
    for spread in (predicted.allocated, predicted.reserved, predicted.process):
        assert spread is not None
        assert spread.expected_bytes is not None
        assert spread.low_bytes is not None
        assert spread.high_bytes is not None
        assert spread.low_bytes <= spread.expected_bytes <= spread.high_bytes
        assert spread.coverage is not None


def test_survivors_are_the_rows_within_every_limit_best_first(found: PickResult) -> None:
    """No survivor was rejected, none is missing, the first is the choice and sizes never rise."""
    rows = survivors(found)
    assert rows[0] == found.choice
    kept = [row for row in found.stage2 if not row.rejected]
    assert len(rows) == len(kept) > 1
    assert all(row in kept for row in rows)
    sizes = [row.parameters for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_misses_tell_for_each_larger_model_why_not(found: PickResult) -> None:
    """A model larger than the choice has one miss with its reasons; no other model has any."""
    assert found.choice is not None
    assert [row.model for row in misses(found)] == ["meta-llama/Llama-2-70b-hf"]
    assert all(row.rejected for row in misses(found))


def test_without_choice_every_model_has_its_closest_miss(nothing: PickResult) -> None:
    """Nothing satisfies: no survivors, and what came closest breaks no more limits than any other row of its model."""
    plan = make_plan(nothing)
    assert plan.choice is None
    assert plan.survivors == ()
    assert sorted(miss.workload.model for miss in plan.misses) == sorted({row.model for row in nothing.stage1})
    assert all(miss.rejected for miss in plan.misses)
    for model in nothing.kept:
        closest = closest_miss(nothing, model)
        assert closest is not None
        assert closest.time_s == min(row.time_s for row in nothing.stage2 if row.model == model and row.time_s)


def test_misses_that_would_run_come_first(nothing: PickResult) -> None:
    """What has no prediction is further from satisfying than what has one."""
    predicted = [miss.predicted is not None for miss in make_plan(nothing).misses]
    assert predicted == sorted(predicted, reverse=True)
    assert set(predicted) == {True, False}


def test_plan_holds_only_finite_json(found: PickResult) -> None:
    """plan.json is strict JSON, and each candidate finds the config of its model in it."""
    fields = plan_from(found)
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert {each["workload"]["model"] for each in fields["survivors"]} <= set(fields["models"])


# --- what is refused ---


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Walk all places of a plan but the models' configs, of each list the first item."""
    if isinstance(value, dict):
        places: list[tuple[str | int, Any]] = [(k, v) for k, v in value.items() if (*path, k) != ("models",)]
    else:
        places = list(enumerate(value[:1])) if isinstance(value, list) else []
    for key, each in places:
        yield (*path, key)
        yield from _paths(each, (*path, key))


def _at(document: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def test_every_field_of_a_plan_is_required_and_typed(found: PickResult) -> None:
    """Leaving any field out, or putting what it cannot be in its place, is refused; so is a field that is not known.

    Only a workload's may be absent, as newer versions have more of them.
    """
    fields = plan_from(found)
    fields["survivors"] = fields["survivors"][:1]
    plan_from_json(fields)
    for path in _paths(fields):
        for change in ("delete", "nonsense", "add"):
            broken = copy.deepcopy(fields)
            place = _at(broken, path[:-1])
            if change == "nonsense":
                place[path[-1]] = {"non": ["sense"]}
            elif change == "delete" and isinstance(place, dict):
                if path[-2:-1] == ("workload",) and path[-1] != "model":
                    continue
                del place[path[-1]]
            elif change == "add" and isinstance(place, dict):
                place["unheard_of"] = 1
            else:
                continue
            with pytest.raises(BadValue):
                plan_from_json(broken)


def test_a_workload_of_an_older_plan_takes_defaults(found: PickResult) -> None:
    """What a plan's workloads do not say is as it always was."""
    fields = plan_from(found)
    for candidate in (fields["choice"], fields["survivors"][0]):
        del candidate["workload"]["reentrant"]
    assert plan_from_json(fields) == make_plan(found)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), SCHEMA + 1, "newer"),
        (("schema",), 0, "schema"),
        (("schema",), True, "not a plan"),
        (("gpu", "total_bytes"), -1, "gpu.total_bytes"),
        (("gpu", "sm_count"), 1.5, "gpu.sm_count"),
        (("kept",), "gpt2", "kept"),
        (("models",), {}, "not among the models"),
        (("choice",), None, "first survivor"),
        (("choice", "predicted", "step", "low_s"), float("nan"), "choice.predicted.step.low_s"),
        (("choice", "predicted", "process", "low_bytes"), "1 GB", "choice.predicted.process.low_bytes"),
        (("choice", "workload", "batch_size"), 0, "batch_size"),
        (("choice", "workload", "method"), "lorra", "unknown method"),
        (("survivors", 1, "rejected"), ["a", 2], r"survivors\[1\].rejected\[1\]"),
        (("gpu", "compute_capability"), [8, 9, 0], "compute_capability"),
    ],
)
def test_refusals_name_the_place(
    found: PickResult, tmp_path: Path, path: tuple[str | int, ...], value: object, says: str
) -> None:
    """A plan that was edited wrongly is refused with the file and the place."""
    fields = plan_from(found)
    _at(fields, path[:-1])[path[-1]] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(BadValue, match=says) as caught:
        read_plan(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', "null", "[" * 100_000, "\ufeff{}"])
def test_foreign_files_are_no_plans(tmp_path: Path, text: str) -> None:
    """Any other file is refused as such."""
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadValue, match="not a"):
        read_plan(file)


def test_missing_plan_is_named(tmp_path: Path) -> None:
    """A plan that is not there, or a folder without one, is refused with its path."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadValue, match=str(path)):
            read_plan(path)


# --- the folder ---


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_new_folder_holds_both_files_and_nothing_else_appears(found: PickResult, tmp_path: Path) -> None:
    """A folder that is not there is made, with those above it; no temporary file stays."""
    folder = tmp_path / "a" / "b"
    paths = write_outputs(found, folder)
    assert sorted(paths) == [folder / "plan.json", folder / "report.html"]
    assert sorted(_content(tmp_path)) == ["a/b/plan.json", "a/b/report.html"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_old_folder_keeps_what_is_not_ours(found: PickResult, nothing: PickResult, tmp_path: Path) -> None:
    """Writing again replaces both files and leaves others alone; a link to a folder is followed."""
    folder = tmp_path / "out"
    write_outputs(nothing, folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    write_outputs(found, tmp_path / "link")
    assert sorted(_content(folder)) == ["notes.txt", "plan.json", "report.html"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_plan(folder) == make_plan(found)
    assert (tmp_path / "link").is_symlink()


def test_failure_in_the_middle_leaves_the_old_files(found: PickResult, nothing: PickResult, tmp_path: Path) -> None:
    """A disk that takes no more bytes is told as such, and every older file stays byte for byte."""
    folder = tmp_path / "out"
    write_outputs(nothing, folder)
    before = _content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(BadValue, match="cannot write the results"):
            write_outputs(found, folder)
        with pytest.raises(BadValue, match="cannot write the results"):
            write_outputs(found, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_plan_is_the_last_to_be_replaced(found: PickResult, nothing: PickResult, tmp_path: Path) -> None:
    """Where the report cannot be replaced, the plan that commands consume stays the old one."""
    write_outputs(nothing, tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(BadValue, match="cannot write the results"):
        write_outputs(found, tmp_path)
    assert read_plan(tmp_path) == make_plan(nothing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "report.html"]


def test_places_that_cannot_hold_a_folder_are_refused(found: PickResult, tmp_path: Path) -> None:
    """A file in the way, at the end of the path or within it, stays as it is."""
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(BadValue, match="cannot write the results"):
            write_outputs(found, folder)
    assert _content(tmp_path) == {"file": b"mine"}
