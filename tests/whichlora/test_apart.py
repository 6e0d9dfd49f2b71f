"""A user's folder may hold files named as what we import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whichlora.apart import module_command

SHADOWS = ("whichlora", "random", "queue", "datasets", "peft", "torch")


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """Return a folder with modules that nobody shall import."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_a_module_runs_as_itself(shadowed: Path) -> None:
    """It sees its arguments and what it imports, where `python -m` would find the user's files."""
    assert "the wrong whichlora" in run([sys.executable, "-m", "whichlora", "--version"], shadowed).stderr
    done = run(module_command("whichlora", "gpus", "4090", "--json"), shadowed)
    assert done.returncode == 0, done.stderr
    assert "rtx-4090" in done.stdout
    done = run(module_command("pip", "--version"), shadowed)
    assert done.stdout.startswith("pip "), done.stderr


@pytest.mark.stack
def test_workers_are_ours(shadowed: Path) -> None:
    """A rehearsal, whose worker imports the libraries, is the same in such a folder."""
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    workload = {"id": "small", "model": "small", "config": {"model_type": "llama", "vocab_size": 99, **fields}}
    (shadowed / "lines.jsonl").write_text(json.dumps(workload))
    done = run(module_command("whichlora", "rehearse", "--workloads", "lines.jsonl", "--no-store", "--json"), shadowed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["allocated_peak_bytes"] > 0
