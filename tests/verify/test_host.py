"""Verifications on the host: real steps of a small model, their times and memory, and what the store keeps."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from whichlora.cli import main
from whichlora.plan import Plan
from whichlora.verify import Options, Place, Verification, answer, find_place, verify, verify_plan
from whichlora.verify.recorders import Telling
from whichlora.verify.stored import remembered
from whichlora.verify.verifications import check_on
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported, WhichloraError
from whichlora_profiles_db import Store, open_store, workload_to_json

from .conftest import altered, on_host

pytestmark = pytest.mark.stack

STEPS, TOKENS = 3, 4
TRAIN, BROKEN = on_host(id="train"), on_host(id="broken", targets=("no_such_layer",))
GENERATE = on_host(id="generate", phase="generate", prefill_len=8, decode_len=TOKENS, precision="bf16-true")


@pytest.fixture(scope="module")
def place() -> Place:
    """Return the host, looked at once."""
    return find_place("cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What three workloads took on the host, what was told while they ran, and the store that keeps it."""

    found: tuple[Verification, ...]
    told: tuple[tuple[str, int], ...]
    progress: tuple[tuple[str, str], ...]
    store: Store


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Ran:
    """Return what the host saw of a training, of one that fails, and of a generation."""
    store = open_store(tmp_path_factory.mktemp("host") / "profiles.duckdb")
    told: list[tuple[str, int]] = []
    progress: list[tuple[str, str]] = []
    how = Options(
        steps=STEPS,
        warmup=0,
        store=store,
        on_done=lambda each: told.append((each.outcome, store.count())),
        on_progress=lambda workload, text: progress.append((workload.id, text)),
        tell_s=0.0,
    )
    found = tuple(verify([TRAIN, BROKEN, GENERATE], on=place, options=how))
    return Ran(found=found, told=tuple(told), progress=tuple(progress), store=store)


def test_progress_is_told_of_each_workload_while_it_runs(ran: Ran) -> None:
    """Phases, then steps or generations and their passes, in order; asked to tell at any time, all of them."""
    said = {name: [text for id_, text in ran.progress if id_ == name] for name in ("train", "broken", "generate")}
    assert sum(map(len, said.values())) == len(ran.progress)
    train = said["train"]
    assert train[0].startswith("importing")
    assert [text for text in train if text in ("load", "forward", "backward", "optimizer")][:4] == [
        "load",
        "forward",
        "backward",
        "optimizer",
    ]
    assert [text for text in train if text.startswith("timing")] == [
        f"timing, {done} of {STEPS} steps done" for done in range(STEPS + 1)
    ]
    assert said["broken"] == ["load"]
    passes = [text for text in said["generate"] if text.startswith("timing")]
    assert passes == [
        f"timing generation {number} of {STEPS}, {done} passes done"
        for number in range(1, STEPS + 1)
        for done in range(TOKENS + 1)
    ]


def test_what_is_quick_says_nothing() -> None:
    """Words come no closer together than was asked, and none before that."""
    said: list[str] = []
    rare, always = Telling(said.append, 60.0), Telling(said.append, 0.0)
    for text in "abc":
        rare(text)
    assert said == []
    for text in "abc":
        always(text)
    assert said == ["a", "b", "c"]


def test_training_and_generation_are_timed_and_kept(ran: Ran) -> None:
    """Every timed step has its sample, and the rows are in the store at once."""
    trained, failed, generated = ran.found
    assert ran.told == (("ok", 1), ("failed", 2), ("ok", 3))
    assert "no_such_layer" in failed.measurement.error
    assert failed.measurement.error.startswith("in load: ")
    assert answer(failed)["error"] == failed.measurement.error

    step, prefill, decode = (
        trained.measurement.step,
        generated.measurement.prefill,
        generated.measurement.decode_per_token,
    )
    assert step
    assert prefill
    assert decode
    assert [len(each.samples_s) for each in (step, prefill, decode)] == [STEPS, STEPS, STEPS * (TOKENS - 1)]
    assert trained.typical_s == {"step_s": step.median_s}
    assert generated.typical_s == {"prefill_s": prefill.median_s, "decode_s_per_token": decode.mean_s}
    for each in (trained, generated):
        assert (each.measurement.evidence, each.device, each.gpu) == ("measured", "cpu", None)
        assert (each.process_bytes or 0) > 4 * 1_000_000  # the parameters alone
        assert each.measurement.allocated_peak_bytes is None
        assert each.compared == {}
    assert 0 < (trained.measurement.trainable_params or 0) < 100_000


