"""`whichlora slurm --submit` on a real Slurm with two GPU types: chains run to their end, on the null device."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.waiting import until
from whichlora.cli import main

from ..finetune.conftest import UNITS, _own_store, small_model
from ..slurm.cluster import Slurm, slurm

__all__ = ["_own_store", "slurm", "small_model"]
pytestmark = pytest.mark.stack
TYPES = ("a100", "rtx4090")


@pytest.fixture
def login(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Make this process one on the cluster's login node, whose jobs find what it finds."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slurm


def write_config(folder: Path, model: Path, *, epochs: int = 1) -> Path:
    fields = {
        "stage1_profile": {"model_names": [str(model)], "prefill_length": 32, "tokens_to_generate": 2},
        "stage2_profile": {"batch_size": [4]},
        "methods": ["lora"],
        "ranks": [4],
        "seq_len": 128,
        "dataset": {"source": str(UNITS)},
        "epochs": epochs,
        "finetune": {"save_steps": 2, "eval_steps": 1000},
        "slurm": {"cpus": 1, "memory": "1G", "gpu_types": {"a100": "a100-sxm-40gb"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    return folder / "config.yaml"


def submit(config: Path, out: Path, *more: str) -> dict[str, str]:
    """Submit and return the job ids by `type/script`."""
    words = ["slurm", str(config), "--out", str(out), "--on", "null", "--offline", "--submit", *more]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.stdout.splitlines() if line.endswith(".sh")]
    return {name: job for job, name in lines}


def wait(ready: Callable[[], bool], logs: Path, *, seconds: float = 280) -> None:
    def said() -> str:
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs.rglob("*.out"))

    until(ready, said, seconds=seconds)


def ended(slurm: Slurm, job: str) -> bool:
    """Say whether a job, every task of it if it is an array, has ended; fail where one ended badly."""
    states = {name: state for name, state in slurm.states().items() if name.partition("_")[0] == job}
    assert not {"FAILED", "CANCELLED", "TIMEOUT"} & set(states.values()), states
    return set(states.values()) == {"COMPLETED"}


def test_both_types_chains_run_to_their_end(login: Slurm, small_model: Path, tmp_path: Path) -> None:
    """Each type measures inference, then fine-tuning, then tunes what it chose by these; the store has each once."""
    from whichlora_profiles_db import open_store

    config, out = write_config(tmp_path, small_model), tmp_path / "jobs"
    jobs = submit(config, out, "--db", str(tmp_path / "store.duckdb"))
    assert set(jobs) == {f"{name}/{script}.sh" for name in TYPES for script in ("stage1", "stage2", "finetune")}
    wait(lambda: all(ended(login, job) for job in jobs.values()), out)
    for name in TYPES:
        result = json.loads((out / name / "finetune" / "result.json").read_text(encoding="utf-8"))
        assert (result["outcome"], result["steps"]) == ("ok", result["total_steps"])
        plan = json.loads((out / name / "pick" / "plan.json").read_text(encoding="utf-8"))
        assert plan["choice"]["predicted"]["evidence"] == plan["serving"][0]["predicted"]["evidence"] == "rehearsed"
    with open_store(tmp_path / "store.duckdb") as store:
        kept = store.query()
    for gpu in ("a100-sxm-40gb", "rtx-4090"):
        of_card = [each for each in reversed(kept) if each.environment.gpu == gpu]  # the first comes first
        assert [each.workload.phase for each in of_card] == ["generate", "train", "train"]
        assert [each.notes.startswith("finetune") for each in of_card] == [False, False, True]
        assert {each.outcome for each in of_card} == {"ok"}


def test_a_job_that_the_scheduler_kills_is_resumed(login: Slurm, small_model: Path, tmp_path: Path) -> None:
    """Killed and queued again by Slurm in the middle of a training, the job goes on from a checkpoint to the end."""
    config, out = write_config(tmp_path, small_model, epochs=4), tmp_path / "jobs"
    found = CliRunner().invoke(
        main, ["slurm", str(config), "--out", str(out), "--on", "null", "--offline", "--type", "rtx4090"]
    )
    assert found.exit_code == 0, found.output
    folder = out / "rtx4090"
    job = login.run("sbatch", "--parsable", str(folder / "finetune.sh"))
    checkpoints = folder / "finetune" / "checkpoints"
    wait(lambda: any(checkpoints.glob("checkpoint-*/complete")), out)
    login.run("scontrol", "requeue", job)
    login.run("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm would wait two minutes
    wait(lambda: ended(login, job), out)
    result = json.loads((folder / "finetune" / "result.json").read_text(encoding="utf-8"))
    assert (result["outcome"], result["steps"]) == ("ok", result["total_steps"])
    log = "".join(path.read_text(encoding="utf-8") for path in (folder / "logs").iterdir())
    assert "resuming from checkpoint-" in log
