"""The methods and optimizers that the real libraries have, by the names that workloads give them.

A new one is one entry, here or in the class that estimates it (`Method.peft_config`, `Optimizer.real`). PEFT's and the
optimizers' defaults stand unless a workload's field says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from whichlora_estimators.errors import UnknownName, Unsupported
from whichlora_estimators.methods import all_methods
from whichlora_estimators.optimizers import OPTIMIZERS as ESTIMATED
from whichlora_estimators.workload import Workload

from .models import QUANTIZATIONS

#: PEFT knows no masked language models: it takes them as they are.
TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "seq-cls": "SEQ_CLS",
    "token-cls": "TOKEN_CLS",
    "masked-lm": None,
    "seq2seq": "SEQ_2_SEQ_LM",
}
LEARNING_RATE = 1e-4
FULL = "full"

Config = Callable[[Any, Workload], Any]  # (the package peft, a workload) to a configuration of PEFT


def _lora(peft: Any, workload: Workload, **more: Any) -> Any:
    return peft.LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        lora_dropout=workload.dropout,
        target_modules=_targets(workload),
        rank_pattern=dict(workload.rank_pattern),
        bias=workload.bias,
        **_parts(workload),
        **more,
    )


def _parts(workload: Workload) -> dict[str, Any]:
    """Return what of the model is adapted beside the targets' names, where anything is said of it."""
    tokens, excluded = workload.trainable_tokens, workload.exclude_modules
    settings = {
        "exclude_modules": excluded if isinstance(excluded, str) else list(excluded),
        "layers_to_transform": list(workload.layers_to_transform),
        "trainable_token_indices": list(range(tokens))
        if isinstance(tokens, int)
        else {name: list(range(count)) for name, count in tokens.items()},
        "target_parameters": list(workload.target_parameters),
        "layer_replication": list(workload.layer_replication),
        "ensure_weight_tying": workload.ensure_weight_tying,
        "lora_bias": workload.lora_bias,
    }
    return {name: value for name, value in settings.items() if value}


def _adalora(peft: Any, workload: Workload) -> Any:
    return peft.AdaLoraConfig(
        init_r=workload.rank,
        target_r=max(1, workload.rank // 2),
        lora_alpha=2 * workload.rank,
        lora_dropout=workload.dropout,
        target_modules=_targets(workload),
        bias=workload.bias,
        total_step=100,
        **_parts(workload),
    )


def _vera(peft: Any, workload: Workload) -> Any:
    bias = workload.bias.replace("lora", "vera")
    settings = {"target_modules": _targets(workload), "vera_dropout": workload.dropout, "bias": bias}
    settings |= _parts(workload)
    return peft.VeraConfig(r=workload.rank, **settings)


def _encoder(workload: Workload) -> dict[str, Any]:
    """Return how many virtual tokens there are, and the width of what encodes them."""
    return {"num_virtual_tokens": workload.num_virtual_tokens, "encoder_hidden_size": workload.encoder_hidden_size}


def _targets(workload: Workload) -> Any:
    return list(workload.targets) if isinstance(workload.targets, tuple) else workload.targets


METHODS: dict[str, Config | None] = {
    FULL: None,
    "lora": _lora,
    "lora-fa": _lora,
    "rslora": lambda peft, w: _lora(peft, w, use_rslora=True),
    "dora": lambda peft, w: _lora(peft, w, use_dora=True),
    "adalora": _adalora,
    "ia3": lambda peft, w: peft.IA3Config(
        target_modules=None if w.targets == "all-linear" else _targets(w), **_parts(w)
    ),
    "loha": lambda peft, w: peft.LoHaConfig(r=w.rank, target_modules=_targets(w)),
    "lokr": lambda peft, w: peft.LoKrConfig(r=w.rank, target_modules=_targets(w)),
    "vera": _vera,
    "prompt-tuning": lambda peft, w: peft.PromptTuningConfig(num_virtual_tokens=w.num_virtual_tokens),
    "prefix-tuning": lambda peft, w: peft.PrefixTuningConfig(prefix_projection=w.prefix_projection, **_encoder(w)),
    "p-tuning": lambda peft, w: peft.PromptEncoderConfig(**_encoder(w)),
}
METHODS |= {name: each.peft_config for name, each in all_methods().items() if name not in METHODS}


def _bitsandbytes(name: str) -> Callable[[Iterable[Any]], Any]:
    def make(parameters: Iterable[Any]) -> Any:
        bnb: Any = import_module("bitsandbytes")
        return getattr(bnb.optim, name)(parameters, lr=LEARNING_RATE)

    return make


def _torch(name: str, **settings: Any) -> Callable[[Iterable[Any]], Any]:
    def make(parameters: Iterable[Any]) -> Any:
        import torch

        return getattr(torch.optim, name)(parameters, lr=LEARNING_RATE, **settings)

    return make


def _adafactor(parameters: Iterable[Any]) -> Any:
    """Make the Adafactor that the HF Trainer takes for `optim="adafactor"`."""
    optimization: Any = import_module("transformers.optimization")
    return optimization.Adafactor(parameters)


_BITSANDBYTES = {
    "adamw-8bit": "AdamW8bit",
    "paged-adamw": "PagedAdamW",
    "paged-adamw-8bit": "PagedAdamW8bit",
    "lion-8bit": "Lion8bit",
    "paged-lion-8bit": "PagedLion8bit",
}
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "adamw": _torch("AdamW"),
    "adamw-fused": _torch("AdamW", fused=True),
    "adamw-loop": _torch("AdamW", foreach=False),
    **{name: _bitsandbytes(kind) for name, kind in _BITSANDBYTES.items()},
    "sgd": _torch("SGD"),
    "sgd-momentum": _torch("SGD", momentum=0.9),
    "adafactor": _adafactor,
}
OPTIMIZERS |= {name: each.real for name, each in ESTIMATED.items() if name not in OPTIMIZERS}
#: A method, and the optimizer that PEFT has for it, which wants the frozen matrices as well.
LORA_FA = "lora-fa"