def test_what_is_stored_is_not_run_again(ran: Ran, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no worker can start, the same place has all but failures from the store, if it has as many samples."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    store, kept = ran.store, Options(steps=STEPS, store=ran.store)
    again = list(verify([GENERATE.with_(id="renamed"), TRAIN], on=place, options=kept))
    assert [each.remembered for each in again] == [True, True]
    assert [each.workload.id for each in again] == ["renamed", "train"]
    assert again[1].measurement == ran.found[0].measurement
    with pytest.raises(WhichloraError, match="did not start"):
        list(verify([BROKEN], on=place, options=kept))
    assert remembered(store, [TRAIN], place, steps=STEPS + 1) == remembered(store, [BROKEN], place, steps=1) == {}
    elsewhere = dataclasses.replace(place, environment=dataclasses.replace(place.environment, cpu_name="another"))
    assert remembered(store, [TRAIN], elsewhere, steps=1) == {}


def test_a_workload_file_is_answered_in_order(ran: Ran, tmp_path: Path) -> None:
    """Each line gets its answer in its place, with times on the host, and `profiles` finds them as well."""
    refused = {**workload_to_json(TRAIN), "id": "refused", "quantization": "nf4"}
    path = tmp_path / "workloads.jsonl"
    path.write_text("\n".join(map(json.dumps, (workload_to_json(TRAIN), refused, workload_to_json(GENERATE)))))
    stored = ("--db", str(ran.store.path))
    command = ["verify", "--on", "cpu", "--steps", "2", "--workloads", str(path), "--json", *stored]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    first, second, last = map(json.loads, done.stdout.splitlines())
    assert [first["id"], second["id"], last["id"]] == ["train", "refused", "generate"]
    assert "nf4" in second["error"]
    assert len(first["times"]["step"]["samples_s"]) == STEPS
    assert last["prefill_s"] > 0
    assert last["decode_s_per_token"] > 0
    assert "[2/2]" in done.stderr
    assert done.stderr.count("(from the store)") == 2
    shown = CliRunner().invoke(main, ["profiles", "show", first["measurement"][:12], *stored])
    assert first["measurement"][:12] in shown.stdout


def test_a_plan_s_time_is_that_of_all_steps(ran: Ran, place: Place, plan: Plan) -> None:
    """The whole fine-tuning takes as much longer than the plan's as the median step does: here so many steps in all."""
    found = verify_plan(altered(plan, TRAIN), on=place, options=Options(steps=2, store=ran.store))
    assert found.best
    step = found.best.verification.measurement.step
    assert step
    assert found.best.time_s == pytest.approx((step.median_s or 0) * 100)


@pytest.mark.parametrize(
    ("setup", "named"),
    [
        ({"quantization": "nf4"}, "nf4"),
        ({"precision": "fp16-true"}, "fp16-true"),
        ({"optimizer": "paged-adamw-8bit"}, "paged-adamw-8bit"),
        ({"method": "lorra"}, "lorra"),
    ],
)
def test_what_the_host_does_not_run_is_refused(setup: dict[str, str], named: str) -> None:
    """A workload is refused by the value that stands in the way, before anything is started."""
    with pytest.raises((Unsupported, UnknownName), match=named):
        verify([on_host(**setup)], on="cpu")


def test_generating_needs_no_optimizer() -> None:
    """An optimizer that the host lacks does not matter where nothing is trained."""
    check_on(on_host(phase="generate", optimizer="paged-adamw-8bit"), "cpu")


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"warmup": -1}, {"timeout_s": 0}])
def test_wrong_options_are_refused(wrong: dict[str, int]) -> None:
    """Counts and times that make no sense are named."""
    with pytest.raises(BadValue, match=next(iter(wrong)).removesuffix("_s")):
        Options(**wrong)  # type: ignore[arg-type]


def test_a_place_that_is_not_known_is_refused() -> None:
    """A place is one of four, and only the null device is told which card it is."""
    with pytest.raises(UnknownName, match="gpu"):
        verify([on_host()], on="gpu")
    with pytest.raises(BadValue, match="rtx-4090"):
        verify([on_host()], on="cpu", gpu="rtx-4090")
    with pytest.raises(BadValue, match="--gpu"):
        verify([on_host()], on="null")
