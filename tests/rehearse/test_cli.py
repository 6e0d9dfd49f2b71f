"""What `whichlora rehearse` refuses."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from whichlora.cli import main

pytestmark = pytest.mark.stack


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
        (["gpt2", "--gpu", "l4", "--gpu", "rtx-9999"], "rtx-9999"),
        (["gpt2", "--gpu", "l4", "--stack", "installed", "--stack", "torch=2"], "torch=2"),
        (["gpt2", "--gpu", "l4", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
        (["gpt2", "--workloads", "/nowhere.jsonl"], "MODEL and --workloads"),
        (["gpt2", "--gpu", "l4", "--cluster", "local"], "--cluster local"),
    ],
)
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str) -> None:
    """What is wrong, its value and what to do; never a traceback."""
    done = CliRunner().invoke(main, ["rehearse", *arguments, "--offline"])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert named in done.stderr
    assert done.stdout == ""
