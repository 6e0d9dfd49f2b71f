"""Count parameters as Transformers builds them, without memory: `python benchmarks/count_parameters.py [MODEL ...]`.

Without a name, every model of the registry is counted and compared with what the registry says.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from whichlora_estimators.models import ModelShape, all_models, load_model


def count_parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters of the model class that `config["architectures"]` names, shared ones once.

    Transformers 5 ties the head of every T5 that is built from a config, but not of a checkpoint that holds two
    different matrices, as T5 v1.1 and Flan-T5 do: an untied head is counted again here.
    """
    import torch
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = cls(transformers.AutoConfig.for_model(**config))
    counted = sum(parameter.numel() for parameter in model.parameters())
    if config["model_type"] == "t5" and not config["tie_word_embeddings"]:
        assert model.lm_head.weight is model.shared.weight
        counted += model.lm_head.weight.numel()
    return int(counted)


def _report(shape: ModelShape) -> bool:
    counted = count_parameters(shape.config)
    agrees = shape.parameters in (None, counted)
    print(f"{counted:>17,}  {shape.name}" + ("" if agrees else f"  registry says {shape.parameters:,}"))
    return agrees


if __name__ == "__main__":
    agreements = [_report(shape) for shape in [load_model(name) for name in sys.argv[1:]] or all_models()]
    sys.exit(0 if all(agreements) else 1)
