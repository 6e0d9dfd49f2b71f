"""OLMo 2: norms behind the branches and of queries and keys, rotation in fp32 (transformers/models/olmo2, 5.23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import layers, ops
from ..layers import Build, rotary_tables
from ..tape import FP32, INT64, Tensor
from .base import Config, Context, Positions, family
from .llama import Attention, GatedMlp, Llama


def olmo2_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise as OLMo 2 does: in fp32, the weight applied before the cast back (Olmo2RMSNorm)."""
    dtype = x.dtype
    x = ops.cast(x, FP32)
    variance = ops.mean_last(ops.square(x))
    x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
    return ops.cast(ops.mul(weight, x), dtype)


class Olmo2Attention(Attention):
    """Attention with norms over all heads of queries and of keys."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        super().__init__(c, build, index)
        self.q_norm = build.parameter("self_attn.q_norm.weight", self.heads * self.head_dim)
        self.k_norm = build.parameter("self_attn.k_norm.weight", self.kv_heads * self.head_dim)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [B, H, T, E], keys and values [B, K, T, E]."""
        q = self.q(x)  # a name, since what a module is given lives until it returns
        q = olmo2_norm(q, self.q_norm)
        k = self.k(x)
        k = olmo2_norm(k, self.k_norm)
        v = self.v(x)
        return q.heads(self.heads), k.heads(self.kv_heads), v.heads(self.kv_heads)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate in the dtype of the tables, then cast back."""
        q_turned = layers.rotary(q, cos, sin)
        k_turned = layers.rotary(k, cos, sin)
        return ops.cast(q_turned, q.dtype), ops.cast(k_turned, k.dtype)


class Olmo2Block:
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.attention = Olmo2Attention(c, build, index)
        self.mlp = GatedMlp(c, build)
        width = c.count("hidden_size")
        self.norm_attended = build.parameter("post_attention_layernorm.weight", width)
        self.norm_out = build.parameter("post_feedforward_layernorm.weight", width)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x, _weights = self.attention(x, shared, context)
        x = olmo2_norm(x, self.norm_attended)
        x = ops.add(residual, x)
        residual = x
        x = self.mlp(x)
        x = olmo2_norm(x, self.norm_out)
        return ops.add(residual, x)


@family("olmo2")
class Olmo2(Llama):
    """Llama with OLMo 2's blocks and norm."""

    tasks = ("causal", "seq-cls")
    defaults: ClassVar = {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    default_targets = ()
    norm = staticmethod(olmo2_norm)

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return Olmo2Block(c, build, index)

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make the mask, then cos and sin in fp32."""
        ids_of_positions = x.tape.new((1, ids.shape[1]), INT64)
        mask = self.mask(x, ids, context)
        cos, sin = rotary_tables(x, ids.shape[1], self.rotated, dtype=FP32)
        del ids_of_positions
        return Positions(cos=cos, sin=sin, mask=mask)
