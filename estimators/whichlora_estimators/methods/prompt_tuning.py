"""Prompt tuning as PEFT runs it (peft/tuners/prompt_tuning/model.py; read in 0.21): embeddings of virtual tokens, in fp32."""

from __future__ import annotations

from .. import ops
from ..families.base import Model
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, method, trained
from .prompts import EmbeddedPrompt


class LearnedPrompt(EmbeddedPrompt):
    """A table [P, D]."""

    def __init__(self, model: Model, workload: Workload) -> None:
        super().__init__(model, workload)
        self.table = trained(model.build, "prompt_encoder.embedding", self.rows, model.embed.shape[-1], dtype=FP32)

    def encoded(self, numbers: Tensor) -> Tensor:
        """Look the virtual tokens up."""
        return ops.embedding(numbers, self.table)


@method
class PromptTuning(Method):
    """Learned tokens before the input."""

    name = "prompt-tuning"
    summary = "learned tokens before the input (Lester et al. 2021)"
    has_rank = False
    has_bias = False

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table."""
        model.prompt = LearnedPrompt(model, workload)
