"""Small workloads of every architecture, for laws that hold over the registries."""

from __future__ import annotations

from typing import Any

from whichlora_estimators.families import all_families
from whichlora_estimators.families.base import Decoder
from whichlora_estimators.models import ModelShape, all_models
from whichlora_estimators.workload import Workload

#: A Llama's config, as small as it gets.
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def smallest(family: str) -> ModelShape | None:
    """Return the smallest bundled model of an architecture."""
    shapes = [shape for shape in all_models() if shape.family == family and shape.parameters]
    return min(shapes, key=lambda shape: shape.parameters or 0, default=None)


def shallow_config(shape: ModelShape) -> dict[str, object]:
    """Cut a model to three periods of layers: enough to have a first, a middle and a last one."""
    recipe = all_families()[shape.family]
    return {**shape.config, recipe.layers_key: 3 * recipe.period(recipe.read(shape.config))}


def shallow_workloads(**setup: object) -> list[Workload]:
    """One workload per decoder architecture that has a bundled model."""
    workloads = []
    for name, recipe in sorted(all_families().items()):
        shape = smallest(name)
        if shape is None or not issubclass(recipe, Decoder):
            continue
        workloads.append(Workload(model=shape.name, config=shallow_config(shape), **setup))  # type: ignore[arg-type]
    return workloads
