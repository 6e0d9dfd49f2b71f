"""The model, its tokenizer and its adapter, loaded for real: from a checkpoint, quantised on the way."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.workload import Workload

from ..data.measure import cache_folder
from ..data.tokens import find_tokenizer, load_tokenizer
from ..rehearse.adapters import OPTIMIZERS, adapt
from ..rehearse.models import DTYPES
from .recipe import Recipe

_WEIGHTS = ("*.safetensors", "*.bin")


def load_model(recipe: Recipe, *, on: str, offline: bool) -> Any:
    """Load a model's weights in the workload's dtype or quantization; on the null device, from a checkpoint without bytes.

    Raises WhichloraError where there is no checkpoint.
    """
    import transformers

    workload = recipe.workload
    where = recipe.model if on != "null" or _has_weights(Path(recipe.model)) else str(_phantom(workload))
    place = {"": "cpu"} if on == "cpu" else {"": 0}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            where,
            device_map=place,
            attn_implementation=workload.attention,
            local_files_only=offline,
            **_how(workload),
        )
    except (OSError, ValueError) as error:
        todo = f"Give a local checkpoint with --model-path, or check the name and the network. {str(error)[:300]}"
        raise WhichloraError("cannot load the model", value=where, todo=todo) from error


def _how(workload: Workload) -> dict[str, Any]:
    import torch
    import transformers

    precision = workload.precision
    mixed = precision.endswith("mixed") and workload.quantization != "none"  # autocast over a 16-bit load
    name = precision.replace("-mixed", "-true") if mixed else precision
    dtype = getattr(torch, DTYPES[name])
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    how: dict[str, Any] = {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
    config: Any = transformers.BitsAndBytesConfig
    if workload.quantization == "int8":
        how["quantization_config"] = config(load_in_8bit=True)
    elif workload.quantization != "none":
        how["quantization_config"] = config(
            load_in_4bit=True,
            bnb_4bit_quant_type=workload.quantization,
            bnb_4bit_use_double_quant=workload.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    return how


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def _phantom(workload: Workload) -> Path:
    """Return a checkpoint of the workload's model without weights, made once."""
    from ..phantom import write_phantom

    config = json.dumps(dict(workload.config), sort_keys=True)
    folder = cache_folder() / "phantoms" / hashlib.sha256(config.encode()).hexdigest()[:24]
    done = folder / "complete"
    if not done.exists():
        write_phantom(workload.config, folder)
        done.touch()
    return folder


def find_and_load_tokenizer(recipe: Recipe, *, on: str, offline: bool) -> Any:
    """Return the tokenizer; None on the null device where it cannot be had. Raises WhichloraError elsewhere."""
    folder = find_tokenizer(recipe.tokenizer, offline=offline)
    if folder is not None:
        return load_tokenizer(folder)
    if on == "null":
        return None
    todo = "Name another one in the config (stage1_profile.tokenizers), or go online once."
    raise WhichloraError("cannot find the tokenizer", value=recipe.tokenizer, todo=todo)


def adapted(model: Any, recipe: Recipe, *, total_steps: int) -> Any:
    """Prepare a model and add its adapter; AdaLoRA's schedule spans the whole training.

    AdaLoRA keeps its first rank for a tenth of the steps, and its last one for the last quarter.
    """
    model = adapt(model, recipe.workload)
    if recipe.workload.method == "adalora":
        config = model.peft_config[model.active_adapter]
        config.total_step, config.tinit, config.tfinal = total_steps, total_steps // 10, total_steps // 4
        config.deltaT = max(1, total_steps // 100)
    return model


def make_optimizer(model: Any, recipe: Recipe) -> Any:
    """Return the workload's optimizer; for LoRA-FA with AdamW, the one that PEFT has for it."""
    workload, rate = recipe.workload, recipe.training.learning_rate_for(recipe.workload.method)
    if workload.method == "lora-fa" and workload.optimizer in ("adamw", "lora-fa"):
        peft: Any = import_module("peft.optimizers")
        decay = recipe.training.weight_decay
        return peft.create_lorafa_optimizer(
            model=model, r=workload.rank, lora_alpha=2 * workload.rank, lr=rate, weight_decay=decay
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[workload.optimizer](trainable)
    for group in optimizer.param_groups:
        if workload.optimizer != "adafactor":  # it finds its own rate
            group["lr"] = rate
        if "weight_decay" in group:
            group["weight_decay"] = recipe.training.weight_decay
    return optimizer


def merge(recipe: Recipe, adapter: Path, folder: Path, *, offline: bool) -> None:
    """Write the base model with the adapter merged into its weights, in 16 or 32 bit even if it was trained quantised."""
    import transformers

    peft: Any = import_module("peft")
    how = {name: value for name, value in _how(recipe.workload).items() if name != "quantization_config"}
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model, local_files_only=offline, **how)
    merged = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder)
