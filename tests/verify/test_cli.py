"""`whichlora verify` as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from whichlora.cli import main

from ..rehearse.conftest import ROOT
from .conftest import HOST, TINY

pytestmark = pytest.mark.stack


def whichlora(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_workload_file_is_answered_in_order_and_kept(tmp_path: Path) -> None:
    """Each line gets its answer in its place, with times on the host, and `profiles` then finds them."""
    shared = {"model": "tiny", "config": TINY, **HOST}
    lines = [
        {"id": "a", **shared},
        {"id": "b", **shared, "quantization": "nf4"},
        {"id": "c", **shared, "phase": "generate", "prefill_len": 8, "decode_len": 3},
    ]
    path, db = tmp_path / "workloads.jsonl", tmp_path / "profiles.duckdb"
    path.write_text("\n".join(map(json.dumps, lines)))
    command = ("verify", "--on", "cpu", "--steps", "2", "--warmup", "0", "--workloads", str(path), "--db", str(db))
    done = whichlora(*command, "--json")
    assert done.returncode == 0, done.stderr
    first, refused, last = map(json.loads, done.stdout.splitlines())
    assert [first["id"], refused["id"], last["id"]] == ["a", "b", "c"]
    assert "nf4" in refused["error"]
    assert len(first["times"]["step"]["samples_s"]) == 2
    assert last["prefill_s"] > 0
    assert last["decode_s_per_token"] > 0
    assert "[2/2]" in done.stderr
    again = whichlora(*command)
    assert again.stderr.count("(from the store)") == 2
    shown = CliRunner().invoke(main, ["profiles", "show", first["measurement"][:12], "--db", str(db)])
    assert first["measurement"][:12] in shown.stdout


def test_the_plan_of_the_first_example_is_verified(tmp_path: Path) -> None:
    """What `pick` wrote is read, its best survivor rehearsed, and the rest spared."""
    picked = CliRunner().invoke(
        main, ["pick", str(ROOT / "examples" / "first.yaml"), "--out", str(tmp_path / "out"), "--offline"]
    )
    assert picked.exit_code == 0, picked.stderr
    done = whichlora("verify", str(tmp_path / "out" / "plan.json"), "--on", "null", "--no-store", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    survivors = json.loads((tmp_path / "out" / "plan.json").read_text())["survivors"]
    assert found["best"] == len(found["verifications"]) - 1
    assert found["spared"] == len(survivors) - len(found["verifications"])
    best = found["verifications"][-1]
    assert best["model"] == survivors[found["best"]]["workload"]["model"]
    assert best["rejected"] == []
    assert best["ratio"]["allocated_peak_bytes"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--on", "null", "--gpu", "l4"], "MODEL"),
        (["gpt2", "--on", "null"], "--gpu"),
        (["gpt2", "--on", "null", "--gpu", "rtx-9999"], "rtx-9999"),
        (["gpt2", "--on", "cpu", "--gpu", "l4"], "l4"),
        (["gpt2", "--on", "cpu", "--method", "qlora"], "nf4"),
        (["gpt2", "--on", "cpu", "--steps", "0"], "0"),
        (["no-such-model", "--on", "cpu"], "no-such-model"),
        (["/nowhere/plan.json", "--on", "cpu"], "/nowhere/plan.json"),
        (["--workloads", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str) -> None:
    """What is wrong, its value and what to do; never a traceback."""
    done = CliRunner().invoke(main, ["verify", *arguments, "--offline"])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert named in done.stderr
    assert done.stdout == ""


def test_without_a_card_one_is_told_what_to_choose() -> None:
    """`auto` means a card; where PyTorch sees none, it says so and names the other places."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("there is a card")
    done = CliRunner().invoke(main, ["verify", "gpt2", "--offline"])
    assert done.exit_code == 2
    assert "--on null" in done.stderr
    assert "--on cpu" in done.stderr
