"""BLOOM: alibi, a norm behind the embedding, fused qkv, attention of its own (transformers/models/bloom, 5.23).

It has one attention, of separate operators: Transformers refuses sdpa for it, so a workload's choice changes nothing.

# B batch, T query tokens, S key tokens, H heads, E head width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import attention, ops, products
from ..errors import Unsupported
from ..layers import Build, LayerNorm
from ..tape import FP32, INT64, Shape, Tensor
from .base import Config, Context, Decoder, Positions, family


@dataclass(slots=True, kw_only=True)
class BloomPositions(Positions):
    """What layers share: the mask, and alibi's bias per head and key [B * H, 1, S]."""

    alibi: Tensor


class Attention:
    """One product for query, key and value, attention, output product, dropout, and the residual added."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.heads, self.index = c.count("hidden_size"), c.count("n_head"), index
        self.qkv = build.linear("self_attention.query_key_value", width, 3 * width, bias=True)
        self.out = build.linear("self_attention.dense", width, width, bias=True)
        self.dropout, self.residual_dropout = c.rate("attention_dropout"), c.rate("hidden_dropout")

    def __call__(
        self, x: Tensor, residual: Tensor, shared: BloomPositions, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache and add `residual`; returns the probabilities too."""
        fused = self.qkv(x)
        q, k, v = (_selected(fused, self.heads) for _ in range(3))
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        q = _batched(q)
        k = _batched(k)
        v = _batched(v)
        scores = _biased_products(q, k, shared.alibi)
        assert shared.mask is not None
        logits = ops.add(scores, shared.mask)
        weights = ops.cast(ops.softmax(logits, FP32), q.dtype)
        weights = ops.dropout(weights, self.dropout)
        merged = attention.heads_last(products.matmul(weights, v))
        out = self.out(merged)
        out = _joined(out, residual, self.residual_dropout)
        del fused, scores, logits, merged  # held to the end, as in the real one
        return out, weights


