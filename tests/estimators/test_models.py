"""Laws of model shapes: the registry against Transformers, files and configs as written, the Hub's many answers."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from whichlora_estimators.errors import BadValue, UnknownName, Unsupported, WhichloraError
from whichlora_estimators.models import (
    ModelShape,
    all_models,
    default_models,
    load_model,
    search_models,
    shape_from_config,
)

ROOT = Path(__file__).parents[2]

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}

# Exact counts that others published: the Hub's safetensors metadata as quoted in public sources (September 2026) unless
# said otherwise; left out are models whose files store a tied head twice, or more than weights.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "01-ai/Yi-1.5-6B-Chat": 6_061_035_520,
    "01-ai/Yi-1.5-34B": 34_388_917_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-4B": 3_950_369_280,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
    "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    # keras-hub's presets (repository at 71453d0)
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-3-270m": 268_098_176,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "t5-base": 222_903_552,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-3b": 3_002_557_440,
    # the papers' and model cards' own numbers
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    # PEFT's method_comparison results
    "facebook/opt-350m": 331_196_416,
}

REQUIRED = """
meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf meta-llama/Llama-2-70b-hf meta-llama/Llama-2-7b-chat-hf
meta-llama/Llama-2-13b-chat-hf meta-llama/Llama-2-70b-chat-hf NousResearch/Llama-2-7b-hf NousResearch/Llama-2-13b-hf
NousResearch/Llama-2-70b-hf meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-70B meta-llama/Meta-Llama-3-8B-Instruct
meta-llama/Meta-Llama-3-70B-Instruct meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-8B-Instruct
meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-1B-Instruct
meta-llama/Llama-3.2-3B-Instruct meta-llama/Llama-3.3-70B-Instruct google/gemma-2b google/gemma-2b-it google/gemma-7b
google/gemma-7b-it google/gemma-2-2b google/gemma-2-2b-it google/gemma-2-9b google/gemma-2-9b-it google/gemma-2-27b
google/gemma-2-27b-it google/gemma-3-270m google/gemma-3-1b-it google/gemma-3-4b-it google/gemma-3-12b-it
google/gemma-3-27b-it mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-v0.2 mistralai/Mistral-7B-v0.3
mistralai/Mistral-7B-Instruct-v0.1 mistralai/Mistral-7B-Instruct-v0.2 mistralai/Mistral-7B-Instruct-v0.3
mistralai/Mistral-Nemo-Base-2407 mistralai/Mistral-Nemo-Instruct-2407 mistralai/Mixtral-8x7B-v0.1
mistralai/Mixtral-8x7B-Instruct-v0.1 microsoft/phi-1_5 microsoft/phi-2 microsoft/Phi-3-mini-4k-instruct
microsoft/Phi-3-mini-128k-instruct microsoft/Phi-3.5-mini-instruct microsoft/phi-4 microsoft/Phi-4-mini-instruct
TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T TinyLlama/TinyLlama-1.1B-Chat-v1.0 HuggingFaceTB/SmolLM2-135M
HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-1.7B Qwen/Qwen1.5-0.5B Qwen/Qwen1.5-1.8B Qwen/Qwen1.5-4B
Qwen/Qwen1.5-7B Qwen/Qwen1.5-14B Qwen/Qwen1.5-32B Qwen/Qwen1.5-72B Qwen/Qwen2-0.5B Qwen/Qwen2-1.5B Qwen/Qwen2-7B
Qwen/Qwen2-72B Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-3B Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B Qwen/Qwen2.5-32B
Qwen/Qwen2.5-72B Qwen/Qwen2.5-7B-Instruct Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B Qwen/Qwen3-4B Qwen/Qwen3-8B Qwen/Qwen3-14B
Qwen/Qwen3-32B Qwen/Qwen3-30B-A3B Qwen/Qwen1.5-MoE-A2.7B roberta-base roberta-large bert-base-uncased bert-base-cased
bert-large-uncased bert-large-cased distilbert-base-uncased t5-small t5-base t5-large t5-3b t5-11b google/flan-t5-small
google/flan-t5-base google/flan-t5-large google/flan-t5-xl google/flan-t5-xxl gpt2 gpt2-medium gpt2-large gpt2-xl
facebook/opt-125m facebook/opt-350m facebook/opt-1.3b facebook/opt-2.7b facebook/opt-6.7b facebook/opt-13b
facebook/opt-30b facebook/opt-66b tiiuae/falcon-7b tiiuae/falcon-7b-instruct tiiuae/falcon-40b
tiiuae/falcon-40b-instruct bigscience/bloom-560m bigscience/bloom-1b1 bigscience/bloom-1b7 bigscience/bloom-3b
bigscience/bloom-7b1 bigscience/bloom EleutherAI/gpt-neox-20b EleutherAI/pythia-70m EleutherAI/pythia-160m
EleutherAI/pythia-410m EleutherAI/pythia-1b EleutherAI/pythia-1.4b EleutherAI/pythia-2.8b EleutherAI/pythia-6.9b
EleutherAI/pythia-12b stabilityai/stablelm-3b-4e1t stabilityai/stablelm-zephyr-3b bigcode/starcoder2-3b
bigcode/starcoder2-7b bigcode/starcoder2-15b ibm-granite/granite-3.0-2b-base ibm-granite/granite-3.1-2b-instruct
ibm-granite/granite-3.2-8b-instruct ibm-granite/granite-3.3-2b-instruct ibm-granite/granite-3.3-8b-instruct
allenai/OLMo-2-1124-7B allenai/OLMo-2-1124-13B 01-ai/Yi-6B 01-ai/Yi-34B codellama/CodeLlama-7b-hf
codellama/CodeLlama-13b-hf codellama/CodeLlama-34b-hf lmsys/vicuna-7b-v1.5 lmsys/vicuna-13b-v1.5
deepseek-ai/DeepSeek-R1-Distill-Llama-8B deepseek-ai/DeepSeek-R1-Distill-Llama-70B
deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
deepseek-ai/DeepSeek-R1-Distill-Qwen-14B deepseek-ai/DeepSeek-R1-Distill-Qwen-32B HuggingFaceH4/zephyr-7b-beta
"""


def every_name() -> list[str]:
    return [shape.name for shape in search_models("")]


# -------------------------------------------------------------------------------------------------------- the registry


def test_the_registry_is_large_and_sorted() -> None:
    """At least ninety models are known without a download, and they come smallest first."""
    sizes = [shape.parameters for shape in all_models()]
    assert len(sizes) >= 90
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", REQUIRED.split())
def test_a_popular_model_is_known(name: str) -> None:
    """A popular model resolves offline to a shape of that very name."""
    assert load_model(name, offline=True).name == name


def test_every_name_resolves_to_itself() -> None:
    """Every id and alias, in any case, gives the shape of that id; none has two."""
    names = every_name()
    assert len(names) == len(set(map(str.casefold, names)))
    for name in names:
        assert load_model(name.swapcase(), offline=True).name == name


def test_every_last_part_resolves_to_one_shape() -> None:
    """The part after the slash is enough wherever all models of that name have one shape; here, everywhere."""
    for name in every_name():
        whole, part = load_model(name, offline=True), load_model(name.rpartition("/")[2], offline=True)
        assert (part.config, part.parameters) == (whole.config, whole.parameters)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gemma-2b-it", "google/gemma-2b-it"),
        ("LLAMA-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("t5-small", "t5-small"),
    ],
)
def test_a_short_name_prefers_the_makers_own(written: str, meant: str) -> None:
    """A name without organisation means the maker's model before its mirrors."""
    assert load_model(written, offline=True).name == meant


