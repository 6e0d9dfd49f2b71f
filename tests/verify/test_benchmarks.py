"""Runs that are killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ..rehearse.conftest import ROOT

pytestmark = pytest.mark.stack
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_killed_rehearsal_loses_nothing_that_was_reported() -> None:
    """After SIGKILL between two workloads, the store opens with what was told, no worker is left, and the next run succeeds."""
    assert "     1 kills\n" in benchmark("kill_runs.py", "--rounds", "1", "--seed", "0", "--only", "rehearse")


@pytest.mark.skipif("WHICHLORA_KILL_RUNS" not in os.environ, reason="takes minutes: set WHICHLORA_KILL_RUNS=10")
def test_killed_runs_lose_nothing_that_was_reported() -> None:
    """After SIGKILL at random moments of two runs on one store, it opens with all that was told, and no worker is left.

    WHICHLORA_KILL_RUNS sets the number of rounds, of two kills each.
    """
    rounds = os.environ["WHICHLORA_KILL_RUNS"]
    assert f"{2 * int(rounds):6d} kills" in benchmark("kill_runs.py", "--rounds", rounds)
