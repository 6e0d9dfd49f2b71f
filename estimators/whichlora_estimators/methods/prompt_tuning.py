"""Prompt tuning as PEFT runs it (peft/tuners/prompt_tuning/model.py; read in 0.21): embeddings of virtual tokens, in fp32."""

from __future__ import annotations

from .. import ops
from ..families.base import Model
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, method, trained
from .prompts import VIRTUAL_TOKENS, EmbeddedPrompt, prompt_rows


class LearnedPrompt(EmbeddedPrompt):
    """A table [P, D]."""

    def __init__(self, model: Model, method: str) -> None:
        super().__init__(model, method)
        rows, width = prompt_rows(model), model.embed.shape[-1]
        self.table = trained(model.build, "prompt_encoder.embedding", rows, width, dtype=FP32)

    def encoded(self, numbers: Tensor) -> Tensor:
        """Look the virtual tokens up."""
        return ops.embedding(numbers, self.table)


@method
class PromptTuning(Method):
    """Learned tokens before the input."""

    name = "prompt-tuning"
    summary = f"{VIRTUAL_TOKENS} learned tokens before the input (Lester et al. 2021)"
    has_rank = False
    has_bias = False

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table."""
        model.prompt = LearnedPrompt(model, self.name)
