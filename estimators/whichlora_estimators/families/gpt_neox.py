"""GPT-NeoX, Pythia: fused qkv, some columns of a head rotated, attention beside the MLP (transformers/models/gpt_neox).

# B batch, T tokens, D width, H heads, E head width
"""

from __future__ import annotations

from typing import Any, ClassVar

from .. import attention, layers, ops
from ..layers import Build, LayerNorm
from ..tape import Tensor
from .base import Config, Context, Positions, RotaryDecoder, family, head_width


class Attention:
    """One product for query, key and value, rotation of some columns, attention, output product."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.heads, self.index = c.count("hidden_size"), c.count("num_attention_heads"), index
        bias = c.flag("attention_bias")
        self.qkv = build.linear("attention.query_key_value", width, 3 * width, bias=bias)
        self.out = build.linear("attention.dense", width, width, bias=bias)
        self.dropout = c.rate("attention_dropout")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        fused = self.qkv(x).heads(self.heads)
        q, k, v = ops.split_fused(fused, 3)
        q, k = _rotated(q, k, shared)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(q, k, v, shared.mask, kind=context.attention, dropout=dropout)
        return self.out(out), weights


def _rotated(q: Tensor, k: Tensor, shared: Positions) -> tuple[Tensor, Tensor]:
    """Rotate the first columns of both, then put the rest behind them: a copy even where no column is left."""
    assert shared.cos is not None
    assert shared.sin is not None
    width = shared.cos.shape[-1]
    q_turned, q_passed = ops.slice_last(q, 0, width), ops.slice_last(q, width, q.shape[-1])
    k_turned, k_passed = ops.slice_last(k, 0, width), ops.slice_last(k, width, k.shape[-1])
    q_out = layers.rotary(q_turned, shared.cos, shared.sin)
    k_out = layers.rotary(k_turned, shared.cos, shared.sin)
    q_out = ops.concat([q_out, q_passed], -1)
    k_out = ops.concat([k_out, k_passed], -1)
    return q_out, k_out


class Mlp:
    """dense_4h_to_h(act(dense_h_to_4h(x)))."""

    def __init__(self, c: Config, build: Build) -> None:
        width, inner = c.count("hidden_size"), c.count("intermediate_size")
        self.widen = build.linear("mlp.dense_h_to_4h", width, inner, bias=True)
        self.project = build.linear("mlp.dense_4h_to_h", inner, width, bias=True)
        self.act = layers.find_activation(c.get("hidden_act"))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = self.widen(x)
        x = self.act(x)
        return self.project(x)


class Block:
    """x + attention(norm(x)) + mlp(norm(x)), or one after the other."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width = c.count("hidden_size")
        self.parallel, self.dropout = c.flag("use_parallel_residual"), c.rate("hidden_dropout")
        self.norm_in = LayerNorm(build, "input_layernorm", width)
        self.norm_mid = LayerNorm(build, "post_attention_layernorm", width)
        self.attention = Attention(c, build, index)
        self.mlp = Mlp(c, build)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        attended, weights = self.attention(self.norm_in(x), shared, context)
        attended = ops.dropout(attended, self.dropout)
        if self.parallel:
            fed = self._fed(x)
            x = ops.add(ops.add(fed, attended), x)
        else:
            attended = ops.add(attended, x)
            fed = self._fed(attended)
            x = ops.add(fed, attended)
        del attended, weights, fed  # held to the end, as in the real one
        return x

    def _fed(self, x: Tensor) -> Tensor:
        return ops.dropout(self.mlp(self.norm_mid(x)), self.dropout)


@family("gpt_neox")
class GptNeox(RotaryDecoder):
    """The recipe."""

    token_head = "classifier"
    trunk, tokens = "gpt_neox", "embed_in"
    default_targets = ("query_key_value",)
    defaults: ClassVar = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "attention_bias": True,
        "classifier_dropout": 0.1,
        "tie_word_embeddings": False,
    }

    def block(self, c: Config, build: Build, index: int) -> Block:
        """Make one layer."""
        return Block(c, build, index)

    def rotary_width(self, c: Config) -> int:
        """Return how many columns of a head are rotated: a quarter unless told."""
        rope: dict[str, Any] = c.get("rope_parameters") or c.get("rope_scaling") or {}
        return int(head_width(c) * float(rope.get("partial_rotary_factor", c.get("rotary_pct", 0.25))))

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm and the rotary frequencies."""
        self.final_norm = LayerNorm(build, "final_layer_norm", self.width)
        self.make_rotary(c, build)
        self.dropout = c.rate("hidden_dropout")

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Drop out the tokens' embeddings."""
        x, shared = super().enter(ids, context, kept)
        return ops.dropout(x, self.dropout), shared
