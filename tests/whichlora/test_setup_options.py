"""Options that say what else of PEFT's configuration is set: each is the field that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from whichlora.api import estimate
from whichlora.cli import main

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}
GIVEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "exclude": (["--exclude-pattern", r".*\.1\..*"], {"exclude_modules": r".*\.1\..*"}),
    "replicate": (["--layer-replication", "0:3,1:3"], {"layer_replication": ((0, 3), (1, 3))}),
    "tokens": (["--trainable-tokens", "3"], {"trainable_tokens": 3}),
    "named tokens": (
        ["--trainable-tokens", "embed_tokens=3, lm_head=5"],
        {"trainable_tokens": {"embed_tokens": 3, "lm_head": 5}},
    ),
    "tying": (
        ["--modules-to-save", "lm_head", "--ensure-weight-tying"],
        {"modules_to_save": ("lm_head",), "ensure_weight_tying": True},
    ),
    "bias": (["--lora-bias"], {"lora_bias": True}),
    "parameters": (
        ["--targets", "", "--target-parameters", "up_proj.weight,q_proj.weight"],
        {"targets": (), "target_parameters": ("up_proj.weight", "q_proj.weight")},
    ),
    "encoder": (
        ["--method", "p-tuning", "--virtual-tokens", "7", "--encoder-hidden-size", "24"],
        {"method": "p-tuning", "num_virtual_tokens": 7, "encoder_hidden_size": 24},
    ),
    "projection": (
        ["--method", "prefix-tuning", "--prefix-projection"],
        {"method": "prefix-tuning", "prefix_projection": True},
    ),
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_is_its_field(name: str, model: str) -> None:
    """What the command predicts is what the library predicts of the field, and not what it predicts without."""
    options, fields = GIVEN[name]
    asked = [model, "--gpu", "l4", "--json", "--offline", "--no-correction", *options]
    done = CliRunner().invoke(main, ["estimate", *asked])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["predictions"]
    found = estimate(model, "l4", offline=True, correction=None, **fields).estimate
    assert (row["trainable_params"], row["allocated_peak_bytes"]) == (
        found.trainable_params,
        found.allocated_peak_bytes,
    )
    without = estimate(model, "l4", offline=True, correction=None, method=fields.get("method", "lora")).estimate
    assert found.trainable_params != without.trainable_params


@pytest.mark.parametrize(
    "options", [["--trainable-tokens", "a=b"], ["--trainable-tokens", "3,4"], ["--layer-replication", "0-3"]]
)
def test_what_is_no_such_setting_is_told(options: list[str], model: str) -> None:
    """Status 2, with an example of what to give."""
    done = CliRunner().invoke(main, ["estimate", model, "--gpu", "l4", "--offline", *options])
    assert done.exit_code == 2
    assert f"{options[0]} " in done.stderr.partition(options[1])[2]
