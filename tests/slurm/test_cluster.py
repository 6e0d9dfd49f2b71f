"""The Slurm that other tests run on is a real one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.waiting import until

from .cluster import Slurm, slurm

__all__ = ["slurm"]


def test_a_job_runs_on_the_card_that_it_asks_for(slurm: Slurm, tmp_path: Path) -> None:
    """The node offers both types of card, and a job that asks for one gets it."""
    assert slurm.run("sinfo", "--noheader", "--format=%G") == "gpu:a100:1,gpu:rtx4090:1"
    output = tmp_path / "output"
    job = slurm.run("sbatch", "--parsable", "--gres=gpu:rtx4090:1", f"--output={output}", "--wrap=echo $SLURM_JOB_GPUS")
    until(lambda: slurm.states()[job] == "COMPLETED", slurm.states, seconds=30)
    assert output.read_text(encoding="utf-8").strip() == "1"
