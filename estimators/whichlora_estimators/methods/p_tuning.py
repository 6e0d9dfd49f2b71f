"""P-tuning as PEFT runs it (peft/tuners/p_tuning/model.py; read in 0.21): learned tokens through an MLP of three layers.

# P virtual tokens, D width
"""

from __future__ import annotations

from .. import ops
from ..families.base import Model
from ..layers import Linear
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, method, trained
from .prompts import VIRTUAL_TOKENS, EmbeddedPrompt, prompt_rows

LAYERS = 3


class EncodedPrompt(EmbeddedPrompt):
    """A table [P, D] and an MLP D to D to D to D, ReLU between."""

    def __init__(self, model: Model, method: str) -> None:
        super().__init__(model, method)
        build, width = model.build, model.embed.shape[-1]
        self.table = trained(build, "prompt_encoder.embedding", prompt_rows(model), width, dtype=FP32)
        self.layers = []
        for index in range(LAYERS):
            name = f"prompt_encoder.mlp_head.{2 * index}"
            weight = trained(build, f"{name}.weight", width, width, dtype=FP32)
            self.layers.append(Linear(name, weight, trained(build, f"{name}.bias", width, dtype=FP32)))

    def encoded(self, numbers: Tensor) -> Tensor:
        """Look the virtual tokens up and run the MLP."""
        first = ops.embedding(numbers, self.table)
        x = self.layers[0](first)
        for layer in self.layers[1:]:
            x = ops.activation_of_result(x)
            x = layer(x)
        del first
        return x


@method
class PTuning(Method):
    """Learned tokens through an MLP."""

    name = "p-tuning"
    summary = f"{VIRTUAL_TOKENS} learned tokens, through an MLP (Liu et al. 2021)"
    has_rank = False
    has_bias = False

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table and the MLP."""
        model.prompt = EncodedPrompt(model, self.name)
