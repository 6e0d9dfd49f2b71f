"""Fine-tuning as a process: killed and resumed, on the null device, out of memory, and what users get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.waiting import until
from whichlora.cli import main
from whichlora.finetune.recipe import make_recipe
from whichlora.finetune.run import Options, run
from whichlora.plan import read_plan
from whichlora_profiles_db import open_store

from .conftest import make_plan, read_json

pytestmark = pytest.mark.stack
COMMAND = [sys.executable, "-c", "from whichlora.cli import main; main()", "finetune"]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def start(*args: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*COMMAND, *map(str, args)], env=os.environ | QUIET, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def finish(*args: object) -> tuple[int, str]:
    process = start(*args)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.parametrize("method", ["adalora"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(method: str, small_model: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL after some checkpoints and started again, training ends with the very same losses."""
    import torch

    torch.set_num_threads(1)
    settings = {"learning_rate": 0.1, "save_steps": 1, "eval_steps": 100}
    plan = make_plan(small_model, tmp_path, methods=[method], finetune=settings)
    process = start(plan, "--on", "cpu", "--offline", "--no-store")
    third = tmp_path / "finetune" / "checkpoints" / "checkpoint-3" / "complete"
    until(lambda: third.exists() or process.poll() is not None, "no third checkpoint", seconds=240, pause_s=0.01)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "finetune" / "result.json").exists()
    said: list[str] = []
    recipe = make_recipe(read_plan(plan))
    resumed = run(recipe, tmp_path / "finetune", Options(on="cpu"), report=said.append)
    assert any(line.startswith("resuming from checkpoint-") for line in said)
    whole = run(recipe, tmp_path / "whole", Options(on="cpu"))
    assert resumed.steps == whole.steps == 16
    assert resumed.last_loss == pytest.approx(whole.last_loss, rel=1e-6)
    assert resumed.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)


def test_qlora_on_the_null_device(small_model: Path, tmp_path: Path) -> None:
    """Memory as predicted for the batch that ran, stored as rehearsed and without times; no loss is told, no adapter kept."""
    plan = make_plan(small_model, tmp_path, methods=["qlora"], precision="bf16-true")
    status, said = finish(plan, "--on", "null", "--offline", "--db", tmp_path / "store.duckdb")
    assert status == 0, said
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == len(set(steps)) > 0, said  # an evaluation has no number to tell
    assert "FutureWarning" not in said
    result = read_json(tmp_path / "finetune" / "result.json")
    with open_store(tmp_path / "store.duckdb") as store:
        (kept,) = store.query()
    assert (kept.device, kept.evidence, kept.step) == ("null", "rehearsed", None)
    assert kept.workload.quantization == "nf4"
    assert kept.allocated_peak_bytes == result["allocated_peak_bytes"] > 0
    assert result["last_loss"] is result["step_s"] is result["adapter"] is None
    for compared in result["compared"]:
        interval = compared["predicted"]
        assert interval["low_bytes"] <= compared["seen_bytes"] <= interval["high_bytes"], compared


def test_running_out_of_memory_is_kept(tmp_path: Path) -> None:
    """On a card that is too small the exit status is 1, and a measurement says that it was; no weights are needed for it."""
    plan = make_plan(Path("Qwen/Qwen2.5-0.5B"), tmp_path, precision="bf16-true")
    fields = read_json(plan / "plan.json")
    fields["gpu"]["total_bytes"] = 3 * 2**29  # the weights alone take two thirds of it
    (plan / "plan.json").write_text(json.dumps(fields), encoding="utf-8")
    status, said = finish(plan, "--on", "null", "--offline", "--db", tmp_path / "store.duckdb")
    assert status == 1, said
    with open_store(tmp_path / "store.duckdb") as store:
        (kept,) = store.query()
    assert (kept.outcome, kept.device) == ("oom", "null"), said
    assert "out of memory" in kept.error


def test_mistakes_are_told_before_anything_runs(small_model: Path, tmp_path: Path) -> None:
    """No plan, no data, a checkpoint that is not there, kernels that a CPU lacks, nothing to merge: status 2 and the reason."""
    plan = make_plan(small_model, tmp_path / "qlora", methods=["qlora"], precision="bf16-true")
    prompts = make_plan(small_model, tmp_path / "prompts", methods=["prompt-tuning"])
    bare = make_plan(small_model, tmp_path / "bare", dataset={"samples": 100})
    untold = make_plan(Path("Qwen/Qwen2.5-0.5B"), tmp_path / "untold")
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere"], "cannot read the plan"),
        ([bare, "--on", "cpu"], "names no data set"),
        ([bare, "--on", "cpu", "--model-path", tmp_path, "--data", "x.jsonl"], "no model at this path"),
        ([plan, "--on", "cpu"], "bitsandbytes"),
        ([plan, "--on", "cuda"], "no card"),
        ([untold, "--on", "cpu", "--offline", "--no-store"], "cannot find the tokenizer"),
        ([prompts, "--on", "cpu", "--merge"], "nothing that merges"),
    ]
    for args, reason in cases:
        found = CliRunner().invoke(main, ["finetune", *map(str, args)])
        assert found.exit_code == 2, found.output
        assert reason in found.output
