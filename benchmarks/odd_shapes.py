"""Draw models that nobody published: a few layers of every architecture, with each switch of its config thrown by chance.

Switches are those that Transformers' classes read (5.23). Widths are small, since what a switch does shows there as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from whichlora_estimators.families import find_family
from whichlora_estimators.families.base import Decoder
from whichlora_estimators.layers import Build
from whichlora_estimators.methods import all_methods
from whichlora_estimators.optimizers import OPTIMIZERS
from whichlora_estimators.tape import BF16, Tape
from whichlora_estimators.workload import PRECISIONS

Choices = dict[str, tuple[Any, ...]]

LAYERS = (1, 2, 3, 4, 4, 7, 9, 12)
HEADS, HEAD_WIDTHS = (2, 4, 6, 12), (32, 48, 64, 64, 80, 128, 256)
VOCABULARIES = (512, 997, 8192, 32001, 50257, 128256)
TIES: Choices = {"tie_word_embeddings": (True, False)}
DROPS = (0.0, 0.0, 0.1)
GATED_ACTS = ("silu", "silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new")
PLAIN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_fast", "quick_gelu", "relu2")
WINDOWS = (None, 16, 64, 300, 4096)

#: Of each architecture the keys of its config beside the sizes, with what they may be.
SWITCHES: dict[str, Choices] = {
    "llama": {"attention_bias": (False, True), "mlp_bias": (False, True), "hidden_act": GATED_ACTS, **TIES},
    "mistral": {"sliding_window": WINDOWS, "hidden_act": GATED_ACTS, **TIES},
    "qwen2": {
        "use_sliding_window": (False, True),
        "sliding_window": WINDOWS[1:],
        "max_window_layers": (0, 1, 2),
        **TIES,
    },
    "qwen3": {
        "use_sliding_window": (False, True),
        "sliding_window": WINDOWS[1:],
        "max_window_layers": (0, 1, 2),
        "attention_bias": (False, True),
        **TIES,
    },
    "gemma": {"hidden_act": GATED_ACTS, **TIES},
    "gemma2": {
        "hidden_activation": GATED_ACTS,
        "sliding_window": WINDOWS[1:],
        "attn_logit_softcapping": (None, 50.0),
        "final_logit_softcapping": (None, 30.0),
        **TIES,
    },
    "gemma3_text": {
        "hidden_activation": GATED_ACTS,
        "sliding_window": WINDOWS[1:],
        "sliding_window_pattern": (2, 3, 6),
        "attn_logit_softcapping": (None, None, 50.0),
        "final_logit_softcapping": (None, None, 30.0),
        **TIES,
    },
    "phi": {
        "partial_rotary_factor": (0.25, 0.5, 1.0),
        "qk_layernorm": (False, True),
        "resid_pdrop": DROPS,
        "embd_pdrop": DROPS,
        "attention_dropout": DROPS,
        "hidden_act": PLAIN_ACTS,
        **TIES,
    },
    "phi3": {
        "partial_rotary_factor": (0.5, 0.75, 1.0),
        "sliding_window": WINDOWS,
        "resid_pdrop": DROPS,
        "embd_pdrop": DROPS,
        "attention_dropout": DROPS,
        "hidden_act": GATED_ACTS,
        **TIES,
    },
    "granite": {
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "attention_dropout": DROPS,
        "hidden_act": GATED_ACTS,
        **TIES,
    },
    "olmo2": {"attention_bias": (False, True), "attention_dropout": DROPS, "hidden_act": GATED_ACTS, **TIES},
    "stablelm": {
        "use_qkv_bias": (False, True),
        "qk_layernorm": (False, True),
        "use_parallel_residual": (False, True),
        "partial_rotary_factor": (0.25, 0.5, 1.0),
        "hidden_dropout": DROPS,
        "attention_dropout": DROPS,
        "hidden_act": GATED_ACTS,
        **TIES,
    },
    "starcoder2": {
        "use_bias": (True, False),
        "sliding_window": WINDOWS,
        "embedding_dropout": DROPS,
        "residual_dropout": DROPS,
        "attention_dropout": DROPS,
        "hidden_act": PLAIN_ACTS,
        **TIES,
    },
    "gpt2": {
        "activation_function": PLAIN_ACTS,
        "n_inner": (None, 384, 1000),
        "attn_pdrop": DROPS,
        "resid_pdrop": DROPS,
        "embd_pdrop": DROPS,
        "scale_attn_by_inverse_layer_idx": (False, True),
        **TIES,
    },
    "gpt_neox": {
        "use_parallel_residual": (True, False),
        "attention_bias": (True, False),
        "rotary_pct": (0.25, 0.5, 1.0),
        "hidden_dropout": DROPS,
        "attention_dropout": DROPS,
        "hidden_act": PLAIN_ACTS,
        **TIES,
    },
    "opt": {
        "do_layer_norm_before": (True, False),
        "enable_bias": (True, False),
        "layer_norm_elementwise_affine": (True, True, False),
        "dropout": DROPS,
        "attention_dropout": DROPS,
        "activation_function": PLAIN_ACTS,
        **TIES,
    },
    "falcon": {
        "multi_query": (True, False),
        "new_decoder_architecture": (False, True),
        "parallel_attn": (True, False),
        "bias": (False, True),
        "alibi": (False, False, True),
        "num_ln_in_parallel_attn": (None, 1, 2),
        "hidden_dropout": DROPS,
        "attention_dropout": DROPS,
        "activation": PLAIN_ACTS,
        "ffn_hidden_size": (None, 1000),
        **TIES,
    },
    "bloom": {
        "hidden_dropout": DROPS,
        "attention_dropout": DROPS,
        "apply_residual_connection_post_layernorm": (False, True),
        **TIES,
    },
    "mixtral": {
        "num_local_experts": (2, 4, 8),
        "num_experts_per_tok": (1, 2),
        "sliding_window": WINDOWS,
        "hidden_act": GATED_ACTS,
        **TIES,
    },
    "qwen2_moe": {
        "hidden_act": GATED_ACTS,
        "num_experts": (4, 8),
        "num_experts_per_tok": (1, 2, 4),
        "moe_intermediate_size": (96, 320),
        "shared_expert_intermediate_size": (128, 704),
        "decoder_sparse_step": (1, 2),
        "norm_topk_prob": (False, True),
        "mlp_only_layers": ([], [0]),
        "use_sliding_window": (False, True),
        "sliding_window": WINDOWS[1:],
        "max_window_layers": (1, 2, 28),
        **TIES,
    },
    "qwen3_moe": {
        "hidden_act": GATED_ACTS,
        "num_experts": (4, 8),
        "num_experts_per_tok": (1, 2, 4),
        "moe_intermediate_size": (96, 320),
        "decoder_sparse_step": (1, 2),
        "norm_topk_prob": (False, True),
        "mlp_only_layers": ([], [0]),
        "attention_bias": (False, True),
        "use_sliding_window": (False, True),
        "sliding_window": WINDOWS[1:],
        **TIES,
    },
    "bert": {"hidden_dropout_prob": DROPS, "attention_probs_dropout_prob": DROPS, "type_vocab_size": (1, 2, 4), **TIES},
    "roberta": {"hidden_dropout_prob": DROPS, "attention_probs_dropout_prob": DROPS, "type_vocab_size": (1, 2), **TIES},
    "xlm-roberta": {
        "hidden_dropout_prob": DROPS,
        "attention_probs_dropout_prob": DROPS,
        "type_vocab_size": (1,),
        **TIES,
    },
    "t5": {"feed_forward_proj": ("relu", "gated-gelu", "gated-silu"), "dropout_rate": DROPS, **TIES},
    "mt5": {"feed_forward_proj": ("gated-gelu", "relu"), "dropout_rate": DROPS, **TIES},
}
#: Architectures whose heads may be of another width than their share of the model's, and which share keys among queries.
FREE_HEADS = {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "mixtral", "qwen3_moe"}
GROUPED = FREE_HEADS | {"qwen2", "phi", "phi3", "olmo2", "stablelm", "starcoder2", "qwen2_moe"}
_T5 = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
}
#: Keys of sizes, where an architecture spells them in its own way.
SPELLED = {
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "opt": {"intermediate_size": "ffn_dim"},
    "t5": _T5,
    "mt5": _T5,
}
#: Positions that models with a table of them have.
POSITIONS = 2048
#: Tokens of a batch.
MOST_TOKENS = 6000


def odd_config(random: Random, family: str) -> dict[str, Any]:
    """Return a config.json of few layers of an architecture."""
    heads, head_width = random.choice(HEADS), random.choice(HEAD_WIDTHS)
    sizes: dict[str, Any] = {
        "hidden_size": heads * head_width,
        "intermediate_size": random.choice((200, 688, 1024, 2816)),
        "num_hidden_layers": random.choice(LAYERS),
        "num_attention_heads": heads,
        "vocab_size": random.choice(VOCABULARIES),
    }
    if family in FREE_HEADS or family in ("t5", "mt5"):
        sizes["head_dim"] = head_width
        sizes["hidden_size"] = random.choice((heads * 32, heads * 80, heads * 100, heads * head_width))
    if family in GROUPED:
        sizes["num_key_value_heads"] = random.choice([count for count in (1, 2, 3, heads) if not heads % count])
    if family == "falcon":
        sizes["num_kv_heads"] = random.choice([count for count in (1, 2, heads) if not heads % count])
    if family == "opt":
        sizes["word_embed_proj_dim"] = random.choice((sizes["hidden_size"], sizes["hidden_size"], 128))
    if family in ("t5", "mt5"):
        sizes["num_decoder_layers"] = random.choice(LAYERS)
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    known = {} if family in ("falcon", "bloom", "t5", "mt5") else {positions: POSITIONS}
    named = {SPELLED.get(family, {}).get(key, key): value for key, value in sizes.items()}
    switches = {key: random.choice(values) for key, values in SWITCHES[family].items()}
    tokens = {"pad_token_id": 1} if family in ("bert", "roberta", "xlm-roberta", "opt") else {"pad_token_id": 0}
    if family in ("t5", "mt5"):
        tokens["decoder_start_token_id"] = 0
    return {"model_type": family, **named, **known, **tokens, **_possible(family, switches, sizes)}


def _possible(family: str, switches: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """Throw back switches that the classes refuse together."""
    layers = sizes["num_hidden_layers"]
    if family == "falcon" and switches["new_decoder_architecture"]:
        switches |= {"alibi": False, "parallel_attn": True}
    if family == "mixtral":
        switches["num_experts_per_tok"] = min(switches["num_experts_per_tok"], switches["num_local_experts"])
    if "partial_rotary_factor" in switches or "rotary_pct" in switches:
        key = "partial_rotary_factor" if "partial_rotary_factor" in switches else "rotary_pct"
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        if int(width * switches[key]) % 2:
            switches[key] = 1.0
    if layers == 1 and switches.get("mlp_only_layers"):
        switches["mlp_only_layers"] = []
    return {key: value for key, value in switches.items() if value is not None or key in _NULLS}


#: Keys for which null means "none of it", not "as the class has it".
_NULLS = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}


def draw_odd(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield workloads of odd shapes: architectures and methods in turn, everything else by chance."""
    random = Random(f"odd {seed}")
    families, methods = sorted(SWITCHES), sorted(all_methods())
    for index in range(count):
        family = families[index % len(families)]
        config = odd_config(random, family)
        line = {
            "id": f"odd-{seed}-{index:04d}",
            "model": f"odd-{family}",
            "config": config,
            "attention": random.choice(("sdpa", "sdpa", "eager")),
            **_setup(random, family, config, methods[(index // 3) % len(methods)]),
        }
        yield {key: value for key, value in line.items() if value is not None}


def _setup(random: Random, family: str, config: dict[str, Any], method: str) -> dict[str, Any]:
    tasks = find_family(family).tasks
    task = "causal" if "causal" in tasks and random.random() < 0.85 else random.choice(tasks)
    if task == "causal" and random.random() < 0.2:
        return {"task": task, **_generation(random)}
    return {"task": task, **_training(random, config, method, task)}


def _generation(random: Random) -> dict[str, Any]:
    quantization = random.choice(("none", "none", "nf4", "fp4", "int8"))
    return {
        "phase": "generate",
        "precision": random.choice(("bf16-true", "bf16-true", "fp16-true", "bf16-mixed", "fp16-mixed", "fp32")),
        "quantization": quantization,
        "double_quantization": random.random() < 0.5,
        "batch_size": random.choice((1, 1, 2, 3, 7, 16)),
        "prefill_len": random.choice((1, 7, 64, 333, 1001)),
        "decode_len": random.choice((1, 2, 5, 12, 40)),
        "cache": random.choice(("dynamic", "dynamic", "static")),
        "last_logits_only": random.random() < 0.6,
    }


def _training(random: Random, config: dict[str, Any], method: str, task: str) -> dict[str, Any]:
    quantization = "none" if method == "full" else random.choice(("none", "none", "none", "nf4", "fp4", "int8"))
    checkpointing = random.random() < 0.5 and all_methods()[method].allows_checkpointing
    seq_len = random.choice((3, 17, 64, 129, 250, 511, 777, 1500))
    return {
        "phase": "train",
        "method": method,
        "precision": random.choice(PRECISIONS),
        "quantization": quantization,
        "double_quantization": random.random() < 0.5,
        "kbit_preparation": random.random() < 0.6,
        "checkpointing": checkpointing,
        "reentrant": checkpointing and random.random() < 0.5,
        "optimizer": random.choice((*(name for name, each in OPTIMIZERS.items() if not each.method), "adamw")),
        "batch_size": random.choice([size for size in (1, 1, 2, 3, 5, 7) if size * seq_len <= MOST_TOKENS]),
        "seq_len": seq_len,
        "target_len": random.choice((5, 16, 100)) if task == "seq2seq" else None,
        "padded": random.random() < 0.4,
        "accumulation": random.choice((1, 1, 1, 2, 3)),
        "clip_grad_norm": random.choice((None, 1.0)),
        "output_kept": random.random() < 0.8,
        **(_adapters(random, config, method, task) if method != "full" else {}),
    }


def _adapters(random: Random, config: dict[str, Any], method: str, task: str) -> dict[str, Any]:
    known, names = all_methods()[method], _linear_names(config, task)
    some = sorted(random.sample(names, random.randint(1, len(names))))
    recipe: Any = find_family(str(config["model_type"]))
    decoder = task == "causal" and issubclass(recipe, Decoder)
    default = [None] if recipe.default_targets else []
    every = [] if task == "token-cls" else ["all-linear"]
    targets = random.choice((*default, *every, some, some, rf".*\.[0-9]*[02468]\..*({'|'.join(some)})"))
    saved = [recipe.head_name, recipe.tokens] if decoder else []
    return {
        "rank": random.choice((1, 3, 8, 16, 100)),
        "targets": targets,
        "rank_pattern": {random.choice(names): 12} if known.has_rank_pattern and random.random() < 0.2 else None,
        "dropout": random.choice((0.0, 0.0, 0.1)),
        "bias": random.choice(("none", "none", "all", "lora_only")) if known.has_bias else None,
        "modules_to_save": random.sample(saved, random.randint(1, 2)) if saved and random.random() < 0.15 else None,
    }


def _linear_names(config: dict[str, Any], task: str) -> list[str]:
    """Return the last names of a model's linear layers."""
    recipe = find_family(str(config["model_type"]))
    build = Build(Tape(), BF16, trainable=False, task=task)
    recipe(config, build)
    return sorted({layer.name.rpartition(".")[2] for layer in build.linears})
