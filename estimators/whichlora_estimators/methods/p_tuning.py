"""P-tuning as PEFT runs it (peft/tuners/p_tuning/model.py; read in 0.21): learned tokens through an MLP of three layers.

# P virtual tokens, D width, H width of the MLP inside
"""

from __future__ import annotations

from itertools import pairwise

from .. import ops
from ..families.base import Model
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, method, trained
from .prompts import EmbeddedPrompt, encoder_layer


class EncodedPrompt(EmbeddedPrompt):
    """A table [P, D] and an MLP D to H to H to D, ReLU between; H is D unless told."""

    def __init__(self, model: Model, workload: Workload) -> None:
        super().__init__(model, workload)
        build, width = model.build, model.embed.shape[-1]
        inner = workload.encoder_hidden_size or width
        self.table = trained(build, "prompt_encoder.embedding", self.rows, width, dtype=FP32)
        self.layers = [
            encoder_layer(build, f"mlp_head.{2 * index}", n_in, n_out)
            for index, (n_in, n_out) in enumerate(pairwise((width, inner, inner, width)))
        ]

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
    summary = "learned tokens, through an MLP (Liu et al. 2021)"
    has_rank = False
    has_bias = False
    has_encoder = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table and the MLP."""
        model.prompt = EncodedPrompt(model, workload)
