"""From measurements of a processor in a store to predictions for it, as a library and on the command line."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from whichlora.cli import main
from whichlora.processor import calibrated, measured_here, threads
from whichlora_estimators.errors import BadValue
from whichlora_estimators.host_entry import HostEntry
from whichlora_estimators.models import bundled_model
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, Store, TimeStats, local_environment, open_store

#: How the made processor works: a machine of 50 GFLOP/s and 10 GB/s.
MADE = HostEntry(
    s_per_flop=2e-11, s_per_operand_byte=1e-10, s_per_row_byte=1e-10, s_per_other_byte=1e-10, s_per_launch=2e-5
)
MODELS = ("EleutherAI/pythia-70m", "distilgpt2")


def workloads(model: str) -> list[Workload]:
    """Return a step and a generation of two lengths each."""
    config = bundled_model(model).config
    shared = {"model": model, "config": config, "precision": "fp32"}
    return [
        each
        for tokens in (16, 64)
        for each in (
            Workload(**shared, rank=8, seq_len=tokens),  # type: ignore[arg-type]
            Workload(**shared, phase="generate", prefill_len=tokens, decode_len=4),  # type: ignore[arg-type]
        )
    ]


def measured(workload: Workload, environment: Environment, *, seconds: float = 1.0, note: str = "") -> Measurement:
    """Return what the made processor takes, a disturbed sample among others."""
    times = MADE.times(workload)
    known = {"step": times.step_s, "prefill": times.prefill_s, "decode_per_token": times.decode_s_per_token}
    stats: dict[str, Any] = {
        name: TimeStats(samples_s=(value * seconds, 5 * value * seconds)) for name, value in known.items() if value
    }
    return Measurement(
        workload=workload,
        environment=environment,
        evidence="measured",
        device="cpu",
        outcome="ok",
        measured_at=datetime.now(timezone.utc),
        notes=note or f"weights=random threads={threads()}",
        **stats,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store with what the made processor took, and with what others did."""
    here = local_environment(libraries=())
    other = Environment(cpu_name="another processor")
    made = open_store(tmp_path / "profiles.duckdb")
    rows = [measured(each, here) for model in MODELS for each in workloads(model)]
    rows += [measured(each, other, seconds=9.0) for each in workloads(MODELS[0])]
    rows += [measured(each, here, seconds=9.0, note="weights=random threads=99") for each in workloads(MODELS[0])]
    made.add(rows)
    return made


def test_only_this_processor_with_as_many_threads_counts(store: Store) -> None:
    """Measurements of another processor, of other threads or in another precision say nothing of this one."""
    assert len(measured_here(store, "fp32")) == 8
    assert measured_here(store, "bf16-true") == []


def test_a_model_that_was_not_measured_is_predicted(store: Store) -> None:
    """An entry from two models' least times predicts a third model as the processor would run it."""
    processor = calibrated(measured_here(store, "fp32"))
    assert (processor.models, processor.times) == (2, 12)
    for workload in workloads("facebook/opt-125m"):
        expected = MADE.times(workload)
        for name, span in processor.predict(workload).items():
            assert span.expected_s == pytest.approx(getattr(expected, name), rel=0.03)
            assert span.low_s <= span.high_s


def test_one_model_is_too_little(store: Store) -> None:
    """How far an entry is to be trusted shows only on models that it was fitted without."""
    single = [each for each in measured_here(store, "fp32") if each.workload.model == MODELS[0]]
    with pytest.raises(BadValue, match="verify --on cpu"):
        calibrated(single)
    others = [each for each in measured_here(store, "fp32") if each.workload.model == MODELS[1]]
    with pytest.raises(BadValue, match="6 times of 2 models"):
        calibrated([*single[:2], *others[:2]])


def test_the_command_line_predicts_for_the_processor(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`estimate --gpu cpu` answers from the store, as text and as JSON, and refuses what the store says nothing of."""
    monkeypatch.setenv("WHICHLORA_DB", str(store.path))
    asked = ["estimate", "gpt2", "--gpu", "cpu", "--precision", "fp32", "--seq-len", "32", "--offline"]
    shown = CliRunner().invoke(main, asked)
    assert shown.exit_code == 0, shown.output
    assert "12 times of 2 models" in shown.output
    (found,) = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)["predictions"]
    low, high = found["step_s_interval"]
    assert low <= found["step_s"] <= high
    refused = CliRunner().invoke(main, ["estimate", "gpt2", "--gpu", "cpu", "--offline"])
    assert refused.exit_code == 2
    assert "verify --on cpu" in refused.output
    assert CliRunner().invoke(main, [*asked, "--gpu", "t4"]).exit_code == 2
