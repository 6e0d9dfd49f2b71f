"""`whichlora rehearse` as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from whichlora.cli import main

from .conftest import TINY

pytestmark = pytest.mark.stack


def whichlora(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def workload_file(folder: Path) -> str:
    shared = {"model": "tiny", "config": TINY, "seq_len": 64}
    lines = [
        {"id": "a", **shared},
        {"id": "b", **shared, "method": "lorra"},
        {"id": "c", **shared, "phase": "generate", "prefill_len": 32, "decode_len": 4},
    ]
    path = folder / "workloads.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_a_workload_file_is_answered_in_order(tmp_path: Path) -> None:
    """Each line gets its answer in its place: bytes, evidence and versions, or why there are none."""
    done = whichlora("rehearse", "--workloads", workload_file(tmp_path), "--json", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    first, refused, last = map(json.loads, done.stdout.splitlines())
    assert [first["id"], refused["id"], last["id"]] == ["a", "b", "c"]
    assert "lorra" in refused["error"]
    for found in (first, last):
        assert found["gpu"] == "unlimited"
        assert found["evidence"] == "rehearsed"
        assert found["versions"].keys() >= {"torch", "transformers", "peft", "cuda"}
        assert 0 < found["allocated_peak_bytes"] <= found["reserved_peak_bytes"] < found["process_bytes"]
    assert first["trainable_params"] > 0
    assert last["trainable_params"] == 0
    assert list(last["phases"]) == ["load", "prefill", "decode"]
    assert "[2/2]" in done.stderr


def test_models_are_rehearsed_with_the_options_of_estimate() -> None:
    """A row for each combination, out of memory beside what fits; progress is on stderr."""
    setup = ("--method", "qlora", "--batch-size", "1", "--batch-size", "64", "--seq-len", "2048", "--no-checkpointing")
    done = whichlora("rehearse", "gpt2", "--gpu", "rtx-4090", *setup, "--json", "--offline", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    fits, large = answer["rehearsals"]
    assert fits["outcome"] == "ok"
    assert large["oom"]
    assert large["phase"] in ("forward", "backward")
    assert "out of memory" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt2"], "--gpu"),
        (["--gpu", "l4"], "MODEL"),
        (["gpt2", "--gpu", "rtx-9999"], "rtx-9999"),
        (["no-such-model", "--gpu", "l4"], "no-such-model"),
        (["gpt2", "--gpu", "l4", "--method", "lorra"], "lorra"),
        (["gpt2", "--gpu", "l4", "--optimizer", "lion"], "lion"),
        (["gpt2", "--gpu", "l4", "--jobs", "0"], "0"),
        (["gpt2", "--gpu", "l4", "--batch-size", "-1"], "-1"),
        (["--workloads", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--workloads", "/nowhere.jsonl", "--gpu", "l4", "--gpu", "t4"], "nowhere"),
    ],
)
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str) -> None:
    """What is wrong, its value and what to do; never a traceback."""
    done = CliRunner().invoke(main, ["rehearse", *arguments, "--offline"])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert named in done.stderr
    assert done.stdout == ""
