"""A small model that is real: a tokenizer trained on the texts that come with Python, and a Llama of two layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora import config_from_fields, pick
from whichlora.plan import write_outputs

from ..stack import needs, own_store

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "examples" / "data" / "units.jsonl"
VOCABULARY = 600


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begin with an empty store, and ask no network."""
    needs("torch", "transformers", "peft", "accelerate")
    with own_store(tmp_path_factory) as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def save_tokenizer(folder: Path) -> Any:
    """Train a byte-level BPE on Python's own help texts and save it with a chat template."""
    from pydoc_data import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(list(topics.topics.values())[:40], trainer)
    make: Any = PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved Llama of 2 layers with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small") / "llama"
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_plan(model: Path, out: Path, **changes: Any) -> Path:
    """Pick for a model and a data set with one method, and return the folder of the plan."""
    fields = {
        "gpu": "rtx-4090",
        "stage1_profile": {"model_names": [str(model)], "prefill_length": 32, "tokens_to_generate": 8},
        "stage2_profile": {"batch_size": [8]},
        "methods": ["lora"],
        "ranks": [4],
        "seq_len": 128,
        "precision": "fp32",
        "dataset": {"source": str(UNITS), "validation_share": 0.1, "test_share": 0.1},
        "epochs": 2,
        "finetune": {"learning_rate": 0.02, "save_steps": 4},
    }
    fields |= changes
    write_outputs(pick(config_from_fields(fields), offline=True), out)
    return out


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