def _selected(fused: Tensor, heads: int) -> Tensor:
    """View a third of each head of [B, T, 3 * H * E], as [B, H, T, E]; backward fills a gradient of the whole width."""
    batch, tokens, width = shape = fused.shape
    view = Tensor(fused.tape, fused.storage, (batch, heads, tokens, width // (3 * heads)), fused.dtype)
    view.strided = heads > 1 and tokens > 1
    fused.tape.record(view, (fused,), (), lambda g: (ops.fitted(g, shape),))
    return view


def _batched(x: Tensor) -> Tensor:
    return ops.copy(x) if x.strided and x.shape[0] > 1 else x


def _biased_products(q: Tensor, k: Tensor, alibi: Tensor) -> Tensor:
    """Add alibi to factor * q k in one operator (baddbmm), whose gradients are scaled behind their products."""
    tape = q.tape
    if tape.autocast is not None:
        k, q, alibi = (ops.cast(t, tape.autocast) for t in (k, q, alibi))  # from the last argument to the first
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    out = tape.new((batch, heads, queries, keys), q.dtype)
    products.matmul_kernel(out, batch * heads, queries, keys, width)

    need_q, need_k = q.node is not None, k.node is not None
    shape_q, shape_k = q.shape, k.shape

    def backward(g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        of_q = _scaled_product(g, shape_q, keys) if need_q else None
        return of_q, _scaled_product(g, shape_k, queries) if need_k else None

    tape.record(out, (q, k), (q if need_k else None, k if need_q else None), backward)
    return out


def _scaled_product(g: Tensor, shape: Shape, inner: int) -> Tensor:
    batch, heads, rows, width = shape
    product = g.tape.new(shape, g.dtype)
    products.matmul_kernel(product, batch * heads, rows, width, inner)
    return ops.scale(product)


def _joined(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    out = ops.dropout(x, rate)
    return ops.add(residual, out)


def _gelu(x: Tensor) -> Tensor:
    """BLOOM's GELU: separate operators inside a function of its own, which saves nothing but the input."""
    detached = x.detach()
    out = ops.mul(ops.scale(detached), ops.shift(ops.activation_of_result(_gelu_argument(detached))))

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        tanh = ops.activation_of_result(_gelu_argument(x))
        slope = ops.mul(ops.scale(x), ops.mul(ops.shift(ops.mul(tanh, tanh)), ops.shift(ops.mul(ops.scale(x), x))))
        slope = ops.add(slope, ops.scale(ops.shift(tanh)))
        return (ops.mul(slope, g),)

    x.tape.record(out, (x,), (x,), backward)
    return out


def _gelu_argument(x: Tensor) -> Tensor:
    return ops.mul(ops.scale(x), ops.shift(ops.mul(ops.scale(x), x)))


class Mlp:
    """dense_4h_to_h(gelu(dense_h_to_4h(x))), with dropout and the residual added."""

    def __init__(self, c: Config, build: Build) -> None:
        width = c.count("hidden_size")
        self.widen = build.linear("mlp.dense_h_to_4h", width, 4 * width, bias=True)
        self.project = build.linear("mlp.dense_4h_to_h", 4 * width, width, bias=True)
        self.dropout = c.rate("hidden_dropout")

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = _gelu(self.widen(x))
        out = self.project(x)
        return _joined(out, residual, self.dropout)


class Block:
    """Attention and MLP, each behind a norm; the residual is what comes before the norm, or behind it."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width = c.count("hidden_size")
        self.residual_behind_norm = c.flag("apply_residual_connection_post_layernorm")
        self.norm_in = LayerNorm(build, "input_layernorm", width)
        self.attention = Attention(c, build, index)
        self.norm_mid = LayerNorm(build, "post_attention_layernorm", width)
        self.mlp = Mlp(c, build)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]; the probabilities go out too."""
        assert isinstance(shared, BloomPositions)
        normed = self.norm_in(x)
        residual = normed if self.residual_behind_norm else x
        attended, weights = self.attention(normed, residual, shared, context)
        normed = self.norm_mid(attended)
        residual = normed if self.residual_behind_norm else attended
        return self.mlp(normed, residual), weights


@family("bloom")
class Bloom(Decoder):
    """The recipe."""

    layers_key = "n_layer"
    flash = False
    token_head, token_dropout = "classifier", 0.0
    trunk, tokens, layers = "transformer", "word_embeddings", "h"
    default_targets = ("query_key_value",)
    aliases: ClassVar = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"}
    defaults: ClassVar = {
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "tie_word_embeddings": True,
    }

    def make_embeddings(self, c: Config, build: Build) -> None:
        """Allocate the norm behind the embedding."""
        if c.flag("slow_but_exact") and c.count("pretraining_tp") > 1:
            raise Unsupported("BLOOM with slow_but_exact", value=True, todo="Set slow_but_exact to false.")
        self.heads = c.count("n_head")
        self.embedding_norm = LayerNorm(build, "word_embeddings_layernorm", self.width)

    def block(self, c: Config, build: Build, index: int) -> Block:
        """Make one layer."""
        return Block(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm."""
        self.final_norm = LayerNorm(build, "ln_f", self.width)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Normalise the tokens' embeddings."""
        inputs = self.looked_up(ids, context)
        kept.append(inputs)
        return self.embedding_norm(inputs), self.positions(inputs, ids, context)

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make alibi's bias and the causal mask, which is a float one."""
        batch, tokens = ids.shape
        keys = context.keys(tokens)
        alibi = self._alibi(x, batch, keys, padded=context.padded)
        mask = attention.causal_mask(x, batch=batch, queries=tokens, keys=keys, padded=context.padded, kind="eager")
        return BloomPositions(mask=mask, alibi=alibi)

    def _alibi(self, x: Tensor, batch: int, keys: int, *, padded: bool) -> Tensor:
        tape = x.tape
        numbers = tape.new((batch, 1, keys) if padded else (keys,), INT64)
        slopes = None if padded else tape.new((self.heads, 1, keys), FP32)
        bias = ops.cast(tape.new((batch * self.heads, 1, keys), FP32), x.dtype)
        del numbers, slopes
        return bias