def test_every_shape_passes_its_own_checks() -> None:
    """What the registry holds is what shape_from_config accepts, with a family, a source and a count."""
    for shape in all_models():
        again = shape_from_config(shape.config, name=shape.name)
        assert (again.config, again.family) == (shape.config, shape.family)
        assert shape.source
        assert shape.parameters


def test_shapes_are_values() -> None:
    """A shape can be hashed, pickled and changed in a copy without the registry changing."""
    shape = load_model("gpt2", offline=True)
    assert hash(pickle.loads(pickle.dumps(shape))) == hash(shape)
    assert isinstance(shape.config, dict)
    shape.config["n_layer"] = 1
    assert load_model("gpt2", offline=True).config["n_layer"] == 12


def test_only_the_makers_licence_is_asked_for() -> None:
    """A mirror of a gated model is not itself marked as gated."""
    assert load_model("meta-llama/Llama-2-7b-chat-hf", offline=True).gated
    assert not load_model("NousResearch/Llama-2-7b-hf", offline=True).gated
    assert not load_model("Qwen/Qwen2.5-7B", offline=True).gated


def test_a_shape_without_its_vision_tower_says_so() -> None:
    """Of the registry, exactly the multimodal Gemma 3 models carry a caveat."""
    with_caveat = {shape.name for shape in all_models() if shape.caveat}
    assert with_caveat == {f"google/gemma-3-{size}-pt" for size in ("4b", "12b", "27b")}


