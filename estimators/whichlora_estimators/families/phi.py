"""Phi 1 to 2: attention and MLP beside each other on one layer norm, biases everywhere, part of each head rotated.

States transformers/models/phi (5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import attention, layers, ops
from ..layers import Build, LayerNorm
from ..tape import Tensor
from .base import Config, Context, Positions, RotaryDecoder, family, head_width


def rotary_columns(c: Config) -> int:
    """Return how many columns of a head are rotated, by the config's share of them."""
    nested = c.get("rope_parameters") or c.get("rope_scaling") or {}
    share = nested.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    return int(head_width(c) * share)


Norm = Callable[[Tensor], Tensor]


class PhiAttention:
    """Projections, optional layer norms of the heads, rotation of some columns, attention, output projection."""

    output_name = "dense"

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.head_dim, self.index = c.count("hidden_size"), head_width(c), index
        self.heads, self.kv_heads = c.count("num_attention_heads"), c.count("num_key_value_heads")
        bias = c.flag("attention_bias")
        self.q = build.linear("self_attn.q_proj", width, self.heads * self.head_dim, bias=bias)
        self.k = build.linear("self_attn.k_proj", width, self.kv_heads * self.head_dim, bias=bias)
        self.v = build.linear("self_attn.v_proj", width, self.kv_heads * self.head_dim, bias=bias)
        self.o = build.linear(
            f"self_attn.{self.output_name}", self.heads * self.head_dim, width, bias=c.flag("attention_out_bias")
        )
        self.rotated = rotary_columns(c)
        self.dropout = c.rate("attention_dropout")
        self.head_norms = self.make_head_norms(c, build) if c.flag("qk_layernorm") else None

    def make_head_norms(self, c: Config, build: Build) -> tuple[Norm, Norm]:
        """Allocate the norms of query and key heads: one for all heads."""
        q, k = (LayerNorm(build, f"self_attn.{name}_layernorm", self.head_dim) for name in "qk")
        return (
            lambda x: ops.layer_norm_of_view(x, q.weight, q.bias),
            lambda x: ops.layer_norm_of_view(x, k.weight, k.bias),
        )

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        q, k, v = self.projected(x)
        if self.head_norms is not None:
            q = self.head_norms[0](q)
            k = self.head_norms[1](k)
        # the rotated and the passed columns are names of the real function too, and live until it returns
        assert shared.cos is not None
        assert shared.sin is not None
        q_turned, q_passed = ops.slice_last(q, 0, self.rotated), ops.slice_last(q, self.rotated, self.head_dim)
        k_turned, k_passed = ops.slice_last(k, 0, self.rotated), ops.slice_last(k, self.rotated, self.head_dim)
        q_turned, k_turned = _both_rotated(q_turned, k_turned, shared.cos, shared.sin)
        q = ops.concat([q_turned, q_passed], -1)
        k = ops.concat([k_turned, k_passed], -1)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(q, k, v, shared.mask, kind=context.attention, dropout=dropout)
        out = self.o(out)
        return out, weights

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [B, H, T, E], keys and values [B, K, T, E]: each projection is seen as heads before the next."""
        q = self.q(x).heads(self.heads)
        k = self.k(x).heads(self.kv_heads)
        return q, k, self.v(x).heads(self.kv_heads)


def _both_rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = layers.rotary(q, cos, sin)
    return turned, layers.rotary(k, cos, sin)


class PlainMlp:
    """dropout(down(act(up(x)))), with biases."""

    def __init__(self, c: Config, build: Build, names: tuple[str, str], *, dropout: float = 0.0) -> None:
        width, inner, bias = c.count("hidden_size"), c.count("intermediate_size"), c.flag("mlp_bias")
        self.dropout = dropout
        self.up = build.linear("mlp." + names[0], width, inner, bias=bias)
        self.down = build.linear("mlp." + names[1], inner, width, bias=bias)
        self.activation = layers.find_activation(c.get("hidden_act"))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = self.up(x)
        x = self.activation(x)
        x = self.down(x)
        return ops.dropout(x, self.dropout)


class PhiBlock:
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.attention = PhiAttention(c, build, index)
        self.mlp = PlainMlp(c, build, ("fc1", "fc2"))
        self.norm = LayerNorm(build, "input_layernorm", c.count("hidden_size"))
        self.dropout = c.rate("resid_pdrop")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = self.norm(x)
        attended, _weights = self.attention(x, shared, context)
        attended = ops.dropout(attended, self.dropout)
        fed = ops.dropout(self.mlp(x), self.dropout)
        return ops.add(ops.add(attended, fed), residual)


@family("phi")
class Phi(RotaryDecoder):
    """Parallel blocks, a layer norm at the end, a head with a bias."""

    defaults: ClassVar = {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": False,
    }
    default_targets = ("q_proj", "v_proj", "fc1", "fc2")

    def make(self, c: Config, build: Build) -> None:
        """Fill in what the config leaves to its class and what the class leaves no choice in, then allocate."""
        c.default("num_key_value_heads", c.get("num_attention_heads"))
        for key in ("attention_bias", "attention_out_bias", "mlp_bias"):
            c.force(key, True)
        self.dropout = c.rate("embd_pdrop")
        super().make(c, build)

    def rotary_width(self, c: Config) -> int:
        """Return how many columns of a head are rotated."""
        return rotary_columns(c)

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Return the input of the first block, with dropout, and what blocks share."""
        x = self.looked_up(ids, context)
        shared = self.positions(x, ids, context)
        x = ops.dropout(x, self.dropout)
        kept.append(x)
        return x, shared

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return PhiBlock(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the rotary frequencies and the final norm."""
        self.make_rotary(c, build)
        self.final_norm = LayerNorm(build, "final_layernorm", self.width)

    def make_head(self, c: Config, build: Build) -> None:
        """Make the output head."""
        tied = self.embed if c.flag("tie_word_embeddings") else None
        self.head = build.head("lm_head", self.width, self.vocab, bias=True, tied=tied)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)
