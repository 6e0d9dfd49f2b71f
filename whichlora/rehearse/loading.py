"""The model of a workload, loaded by `from_pretrained` from a checkpoint without weights, as a script would load it.

Facts: transformers 5.23 (modeling_utils.py, core_model_loading.py, integrations/bitsandbytes.py). Loading onto the device
first allocates one block as large as all weights and frees it again (`caching_allocator_warmup`), so that weights lie
close together in one segment; quantised layers are made one at a time from their weight in 16 bit.
"""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from whichlora_estimators.workload import Workload

from ..phantom import dtype_field, write_phantom
from .models import AUTO_CLASSES, dtype_name, make_config, quantization_config


def load_model(workload: Workload, device: str, folder: Path) -> Any:
    """Return the model that `from_pretrained` loads onto the device from a phantom in `folder`, written if need be.

    The phantom's weights have the dtype that they are loaded in: a cast on the host takes time and no device memory.
    """
    import torch

    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = make_config(workload)
    dtype = getattr(torch, dtype_name(workload))
    auto = getattr(transformers, AUTO_CLASSES[workload.task])
    settings: dict[str, Any] = {dtype_field(config): dtype}
    if workload.attention != "sdpa":  # which Transformers takes by itself where the model has it
        settings["attn_implementation"] = workload.attention
    if workload.quantization != "none":
        settings["quantization_config"] = quantization_config(workload, dtype)
    return auto.from_pretrained(str(_checkpoint(workload, folder)), device_map={"": device}, **settings)


def _checkpoint(workload: Workload, folder: Path) -> Path:
    """Return the phantom of a workload's model, which several processes may want at a time."""
    auto_class, dtype = AUTO_CLASSES[workload.task], dtype_name(workload)
    asked = json.dumps([dict(workload.config), auto_class, dtype], sort_keys=True, default=str)
    phantom = folder / hashlib.sha256(asked.encode()).hexdigest()[:24]
    if not phantom.is_dir():
        try:
            write_phantom(make_config(workload), phantom, dtype=dtype, auto_class=auto_class)
        except OSError:
            if not phantom.is_dir():  # else another process was faster, with the same result
                raise
    return phantom