def test_search_finds_words_in_any_order() -> None:
    """Every hit holds all words in its name or family, and aliases are found too."""
    assert [shape.name for shape in search_models("VICUNA 7b")] == ["lmsys/vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.5"]
    assert {shape.family for shape in search_models("gemma2")} == {"gemma2"}
    assert search_models("no such model") == ()


def test_default_candidates_are_decoders_of_all_sizes() -> None:
    """Where the user names no model, a dozen or so causal models from 0.5B to 70B stand by, smallest first."""
    shapes = [load_model(name, offline=True) for name in default_models()]
    sizes = [shape.parameters or 0 for shape in shapes]
    assert 12 <= len(shapes) <= 18
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.6e9
    assert 65e9 < sizes[-1] < 75e9
    assert all(shape.config["architectures"][0].endswith("ForCausalLM") for shape in shapes)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_the_count_is_the_published_one(name: str, parameters: int) -> None:
    """The registry's count is the one that others published, to the last parameter."""
    assert load_model(name, offline=True).parameters == parameters


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_parameters", ROOT / "benchmarks" / "count_parameters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distinct_shapes() -> list[ModelShape]:
    return list({json.dumps(shape.config, sort_keys=True): shape for shape in all_models()}.values())


@pytest.mark.stack
@pytest.mark.parametrize("shape", distinct_shapes(), ids=lambda shape: shape.name)
def test_the_count_is_that_of_transformers(shape: ModelShape, counting: ModuleType) -> None:
    """The registry's count is that of the model which Transformers builds from the registry's config."""
    assert counting.count_parameters(shape.config) == shape.parameters


@pytest.mark.stack
@pytest.mark.parametrize("shape", distinct_shapes(), ids=lambda shape: shape.name)
def test_transformers_knows_every_key(shape: ModelShape) -> None:
    """No key of the registry is misspelt: Transformers' configuration class of the family has it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**shape.config)
    known = {*config.to_dict(), *config.attribute_map, *(getattr(config, "rope_parameters", None) or {})}
    known |= {"rotary_pct"} if "partial_rotary_factor" in known else set()  # its old name in GPT-NeoX
    known |= {"sliding_window_pattern"} if "layer_types" in known else set()  # what Gemma 3 makes layer_types of
    assert set(shape.config) <= known


# --------------------------------------------------------------------------------------------------- files and folders


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


# ------------------------------------------------------------------------------------------------------------- configs


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


# ------------------------------------------------------------------------------------------------------- names, the Hub


@pytest.mark.parametrize(
    ("written", "near"), [("lama-2-7b-hf", "Llama-2-7b-hf"), ("gtp2", "gpt2"), ("mistal-7b-v0.3", "mistral-7b-v0.3")]
)
def test_an_unknown_name_suggests_one_that_works(written: str, near: str) -> None:
    """The nearest names of an unknown one are known, and the one that was meant is among them."""
    with pytest.raises(UnknownName) as caught:
        load_model(written)
    assert near.casefold() in map(str.casefold, caught.value.nearest)
    for name in caught.value.nearest:
        assert load_model(name, offline=True)


REVISION = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "lab/good": (200, json.dumps(SMALL), None),
    "lab/list": (200, "[]", None),
    "lab/locked": (403, "", "GatedRepo"),
    "lab/missing": (404, "", "RepoNotFound"),
    "lab/adapter": (404, "", "EntryNotFound"),
    "lab/refused": (400, "", None),
    "lab/broken": (200, json.dumps(SMALL), None),
}


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers for config.json as the Hub does, headers included."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        name = "/".join(self.path.split("/")[1:3])
        status, body, code = REPOSITORIES.get(name, (404, "", None))
        if (name, self.command) == ("lab/broken", "GET"):
            status = 400
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": '"abc"', "X-Repo-Commit": REVISION, "X-Error-Code": code}
        for header, value in headers.items():
            if value is not None:
                self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PROGRAM = """
