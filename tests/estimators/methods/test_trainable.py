"""What trains, against PEFT itself (on the CPU: on the meta device AdaLoRA leaves its rank numbers untrained)."""

from __future__ import annotations

from typing import Any

import pytest

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.methods import all_methods
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 320,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 96,
        "ffn_dim": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "word_embed_proj_dim": 96,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.stack
@pytest.mark.parametrize("method", sorted(set(all_methods()) - {"full"}))
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_as_many_parameters_train_as_in_peft(family: str, method: str, targets: str | None) -> None:
    """Trainable parameters are PEFT's, at its default layers and at all of them, or both refuse."""
    from whichlora.rehearse.adapters import adapt
    from whichlora.rehearse.models import build_model

    workload = Workload(
        model=family, config=CONFIGS[family], method=method, targets=targets, rank=5, seq_len=8, checkpointing=False
    )
    real = adapt(build_model(workload, "cpu"), workload)
    expected = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    try:
        timeline = lay(workload)
    except WhichloraError as error:
        pytest.skip(f"refused: {error}")
    assert timeline.trainable_params == expected


NAMED = {
    "qwen3": (
        ["embed_tokens"],
        ["q_proj", "embed_tokens", "lm_head"],
        ["q_proj", "input_layernorm"],
        ["q_proj", "mlp"],
    ),
    "gpt_neox": (["embed_in", "embed_out"], ["dense", "attention"], r".*\.1\..*dense", r"gpt_neox\..*(embed_in|dense)"),
}


TIED = {**CONFIGS["qwen3"], "tie_word_embeddings": True}
PARTS: tuple[dict[str, Any], ...] = (
    {"exclude_modules": ("k_proj", "mlp.down_proj")},
    {"exclude_modules": ("q_proj", "v_proj", "k_proj", "down_proj")},
    {"targets": ("q_proj", "embed_tokens"), "layers_to_transform": (0, 2)},
    {"targets": ("q_proj",), "layers_to_transform": (7,)},
    {"layers_to_transform": (1,)},
    {"targets": ("q_proj",), "trainable_tokens": 3},
    {"target_parameters": ("up_proj.weight", "layers.1.mlp.down_proj.weight")},
    {"target_parameters": ("q_proj.weight",)},
    {
        "targets": (),
        "target_parameters": ("embed_tokens.weight", "lm_head.weight"),
        "rank_pattern": {"lm_head.weight": 2},
    },
    {"layer_replication": ((0, 2), (1, 2))},
    {"lora_bias": True},
    {"exclude_modules": r".*[02]\..*(q_proj|down_proj)", "targets": "all-linear"},
    {"targets": ("q_proj",), "trainable_tokens": {"embed_tokens": 3, "lm_head": 2}},
    {"targets": ("q_proj",), "trainable_tokens": {"embed_tokens": 3, "lm_head": 2}, "config": TIED},
    {"targets": ("q_proj",), "trainable_tokens": {"embed_tokens": 3, "lm_head": 3}, "config": TIED},
    {"targets": ("q_proj", "lm_head"), "ensure_weight_tying": True, "config": TIED},
    {"targets": ("q_proj",), "modules_to_save": ("lm_head",), "ensure_weight_tying": True, "config": TIED},
    {"lora_bias": True, "targets": ("q_proj", "embed_tokens")},
    {"targets": ("q_proj", "embed_tokens"), "trainable_tokens": 3},
)


@pytest.mark.stack
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "vera", "prompt-tuning"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_parts_of_a_model_are_adapted_or_refused_as_by_peft(parts: dict[str, Any], method: str) -> None:
    """Excluded modules, numbered layers, single tokens: as many parameters train as in PEFT, or both refuse."""
    from whichlora.rehearse.adapters import adapt
    from whichlora.rehearse.models import build_model

    setup = {"config": CONFIGS["qwen3"], "targets": None, "rank": 5, "seq_len": 8, **parts}
    workload = Workload(model="qwen3", method=method, **setup)
    try:
        lay(workload)
    except WhichloraError:
        if method != "prompt-tuning":  # whose configuration is asked for none of it
            with pytest.raises((TypeError, ValueError)):
                adapt(build_model(workload, "cpu"), workload)
        return
    real = adapt(build_model(workload, "cpu"), workload)
    assert lay(workload).trainable_params == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.stack
@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "adalora", "ia3", "vera"])
@pytest.mark.parametrize(
    ("family", "targets"), [(family, targets) for family, several in NAMED.items() for targets in several]
)
def test_named_modules_are_adapted_or_refused_as_by_peft(family: str, targets: list[str] | str, method: str) -> None:
    """Embeddings, heads, norms and modules around layers: as many parameters train as in PEFT, or both refuse."""
    from whichlora.rehearse.adapters import adapt
    from whichlora.rehearse.models import build_model

    named = targets if isinstance(targets, str) else tuple(targets)
    workload = Workload(model=family, config=CONFIGS[family], method=method, targets=named, rank=5, seq_len=8)
    try:
        real = adapt(build_model(workload, "cpu"), workload)
    except (TypeError, ValueError):
        with pytest.raises(WhichloraError):
            lay(workload)
        return
    expected = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    assert lay(workload).trainable_params == expected
