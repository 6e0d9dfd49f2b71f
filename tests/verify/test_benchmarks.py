"""The acceptance script where there is no card, and runs that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..rehearse.conftest import ROOT

pytestmark = pytest.mark.stack
ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_acceptance_of_a_card_finds_the_null_device_equal_to_itself(tmp_path: Path) -> None:
    """Verified and rehearsed bytes agree within 0.1%, and what is too large runs out in both."""
    benchmark(
        "gpu_acceptance.py", "--on", "null", "--gpu", "l4", "--quick", "--steps", "1", "--json", str(tmp_path / "a")
    )
    content = json.loads((tmp_path / "a").read_text())
    assert len(content["rows"]) == 4
    for row in content["rows"]:
        verified, rehearsed = row["verified"], row["rehearsed"]
        assert verified["outcome"] == rehearsed["outcome"] == ("oom" if row["workload"]["id"] == "too-large" else "ok")
        if verified["outcome"] == "ok":
            assert verified["allocated_peak_bytes"] == pytest.approx(rehearsed["allocated_peak_bytes"], rel=1e-3)


@pytest.mark.skipif("WHICHLORA_KILL_RUNS" not in os.environ, reason="takes minutes: set WHICHLORA_KILL_RUNS=10")
def test_killed_runs_lose_nothing_that_was_reported() -> None:
    """After SIGKILL at random moments of two runs on one store, it opens with all that was told, and no worker is left.

    WHICHLORA_KILL_RUNS sets the number of rounds, of two kills each.
    """
    rounds = os.environ["WHICHLORA_KILL_RUNS"]
    assert f"{2 * int(rounds):6d} kills" in benchmark("kill_runs.py", "--rounds", rounds)
