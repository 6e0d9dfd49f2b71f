"""What one would not expect of a workload is said wherever its numbers are: here of a mixture of experts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from whichlora import config_from_fields, estimate, pick
from whichlora.cli import main
from whichlora.cli.pick import answer
from whichlora.notes import notes
from whichlora.report import report_html
from whichlora_estimators.caveats import caveats
from whichlora_estimators.models import load_model
from whichlora_estimators.stack import NEWEST_STACK, parse_stack

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS, ADAPTED = "quantises none of the experts", "adapts the experts too"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Return the config of a small mixture."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def test_estimates_carry_what_is_said_of_them(mixture: Path) -> None:
    """Each prediction in the JSON has its caveats, none under a stack where they are not true; stderr says each once."""
    asked = ("estimate", mixture, "--gpu", "l4", "--offline", "--json")
    done = invoke(*asked, "--method", "qlora", "--batch-size", 1, "--batch-size", 2)
    for found in json.loads(done.stdout)["predictions"]:
        assert [EXPERTS in text or ADAPTED in text for text in found["caveats"]] == [True, True]
    assert done.stderr.count(EXPERTS) == done.stderr.count(ADAPTED) == 1
    old = invoke(*asked, "--stack", "transformers==4.57.6")
    assert json.loads(old.stdout)["predictions"][0]["caveats"] == []
    assert ADAPTED not in old.stderr


def test_workload_files_tell_each_sentence_once(mixture: Path, tmp_path: Path) -> None:
    """A file of like workloads says what is odd about them once, on stderr, and in every answer."""
    lines = tmp_path / "runs.jsonl"
    fields = {"model": "mixture", "config": CONFIG, "method": "lora", "targets": "all-linear"}
    lines.write_text("".join(json.dumps({**fields, "seq_len": size}) + "\n" for size in (64, 128)), encoding="utf-8")
    done = invoke("estimate", "--workloads", lines, "--gpu", "l4", "--json")
    assert all(ADAPTED in json.loads(line)["caveats"][0] for line in done.stdout.splitlines())
    assert done.stderr.count(ADAPTED) == 1


def test_a_search_says_it_in_its_table_its_json_and_its_report(mixture: Path) -> None:
    """A sentence is said of the models whose configurations have numbers: below each stage, in JSON, on the page."""
    fields: dict[str, Any] = {
        "gpu": "l4",
        "stage1_profile": {"model_names": ["gpt2", str(mixture)], "prefill_length": 32, "tokens_to_generate": 8},
        "stage2_profile": {"batch_size": [1]},
        "methods": ["lora"],
        "seq_len": 64,
    }
    result = pick(config_from_fields(fields))
    name = load_model(str(mixture)).name
    found = answer(result, None)
    assert [(ADAPTED in note["text"], note["models"]) for note in found["notes"]] == [(True, [name])]
    rows = [found["choice"], *found["frontier"]]
    for row in rows:
        assert bool(row["caveats"]) == (row["model"] == name)
    page = report_html(result)
    assert page.count(f"{name}: {found['notes'][0]['text']}.") == 1


def test_pick_prints_notes_below_the_stage(mixture: Path, tmp_path: Path) -> None:
    """The terminal says it below the table of the stage where it is true, and not below the other."""
    config = tmp_path / "pick.yaml"
    config.write_text(
        "gpu: l4\n"
        f"stage1_profile: {{model_names: ['{mixture}'], prefill_length: 32, tokens_to_generate: 8}}\n"
        "stage2_profile: {batch_size: [1]}\nmethods: [lora]\nseq_len: 64\n",
        encoding="utf-8",
    )
    done = invoke("pick", config, "--out", tmp_path / "out", "--offline", "--no-advice", "--db", tmp_path / "db")
    first, second = done.stdout.split("Stage 2")
    assert "Note on" not in first
    assert second.count(ADAPTED) == 1


def test_notes_name_each_model_once_in_the_order_met() -> None:
    """Nothing is said of dense models; under Transformers 4 nothing of mixtures."""
    names = ("gpt2", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B")
    workloads = [estimate(name, "h200", offline=True).estimate.workload for name in (*names, names[1])]
    found = notes(workloads, NEWEST_STACK)
    assert list(found.values()) == [list(names[1:])]
    assert tuple(found) == caveats(workloads[1])
    assert notes(workloads, parse_stack("transformers==4.57.6")) == {}
    assert notes([workloads[1].with_(config={"model_type": "unheard-of"})], NEWEST_STACK) == {}


def test_rehearse_tells_what_estimate_tells(mixture: Path) -> None:
    """The model's own caveat before anything runs, and a mixture's beside its rehearsal."""
    said = invoke("rehearse", "google/gemma-3-4b-pt", "--gpu", "nope", "--offline", code=2).stderr
    assert load_model("google/gemma-3-4b-pt", offline=True).caveat in said
    if importlib.util.find_spec("peft") is None:
        pytest.skip("no peft")
    done = invoke("rehearse", mixture, "--gpu", "l4", "--seq-len", 64, "--offline", "--no-store", "--json")
    assert done.stderr.count(ADAPTED) == 1
    assert json.loads(done.stdout)["rehearsals"][0]["outcome"] == "ok"
