"""Verifications on the host: real steps of a small model, their times and memory, and what the store keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from whichlora.verify import Options, Place, answer, find_place, verify
from whichlora.verify.stored import remembered
from whichlora.verify.verifications import check_on
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_profiles_db import open_store

from .conftest import on_host

pytestmark = pytest.mark.stack

STEPS, TOKENS = 3, 4


@pytest.fixture(scope="module")
def place() -> Place:
    """Return the host, looked at once."""
    return find_place("cpu")


def test_training_and_generation_are_timed_and_kept(tmp_path: Path, place: Place) -> None:
    """Every timed step has its sample, the rows are in the store at once, and a second run takes them from there."""
    store = open_store(tmp_path / "profiles.duckdb")
    told: list[tuple[str, int]] = []
    how = Options(steps=STEPS, warmup=0, store=store, on_done=lambda each: told.append((each.outcome, store.count())))
    train, broken = on_host(id="train"), on_host(id="broken", targets=("no_such_layer",))
    generate = on_host(id="generate", phase="generate", prefill_len=8, decode_len=TOKENS, precision="bf16-true")
    trained, failed, generated = verify([train, broken, generate], on=place, options=how)
    assert told == [("ok", 1), ("failed", 2), ("ok", 3)]
    assert "no_such_layer" in failed.measurement.error
    assert failed.measurement.error.startswith("in load: ")

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

    kept = Options(steps=STEPS, store=store, timeout_s=1e-3)  # nothing can run in that time
    again = list(verify([generate.with_(id="renamed"), train], on=place, options=kept))
    assert [each.remembered for each in again] == [True, True]
    assert [each.workload.id for each in again] == ["renamed", "train"]
    assert again[1].measurement == trained.measurement
    (late,) = verify([broken], on=place, options=kept)
    assert "no answer within 0.001 s" in late.measurement.error  # a failure is tried again
    assert answer(late)["error"] == late.measurement.error
    assert remembered(store, [train], place, steps=STEPS + 1) == remembered(store, [broken], place, steps=1) == {}
    elsewhere = dataclasses.replace(place, environment=dataclasses.replace(place.environment, cpu_name="another"))
    assert remembered(store, [train], elsewhere, steps=1) == {}


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