import json, sys, time
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.models import load_model

time.sleep = lambda seconds: None  # the client waits between its attempts
for name in sys.argv[1:]:
    try:
        shape = load_model(name)
        print(json.dumps([shape.name, shape.config, shape.source]))
    except WhichloraError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask(names: list[str], home: Path, **environment: str) -> list[Any]:
    """Load each name in a fresh interpreter: the Hub's client reads its environment when it is imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = (
        inherited
        | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_is_asked_for_what_nobody_else_knows(hub: str, tmp_path: Path) -> None:
    """A config.json is downloaded once and then found offline; every refusal of the Hub has its own message."""
    names = list(REPOSITORIES)
    good, listed, locked, missing, adapter, refused, broken = ask(names, tmp_path, HF_ENDPOINT=hub)
    assert good == ["lab/good", SMALL, f"config.json on the Hub, commit {REVISION[:12]}"]
    assert listed[0] == "BadValue"
    assert "gated" in locked[1]
    assert "Accept its licence" in locked[1]
    assert "HF_TOKEN" in locked[1]
    assert missing[0] == "UnknownName"
    assert "no config.json in this repository" in adapter[1]
    assert "asking the Hub failed" in refused[1]
    assert "did not answer" in broken[1]
    assert ask(["lab/good"], tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")[0] == good
    asked = HubHandler.requests
    assert ask(["lab/good"], tmp_path, HF_ENDPOINT=hub)[0] == good
    assert HubHandler.requests == asked, "what is cached needs no network"


def test_offline_says_so_and_names_the_nearest(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1 an unknown model is refused at once, with known names like it."""
    [(kind, message)] = ask(["lab/Llama-2-7b-hf"], tmp_path, HF_HUB_OFFLINE="1")
    assert kind == "WhichloraError"
    assert "offline" in message
    assert "Llama-2-7b-hf" in message.partition("include")[2]


def test_a_hub_out_of_reach_says_so(tmp_path: Path) -> None:
    """Where nobody listens, the error says that the Hub cannot be reached and what would help."""
    [(kind, message)] = ask(["lab/unheard-of"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "WhichloraError"
    assert "asking the Hub failed" in message
    assert "Models known without a download include" in message


@pytest.mark.parametrize("name", ["what is/this", "lab/..", "lab/-x-"])
def test_a_name_that_the_hub_cannot_have_is_unknown(name: str) -> None:
    """An id that the Hub's client rejects by its form is an unknown model."""
    with pytest.raises(UnknownName):
        load_model(name)


def test_the_offline_argument_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """offline=True refuses an unknown model without any environment variable."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WhichloraError, match="offline"):
        load_model("lab/never-downloaded-by-anybody", offline=True)


def test_import_needs_no_heavy_library() -> None:
    """Importing the module and listing its models loads neither numpy nor the Hub's client nor torch."""
    program = (
        "import sys; from whichlora_estimators.models import all_models; all_models();"
        "print({'numpy', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
