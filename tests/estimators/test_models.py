"""Laws of the registry of models: its names, its shapes, and its counts against Transformers and publications."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from whichlora_estimators.models import (
    ModelShape,
    all_models,
    default_models,
    load_model,
    search_models,
    shape_from_config,
)

ROOT = Path(__file__).parents[2]

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


def test_the_registry_is_large_and_sorted() -> None:
    """At least ninety models are known without a download, and they come smallest first."""
    sizes = [shape.parameters or 0 for shape in all_models()]
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


def test_import_needs_no_heavy_library() -> None:
    """Importing the module and listing its models loads neither numpy nor the Hub's client nor torch."""
    program = (
        "import sys; from whichlora_estimators.models import all_models; all_models();"
        "print({'numpy', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
