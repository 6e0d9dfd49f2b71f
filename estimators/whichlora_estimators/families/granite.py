"""Granite: Llama with multipliers on embedding, branches and logits (transformers/models/granite, 5.23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import ops
from ..layers import Build
from ..tape import Leaf, Tensor
from .base import Config, Context, Positions, family
from .llama import Block, Llama


class GraniteBlock(Block):
    """x + attention(norm(x)) * m, then x + mlp(norm(x)) * m."""

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = self.norm(x, self.norm_in)
        x, _weights = self.attention(x, shared, context)
        x = ops.add(residual, ops.scale(x))
        residual = x
        x = self.norm(x, self.norm_mid)
        x = self.mlp(x)
        return ops.add(residual, ops.scale(x))


@family("granite")
class Granite(Llama):
    """Every multiplier is an operator, a factor of one too."""

    tasks = ("causal",)
    defaults: ClassVar = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    default_targets = ()

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return GraniteBlock(c, build, index, norm=self.norm)

    def looked_up(self, ids: Tensor, context: Context) -> Tensor:
        """Look the tokens up and scale them; where inputs take gradients, what was looked up is the leaf."""
        x = context.embeddings
        if x is None:
            x = self.words(ids)
            if context.input_grads and x.node is None and x.tape.grad_enabled:
                x.node = Leaf()
        return _scaled(x)

    def scores(self, hidden: Tensor) -> Tensor:
        """Apply the head and divide its logits."""
        return ops.scale(self.head(hidden))


def _scaled(x: Tensor) -> Tensor:
    """Multiply by a number; a leaf lives until its gradient has arrived, for the node that collects it holds it."""
    out = ops.scale(x.detach())
    x.tape.record(out, (x,), (x if isinstance(x.node, Leaf) else None,), lambda g, *_: (ops.scale(g),))
    return out
