"""`whichlora verify` as its users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from whichlora.cli import main

from ..rehearse.conftest import ROOT

pytestmark = pytest.mark.stack


def test_the_plan_of_the_first_example_is_verified(tmp_path: Path) -> None:
    """What `pick` wrote is read, its best survivor rehearsed, serving and training, and the rest spared."""
    picked = CliRunner().invoke(
        main, ["pick", str(ROOT / "examples" / "first.yaml"), "--out", str(tmp_path / "out"), "--offline"]
    )
    assert picked.exit_code == 0, picked.stderr
    plan = str(tmp_path / "out" / "plan.json")
    done = CliRunner().invoke(main, ["verify", plan, "--on", "null", "--no-store", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    survivors = json.loads((tmp_path / "out" / "plan.json").read_text())["survivors"]
    phases = [each["phase"] for each in found["verifications"]]
    assert phases == ["generate", "train"]
    assert (found["best"], found["spared"]) == (1, len(survivors) - 1)
    best = found["verifications"][-1]
    assert best["model"] == survivors[0]["workload"]["model"]
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
