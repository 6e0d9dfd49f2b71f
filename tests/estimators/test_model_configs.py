"""Laws of configs: from files and folders, as written by Transformers and by hand, of models with more than text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_estimators.models import load_model, shape_from_config

from .small import SMALL


def test_a_file_and_its_folder_are_one_model(tmp_path: Path) -> None:
    """A folder with config.json, that file and the same text under another name give the same config."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "other.json").write_text(json.dumps(SMALL))
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "other.json"):
        shape = load_model(str(path), offline=True)
        assert (shape.name, shape.family, shape.config, shape.parameters) == (str(path), "llama", SMALL, None)


def test_a_folder_comes_before_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder with a config.json wins over a registered name; one without does not hide it."""
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert load_model("gpt2", offline=True).family == "gpt2"
    Path("gpt2", "config.json").write_text(json.dumps(SMALL))
    assert load_model("gpt2", offline=True).family == "llama"


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "/nowhere/x", "x.json", "a/b/c", "C:\\models"])
def test_a_path_to_nothing_is_refused(name: str) -> None:
    """What reads like a path and holds no config is refused as a path, not looked for on the Hub."""
    with pytest.raises(BadValue, match="no model config at this path"):
        load_model(name)


@pytest.mark.parametrize("name", ["", "  ", "x" * 5000, "x\0y"])
def test_a_name_that_no_file_can_have_is_no_crash(name: str) -> None:
    """Names that a file system refuses end in our error, not in its own."""
    with pytest.raises((BadValue, UnknownName)):
        load_model(name, offline=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{not json", "not JSON"), ("[1, 2]", "not an object"), ("null", "not an object"), ("{}", "model_type")],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """A file that is no JSON object with a model_type is refused with the reason."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadValue, match=complaint):
        load_model(str(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused like one that is not JSON."""
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadValue, match="not JSON"):
        load_model(str(tmp_path))


# ---------------------------------------------------------------------------------------------- what a config may say


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": ""}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"vocab_size": "256"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"n_embd": 64, "n_head": 5}, "n_head"),
        ({"head_dim": 0}, "head_dim"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"num_experts": -1}, "num_experts"),
        ({"num_local_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    """The error names the key and what it may be."""
    with pytest.raises(BadValue, match=rf"^{key} in the config of it") as caught:
        shape_from_config(SMALL | change, name="it")
    assert caught.value.todo


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": None, "head_dim": None, "sliding_window": None},
        {"num_attention_heads": 6, "head_dim": 32},  # heads need not divide the width where their size is given
        {"num_local_experts": 0, "num_experts_per_tok": 2},
        {"attention_dropout": 0, "classifier_dropout": None, "partial_rotary_factor": 1},
    ],
)
def test_what_transformers_takes_is_taken(change: dict[str, Any]) -> None:
    """Nulls that mean the default, and sizes that fit, pass unchanged."""
    assert shape_from_config(SMALL | change, name="it").config == SMALL | change


def test_layers_that_differ_are_not_supported() -> None:
    """A size given per layer is understood but refused."""
    with pytest.raises(Unsupported, match="intermediate_size"):
        shape_from_config(SMALL | {"intermediate_size": [128, 256]}, name="it")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_a_quantised_checkpoint_is_not_supported(method: str) -> None:
    """A checkpoint that is quantised already is refused, and the method is named."""
    with pytest.raises(Unsupported, match=method):
        shape_from_config(SMALL | {"quantization_config": {"quant_method": method}}, name="it")


TEXT = {key: value for key, value in SMALL.items() if key not in ("model_type", "architectures")}


@pytest.mark.parametrize(("family", "caveat"), [("gemma3", True), ("llama4", False), ("qwen3_5", False)])
def test_a_multimodal_config_gives_its_text_model(family: str, caveat: bool) -> None:
    """Where the text model may be trained alone its config is taken, with a caveat if the tower is loaded as well."""
    config = {"model_type": family, "text_config": TEXT, "vision_config": {"hidden_size": 32}}
    shape = shape_from_config(config, name="it")
    assert shape.family == f"{family}_text"
    assert shape.config["hidden_size"] == 64
    assert shape.config["architectures"][0].endswith("ForCausalLM")
    assert bool(shape.caveat) == caveat


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "text_config": SMALL, "vision_config": {"hidden_size": 32}},
        {"model_type": "gemma3", "vision_config": {"hidden_size": 32}},
        {"model_type": "qwen2_vl", **TEXT, "vision_config": {"depth": 2}},
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": SMALL}},
    ],
)
def test_other_multimodal_configs_are_not_supported(config: dict[str, Any]) -> None:
    """Where text and towers train together, or no text config is given, the model is refused."""
    with pytest.raises(Unsupported, match="multimodal"):
        shape_from_config(config, name="it")


@pytest.mark.stack
@pytest.mark.parametrize("family", ["llama4", "qwen3_5", "qwen3_5_moe"])
def test_transformers_trains_these_as_text(family: str) -> None:
    """The class of the text model here is the one that AutoModelForCausalLM takes for the multimodal type."""
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    shape = shape_from_config({"model_type": family, "text_config": TEXT}, name="it")
    assert shape.config["architectures"] == [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
