"""Every field of a workload means something, in memory or in what its documentation says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload, workload_from_json

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
T5 = {"model_type": "t5", "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
GENERATE = {"phase": "generate", "prefill_len": 20, "decode_len": 3}
#: A change of each field, and what it is a change to beside the small workload.
CHANGES: dict[str, tuple[object, dict[str, Any]]] = {
    "config": ({**LLAMA, "num_hidden_layers": 3}, {}),
    "task": ("seq-cls", {}),
    "phase": ("generate", {}),
    "method": ("dora", {}),
    "rank": (8, {}),
    "targets": (("q_proj",), {}),
    "target_parameters": (("mlp.up_proj.weight",), {"targets": ("q_proj",)}),
    "rank_pattern": ({"q_proj": 2}, {}),
    "exclude_modules": (("q_proj",), {}),
    "layers_to_transform": ((1,), {"targets": ("q_proj", "v_proj")}),
    "layer_replication": (((0, 2), (0, 1)), {}),
    "trainable_tokens": (3, {}),
    "modules_to_save": (("lm_head",), {}),
    "ensure_weight_tying": (True, {"config": {**LLAMA, "tie_word_embeddings": True}, "modules_to_save": ("lm_head",)}),
    "bias": ("all", {"config": NEOX}),
    "lora_bias": (True, {}),
    "num_virtual_tokens": (50, {"method": "prompt-tuning"}),
    "encoder_hidden_size": (96, {"method": "p-tuning"}),
    "prefix_projection": (True, {"method": "prefix-tuning"}),
    "dropout": (0.1, {}),
    "precision": ("fp32", {}),
    "quantization": ("nf4", {}),
    "double_quantization": (False, {"quantization": "nf4"}),
    "kbit_preparation": (False, {"quantization": "nf4"}),
    "checkpointing": (True, {}),
    "reentrant": (True, {"checkpointing": True}),
    "attention": ("eager", {}),
    "optimizer": ("sgd", {}),
    "accumulation": (2, {}),
    "clip_grad_norm": (1.0, {}),
    "output_kept": (False, {}),
    "previous_kept": (True, {"phase": "generate", "prefill_len": 20}),
    "batch_size": (2, {}),
    "seq_len": (49, {}),
    "target_len": (17, {"config": T5, "task": "seq2seq"}),
    "padded": (True, {}),
    "prefill_len": (21, GENERATE),
    "decode_len": (4, GENERATE),
    "cache": ("static", GENERATE),
    "last_logits_only": (False, GENERATE),
}
#: Names only.
LABELS = {"id", "model"}


def small(**setup: Any) -> Workload:
    return Workload(**{"model": "small", "config": LLAMA, "rank": 4, "seq_len": 48, **setup})


def laid(workload: Workload) -> tuple[list[int], list[int]]:
    timeline = lay(workload)
    return timeline.tape.sizes, timeline.events()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Workload) if field.name not in LABELS])
def test_a_field_changes_what_is_allocated(name: str) -> None:
    """A change of any field but the names changes sizes or order of allocations, where the field has a meaning at all."""
    value, setup = CHANGES[name]
    assert laid(small(**{**setup, name: value})) != laid(small(**setup))


@pytest.mark.parametrize("name", sorted(LABELS))
def test_a_name_changes_nothing(name: str) -> None:
    """What a workload and its model are called takes no memory."""
    assert laid(small(**{name: "other"})) == laid(small())


@pytest.mark.parametrize(
    "name", ["r", "target_modules", "alpha_pattern", "use_rslora", "layers_pattern", "encoder_dropout"]
)
def test_settings_of_peft_are_told_where_they_belong(name: str) -> None:
    """A setting of PEFT that is no field is refused with what to give in its place."""
    with pytest.raises(BadValue, match=name) as caught:
        workload_from_json({"model": "small", "config": LLAMA, name: 1})
    assert caught.value.todo


@pytest.mark.parametrize(
    ("method", "setup"),
    [
        ("ia3", {"ensure_weight_tying": True}),
        ("lora", {"trainable_tokens": {"nothing": 3}}),
        ("dora", {"targets": ("q_proj",), "target_parameters": ("up_proj.weight",)}),
        ("lora", {"targets": ("q_proj",), "target_parameters": ("q_proj.weight",)}),
        ("lora", {"targets": (), "target_parameters": ("input_layernorm.weight",)}),
        ("lora", {"targets": (), "target_parameters": ("nothing",)}),
        ("lora", {"targets": (), "target_parameters": ("q_proj.weight",), "dropout": 0.1}),
        ("lora", {"targets": (), "target_parameters": ("q_proj.weight",), "quantization": "nf4"}),
        ("vera", {"layer_replication": ((0, 1),)}),
        ("lora", {"layer_replication": ((0, 3),)}),
        ("lora", {"layer_replication": ((0, 1),), "modules_to_save": ("mlp",)}),
        ("lora", {"layer_replication": ((0, 1),), "config": NEOX}),
        ("lora", {"trainable_tokens": 3, "modules_to_save": ("embed_tokens",)}),
        ("ia3", {"rank_pattern": {"q_proj": 2}}),
        ("dora", {"lora_bias": True}),
        ("lora", {"lora_bias": True, "targets": ("q_proj", "embed_tokens")}),
        ("ia3", {"layers_to_transform": (1,), "targets": ("q_proj",)}),
        ("vera", {"exclude_modules": ("q_proj",)}),
        ("prompt-tuning", {"trainable_tokens": 3}),
        ("prompt-tuning", {"encoder_hidden_size": 64}),
        ("p-tuning", {"prefix_projection": True}),
        ("prompt-tuning", {"config": {**LLAMA, "model_type": "opt", "ffn_dim": 192, "word_embed_proj_dim": 64}}),
        ("full", {"modules_to_save": ("lm_head",)}),
        ("lora", {"layers_to_transform": (1,)}),
        ("lora", {"trainable_tokens": 3, "targets": ("q_proj", "embed_tokens")}),
    ],
)
def test_what_a_method_has_no_setting_for_is_refused(method: str, setup: dict[str, Any]) -> None:
    """A setting that PEFT's configuration of the method lacks is no silent wish."""
    with pytest.raises(WhichloraError) as caught:
        lay(small(method=method, **setup))
    assert caught.value.todo
