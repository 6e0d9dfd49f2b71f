"""The command line as its users run it: a process of its own, its output, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def whichlora(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from whichlora.cli import main; main(prog_name='whichlora')", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **variables}, check=False
    )


def predictions(*arguments: str) -> list[dict[str, object]]:
    done = whichlora("estimate", *arguments, "--json", "--offline")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    found: list[dict[str, object]] = answer["predictions"]
    return found


def test_estimate_answers_every_combination_once() -> None:
    """Models x cards x methods x batch sizes, in order."""
    found = predictions(
        *("gpt2", "facebook/opt-125m", "--gpu", "4090", "--gpu", "l4", "--method", "lora", "--method", "full"),
        *("--batch-size", "1", "--batch-size", "2"),
    )
    assert len(found) == 2 * 2 * 2 * 2
    keys = ("model", "method", "batch_size", "gpu")
    assert [tuple(row[k] for k in keys) for row in found[:3]] == [
        ("gpt2", "lora", 1, "rtx-4090"),
        ("gpt2", "lora", 1, "l4"),
        ("gpt2", "lora", 2, "rtx-4090"),
    ]


def test_breakdown_sums_to_process_bytes() -> None:
    """What is itemised is all there is."""
    for row in predictions("meta-llama/Llama-3.2-1B", "--gpu", "4090", "--method", "qlora", "--method", "full"):
        breakdown = row["breakdown"]
        assert isinstance(breakdown, dict)
        assert sum(breakdown.values()) == row["process_bytes"]


def test_explain_names_phase_and_components() -> None:
    """A reader sees where the peak falls and what it is made of."""
    done = whichlora("estimate", "google/gemma-2b", "--gpu", "4090", "--batch-size", "4", "--explain", "--offline")
    assert "peak of allocated bytes in backward: loss" in done.stdout
    for component in ("weights", "adapters", "optimizer state", "activations", "logits and loss", "CUDA context"):
        assert component in done.stdout


def test_generation_has_prefill_and_decode() -> None:
    """Inference is predicted with the times that it has, and a cache."""
    (row,) = predictions("gpt2", "--gpu", "l4", "--generate", "--prefill-len", "128", "--decode-len", "32")
    assert row["phase"] == "generate"
    assert row["prefill_s"] > 0  # type: ignore[operator]
    assert row["decode_s_per_token"] > 0  # type: ignore[operator]
    assert "step_s" not in row
    assert row["trainable_params"] == 0


def test_a_classifier_infers_in_one_pass() -> None:
    """It has the time of a pass and no cache, padding counts, and a draft has nothing to guess."""
    asked = ("bert-base-uncased", "--gpu", "l4", "--generate", "--task", "token-cls", "--prefill-len", "128")
    (row,), (padded,) = predictions(*asked), predictions(*asked, "--padded")
    assert row["prefill_s"] == row["answer_s"]
    assert "decode_s_per_token" not in row
    assert "KV cache" not in row["breakdown"]  # type: ignore[operator]
    assert padded["allocated_peak_bytes"] > row["allocated_peak_bytes"]  # type: ignore[operator]
    refused = whichlora("estimate", *asked, "--draft", "gpt2", "--offline")
    assert refused.returncode == 2
    assert "none is decoded" in refused.stderr


def test_an_encoder_decoder_answers_from_two_caches() -> None:
    """Its task needs no option, and a longer text takes more for every token of the answer."""
    asked = (
        "t5-small",
        "--gpu",
        "l4",
        "--generate",
        "--batch-size",
        "16",
        "--prefill-len",
        "128",
        "--prefill-len",
        "512",
    )
    short, long = predictions(*asked)
    assert (short["task"], short["decode_len"]) == ("seq2seq", 128)
    caches = [row["breakdown"]["KV cache"] for row in (short, long)]  # type: ignore[index]
    assert caches[1] - caches[0] >= 6 * 2 * 16 * 512 * 2 * (512 - 128)  # layers, two, batch, width, bytes


def test_total_time_is_steps_times_step_time() -> None:
    """An epoch has a last, smaller batch."""
    (row,) = predictions("gpt2", "--gpu", "l4", "--samples", "10", "--epochs", "3", "--batch-size", "4")
    assert row["total_s"] == pytest.approx(9 * row["step_s"])  # type: ignore[operator]


def test_workload_lines_are_answered_in_order(tmp_path: Path) -> None:
    """A line that must be refused says why in its place; the others are predicted."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}
    shared = {"model": "tiny", "config": config, "seq_len": 32}
    lines = [{"id": "a", **shared}, {"id": "b", **shared, "config": {"model_type": "nonsense"}}, {"id": "c", **shared}]
    path = tmp_path / "workloads.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    done = whichlora("estimate", "--workloads", str(path), "--json", "--gpu", "l4")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    assert "nonsense" in answers[1]["error"]
    for answer in (answers[0], answers[2]):
        for key in ("trainable_params", "allocated_peak_bytes", "reserved_peak_bytes", "process_bytes", "step_s"):
            assert answer[key] > 0
        assert answer["evidence"] == "formula"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-model", "--gpu", "l4"], "no-such-model"),
        (["gpt2", "--gpu", "rtx-9999"], "rtx-9999"),
        (["gpt2", "--gpu", "a100"], "a100"),
        (["gpt2"], "--gpu"),
        (["--gpu", "l4"], "MODEL"),
        (["gpt2", "--gpu", "l4", "--seq-len", "-5"], "-5"),
        (["gpt2", "--gpu", "l4", "--batch-size", "0"], "0"),
        (["gpt2", "--gpu", "l4", "--rank", "-3"], "-3"),
        (["gpt2", "--gpu", "l4", "--method", "lorra"], "lorra"),
        (["gpt2", "--gpu", "l4", "--targets", "w_proj"], "w_proj"),
        (["gpt2", "--gpu", "l4", "--targets", ","], ","),
        (["gpt2", "--gpu", "l4", "--quantization", "int3"], "int3"),
        (["gpt2", "--gpu", "l4", "--optimizer", "lion"], "lion"),
        (["gpt2", "--gpu", "l4", "--dropout", "1.5"], "1.5"),
        (["gpt2", "--gpu", "l4", "--samples", "0"], "0"),
        (["--workloads", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str) -> None:
    """What is wrong, its value and what to do; never a traceback."""
    done = whichlora("estimate", *arguments, "--offline")
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_estimate_imports_nothing_heavy() -> None:
    """An estimate pays for none of the training stack, the store or the plots."""
    script = (
        "import sys\nfrom whichlora.cli import main\n"
        "try: main(['estimate', 'gpt2', '--gpu', 'l4', '--offline'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'duckdb', 'sklearn', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["first.yaml", "defaults-24gb.yaml"])
def test_examples_pick_a_model(name: str, tmp_path: Path) -> None:
    """Both examples end with a choice, a plan and a report."""
    done = whichlora("pick", str(EXAMPLES / name), "--out", str(tmp_path / "out"), "--offline")
    assert done.returncode == 0, done.stderr
    assert "Choice: " in done.stdout
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["choice"]["workload"]["model"] in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


def test_pick_leaves_nothing_behind_when_the_config_is_wrong(tmp_path: Path) -> None:
    """A bad key exits 2 before anything is written."""
    config = tmp_path / "bad.yaml"
    config.write_text("gpu: l4\nstage1_profile: {model_names: [gpt2], batchsize: 4}\n")
    done = whichlora("pick", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "batchsize" in done.stderr
    assert "batch_size" in done.stderr
    assert not (tmp_path / "out").exists()


def test_lists_are_searchable() -> None:
    """`models` and `gpus` find by text and print JSON for machines."""
    models = json.loads(whichlora("models", "gemma", "--json").stdout)["models"]
    assert models
    assert all("gemma" in json.dumps(model).lower() for model in models)
    gpus = json.loads(whichlora("gpus", "4090", "--json").stdout)["gpus"]
    assert {gpu["slug"] for gpu in gpus} >= {"rtx-4090", "rtx-4090-laptop"}


def test_a_terminal_that_lacks_a_character_gets_the_rest() -> None:
    """What an encoding cannot say is a question mark in it, not an error."""
    shown = [whichlora("estimate", "--help", PYTHONIOENCODING=encoding) for encoding in ("latin-1", "utf-8")]
    assert [done.returncode for done in shown] == [0, 0]
    assert "…" in shown[1].stdout
    assert shown[0].stdout == shown[1].stdout.replace("…", "?")
