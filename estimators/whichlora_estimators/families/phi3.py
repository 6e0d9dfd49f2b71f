"""Phi-3 to Phi-4: Llama with fused projections: queries, keys and values in one, gate and up in one.

States transformers/models/phi3 (5.23). Long RoPE (the 128k models) picks one of two sets of frequencies in every pass,
which costs a few tensors of half a head's width: nothing that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import attention, layers, ops
from ..layers import Build
from ..tape import Tensor
from .base import Config, Context, Positions, family, head_width
from .llama import Llama
from .phi import rotary_columns
from .windows import WindowedDecoder, all_layers


class Phi3Attention:
    """One projection, its parts rotated, attention, output projection."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.head_dim, self.index = c.count("hidden_size"), head_width(c), index
        self.heads, self.kv_heads = c.count("num_attention_heads"), c.count("num_key_value_heads")
        self.o = build.linear("self_attn.o_proj", self.heads * self.head_dim, width)
        self.qkv = build.linear("self_attn.qkv_proj", width, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.dropout = c.rate("attention_dropout")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        qkv = self.qkv(x)
        of_q = self.heads * self.head_dim
        of_k = of_q + self.kv_heads * self.head_dim
        q = ops.slice_last(qkv, 0, of_q)
        k = ops.slice_last(qkv, of_q, of_k)
        v = ops.slice_last(qkv, of_k, qkv.shape[-1])
        q, k, v = q.heads(self.heads), k.heads(self.kv_heads), v.heads(self.kv_heads)
        assert shared.cos is not None
        assert shared.sin is not None
        q, k = _rotated(q, k, shared.cos, shared.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(q, k, v, shared.mask, kind=context.attention, dropout=dropout)
        out = self.o(out)
        return out, weights


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first columns, and concatenate the others even where there are none."""
    turned, width = cos.shape[-1], q.shape[-1]
    q_turned, q_passed = ops.slice_last(q, 0, turned), ops.slice_last(q, turned, width)
    k_turned, k_passed = ops.slice_last(k, 0, turned), ops.slice_last(k, turned, width)
    q = ops.concat([layers.rotary(q_turned, cos, sin), q_passed], -1)
    k = ops.concat([layers.rotary(k_turned, cos, sin), k_passed], -1)
    return q, k


class Phi3Mlp:
    """down(up(x) * act(gate(x))), gate and up from one product."""

    def __init__(self, c: Config, build: Build) -> None:
        width, self.inner = c.count("hidden_size"), c.count("intermediate_size")
        self.gate_up = build.linear("mlp.gate_up_proj", width, 2 * self.inner)
        self.down = build.linear("mlp.down_proj", self.inner, width)
        self.activation = layers.find_activation(c.get("hidden_act"))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        up = self.gate_up(x)
        gate, up = ops.split_last(up, (self.inner, self.inner))
        up = ops.mul(up, self.activation(gate))
        return self.down(up)


class Phi3Block:
    """x + attention(norm(x)), then x + mlp(norm(x)), both branches with dropout."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.attention = Phi3Attention(c, build, index)
        self.mlp = Phi3Mlp(c, build)
        width = c.count("hidden_size")
        self.norm_in = build.parameter("input_layernorm.weight", width)
        self.norm_mid = build.parameter("post_attention_layernorm.weight", width)
        self.dropout = c.rate("resid_pdrop")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = layers.rms_norm(x, self.norm_in)
        x, _weights = self.attention(x, shared, context)
        x = ops.add(residual, ops.dropout(x, self.dropout))
        residual = x
        x = layers.rms_norm(x, self.norm_mid)
        x = self.mlp(x)
        return ops.add(residual, ops.dropout(x, self.dropout))


@family("phi3")
class Phi3(WindowedDecoder, Llama):
    """All layers see the window, where the config has one."""

    defaults: ClassVar = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    default_targets = ()

    def rotary_width(self, c: Config) -> int:
        """Return how many columns of a head are rotated."""
        return rotary_columns(c)

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the window of every layer."""
        return all_layers(c)

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return Phi3Block(c, build, index)
