"""StarCoder 2: layer norms, biases, a plain MLP, dropout behind the branches, maybe a window on all layers.

States transformers/models/starcoder2 (5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import ops
from ..layers import Build, LayerNorm
from ..tape import Tensor
from .base import Config, Context, Positions, family
from .llama import Attention
from .phi import PlainMlp
from .windows import WindowedDecoder, all_layers


class Starcoder2Block:
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.attention = Attention(c, build, index)
        self.attention.output_dropout = c.rate("residual_dropout")
        self.mlp = PlainMlp(c, build, ("c_fc", "c_proj"), dropout=c.rate("residual_dropout"))
        width = c.count("hidden_size")
        self.norm_in = LayerNorm(build, "input_layernorm", width)
        self.norm_mid = LayerNorm(build, "post_attention_layernorm", width)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = self.norm_in(x)
        x, _weights = self.attention(x, shared, context)
        x = ops.add(residual, x)
        residual = x
        x = self.norm_mid(x)
        x = self.mlp(x)
        return ops.add(residual, x)


@family("starcoder2")
class Starcoder2(WindowedDecoder):
    """All layers see the window, where the config has one."""

    defaults: ClassVar = {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "tie_word_embeddings": True,
    }
    default_targets = ()

    def make(self, c: Config, build: Build) -> None:
        """Give all linear layers biases, or none, then allocate."""
        for key in ("attention_bias", "attention_out_bias", "mlp_bias"):
            c.force(key, c.flag("use_bias"))
        self.dropout = c.rate("embedding_dropout")
        super().make(c, build)

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the window of every layer."""
        return all_layers(c)

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Return the input of the first block, with dropout, and what blocks share."""
        inputs = self.looked_up(ids, context)
        kept.append(inputs)
        shared = self.positions(inputs, ids, context)
        return ops.dropout(inputs, self.dropout), shared

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return Starcoder2Block(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm and the rotary frequencies."""
        self.final_norm = LayerNorm(build, "norm", self.width)
        self.make_rotary(c, build)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)
