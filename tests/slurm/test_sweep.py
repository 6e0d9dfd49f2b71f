"""A sweep over a real Slurm: everything arrives in the store, whatever happens to a task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import open_store, workload_to_json

from .cluster import Slurm, slurm

__all__ = ["slurm"]
TINY = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 64,
    "architectures": ["GPT2LMHeadModel"],
}
WORKLOADS = [
    Workload(model="tiny", config=TINY, id=f"line-{batch}-{length}", batch_size=batch, seq_len=length)
    for batch in range(1, 9)
    for length in range(8, 48, 8)
]


@pytest.mark.stack
@pytest.mark.parametrize("kind", ["slurm"])
def test_forty_rehearsals_survive_a_killed_worker(
    request: pytest.FixtureRequest, slurm: Slurm, tmp_path: Path, kind: str
) -> None:
    """Forty rehearsals run as a job array; a worker is killed midway; all forty are answered in order and stored once."""
    pytest.importorskip("torch", reason="needs the extra gpu")
    pytest.importorskip("submitit", reason="needs the extra cluster")
    lines, db = tmp_path / "sweep.jsonl", tmp_path / "store.duckdb"
    lines.write_text("".join(json.dumps(workload_to_json(each)) + "\n" for each in WORKLOADS), encoding="utf-8")
    command = [sys.executable, "-m", "whichlora", "rehearse", "--workloads", str(lines), "--db", str(db), "--json"]
    variables = slurm.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, "--cluster", kind, "--array-size", "2"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as swept:
        killed = _kill_one_midway(slurm, tmp_path, swept)
        out, said = swept.communicate()
    assert swept.returncode == 0, said
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [each.id for each in WORKLOADS]
    assert all(answer["allocated_peak_bytes"] > 0 for answer in answers)
    assert slurm.states()[killed] == "CANCELLED"
    assert "was lost" in said
    stored = open_store(db).query()
    assert sorted(one.workload.id for one in stored) == sorted(each.id for each in WORKLOADS)
    assert {path.name for path in tmp_path.iterdir()} >= {"store.duckdb", "sweep.jsonl"}
    assert list((tmp_path / "store.duckdb.sweeps").iterdir()) == []


def _kill_one_midway(slurm: Slurm, folder: Path, swept: subprocess.Popen[str]) -> str:
    """Wait until the first task has rehearsed a few of its share, then kill it without warning; return its id."""
    end_s = time.monotonic() + 300
    while time.monotonic() < end_s and swept.poll() is None:
        stores = list(folder.glob("store.duckdb.sweeps/*/share-0.duckdb"))
        running = [job for job, state in slurm.states().items() if state == "RUNNING" and job.endswith("_0")]
        if stores and running and 2 <= open_store(stores[0]).count() <= 15:
            slurm.run("scancel", "--signal=KILL", "--full", running[0])
            return running[0]
        time.sleep(0.2)
    raise AssertionError("no task was seen midway")