def check(workload: Workload) -> None:
    """Refuse a workload that no library can run, before anything heavy starts. Raises UnknownName or Unsupported."""
    names = {"method": tuple(METHODS), "optimizer": tuple(OPTIMIZERS), "quantization": QUANTIZATIONS}
    for field, known in names.items():
        value = getattr(workload, field)
        if value not in known and not (workload.phase == "generate" and field != "quantization"):
            raise UnknownName(field, value, known, todo=f"Rehearsed are: {', '.join(known)}.")
    if workload.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        todo = 'Without padding it takes what "sdpa" takes, whose kernel is the same: rehearse that.'
        raise Unsupported("the flash-attn library is not installed", value=workload.attention, todo=todo)
    if workload.phase == "train" and workload.optimizer == LORA_FA != workload.method:
        raise Unsupported(
            "this optimizer trains nothing but LoRA-FA's B", value=workload.method, todo="Choose lora-fa."
        )
    if workload.phase == "train" and workload.method == FULL and workload.quantization != "none":
        todo = 'Choose an adapter ("lora"), or no quantization.'
        raise Unsupported("weights that are quantised are not trained", value=workload.quantization, todo=todo)


def wants_bitsandbytes(workload: Workload) -> bool:
    """Say whether a workload needs bitsandbytes: for its weights, or for the optimizer that trains it."""
    return workload.quantization != "none" or (workload.phase == "train" and workload.optimizer in _BITSANDBYTES)


def adapt(model: Any, workload: Workload) -> Any:
    """Prepare the model for training as its users do: k-bit preparation, adapters, checkpointing, no cache."""
    peft: Any = import_module("peft")
    quantized, adapted = workload.quantization != "none", METHODS[workload.method]
    prepared = quantized and workload.kbit_preparation
    if prepared:
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=workload.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": workload.reentrant},
        )
    if adapted:
        config = adapted(peft, workload)
        config.task_type = TASK_TYPES[workload.task]
        if workload.modules_to_save:
            config.modules_to_save = list(workload.modules_to_save)
        model = peft.get_peft_model(model, config)
    if workload.method == LORA_FA:
        _freeze_a(model)
    if workload.checkpointing and not prepared:
        model.gradient_checkpointing_enable({"use_reentrant": workload.reentrant})
        model.enable_input_require_grads()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.train()


def make_optimizer(model: Any, workload: Workload) -> Any:
    """Return the workload's optimizer of what trains in a model."""
    if workload.optimizer == LORA_FA:
        rank, peft = workload.rank, import_module("peft.optimizers")
        return peft.create_lorafa_optimizer(model=model, r=rank, lora_alpha=2 * rank, lr=1e-4)
    return OPTIMIZERS[workload.optimizer]([parameter for parameter in model.parameters() if parameter.requires_grad])


def _freeze_a(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
