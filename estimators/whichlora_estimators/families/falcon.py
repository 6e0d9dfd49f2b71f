"""Falcon: fused qkv, attention beside the MLP, few or one key-value head (transformers/models/falcon, 5.23).

Transformers 5.23, asked to quantize, leaves its linear layers alone (they are of a subclass of nn.Linear), and so does a
workload; k-bit preparation then casts all of them to fp32.

Three architectures: 7b (one key-value head, one norm), 40b (`new_decoder_architecture`: groups of heads, two norms) and
rw (alibi instead of rotation, attention before the MLP). Attention always gets a mask, so the flash kernel never runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import attention, layers, ops
from ..layers import Build, LayerNorm, Linear
from ..tape import BF16, BOOL, FP16, FP32, INT64, Tensor
from .base import Config, Context, Positions, RotaryDecoder, family

# B batch, T query tokens, S key tokens, D width, H heads, K key-value heads, E head width


@dataclass(slots=True, kw_only=True)
class FalconPositions(Positions):
    """What layers share, with alibi's bias per head and key."""

    alibi: Tensor | None = None


class Attention:
    """One product for query, key and value, split in one of three ways; attention by operators of its own."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.width, self.heads, self.index = c.count("hidden_size"), c.count("num_attention_heads"), index
        self.head_dim = self.width // self.heads
        self.grouped, self.single = c.flag("new_decoder_architecture"), c.flag("multi_query")
        self.dropout = c.rate("attention_dropout")
        self.kv_heads = self.heads
        if self.grouped:
            self.kv_heads = c.count("num_kv_heads")
        elif self.single:
            self.kv_heads = 1
        fused = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = _linear(build, "self_attention.query_key_value", self.width, fused, c)
        self.out = _linear(build, "self_attention.dense", self.width, self.width, c)

    def __call__(self, x: Tensor, shared: FalconPositions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        dtype = x.dtype
        fused = self.qkv(x)
        q, k, v = self._split(fused)
        if shared.alibi is None:
            q, k = _rotated(q, k, shared)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        assert shared.mask is not None
        dropout = self.dropout if context.training and shared.alibi is not None else 0.0
        weights = None
        if context.attention == "sdpa":
            out = attention.heads_last(attention.fused(q, k, v, shared.mask))
        elif shared.alibi is None:
            scores = ops.scale_in_place(attention.compared(*_full(q, k)))
            weights = ops.softmax(ops.add(scores, shared.mask), dtype)
            del scores
            out = attention.heads_last(attention.weighted(*_full(weights, v)))
        else:
            products = attention.compared(q, k)
            scores = ops.cast(products, FP32) if products.dtype in (BF16, FP16) else products
            logits = ops.scale_in_place(ops.add(scores, shared.alibi))
            weights = ops.softmax(ops.add(logits, shared.mask), dtype)
            weights = ops.dropout(weights, dropout)
            out = attention.heads_last(attention.weighted(weights, v))
        return self.out(out), weights

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [B, T, (H + 2K) E] in query, key and value; only where all heads have their own are these all views."""
        stop = self.heads * self.head_dim
        width = self.kv_heads * self.head_dim
        q = ops.slice_last(fused, 0, stop)
        k, v = ops.slice_last(fused, stop, stop + width), ops.slice_last(fused, stop + width, stop + 2 * width)
        q = _taken(q, fused, self.heads)
        if not self.grouped and not self.single:
            return q, _taken(k, fused, self.heads), _taken(v, fused, self.heads)
        k = _taken(ops.copy(k.detach()), fused, self.kv_heads, by_index=True)
        v = _taken(ops.copy(v.detach()), fused, self.kv_heads, by_index=True)
        if not self.grouped:
            return q, k, v
        if 1 < self.kv_heads < self.heads:  # else groups and heads of queries become one dimension without a copy
            q = ops.copy(q)
            q.strided = True
        return q, _spread(k, self.heads), _spread(v, self.heads)


def _taken(part: Tensor, fused: Tensor, heads: int, *, by_index: bool = False) -> Tensor:
    """View columns of the product as heads [B, H, T, E]; backward puts the gradient among zeros for all columns.

    What was taken by an index goes there from a copy in the order of the columns.
    """
    tape, whole = fused.tape, fused.shape
    seen = part.detach().heads(heads)

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        zeros = tape.new(whole, g.dtype)
        if by_index and not g.strided and heads > 1 and whole[1] > 1:
            tape.new(g.shape, g.dtype)
        tape.launch(zeros.bytes + 2 * g.bytes)
        return (zeros,)

    tape.record(seen, (fused,), (), backward)
    return seen


def _linear(build: Build, name: str, n_in: int, n_out: int, c: Config) -> Linear:
    """Make a FalconLinear: never quantized, its bias added by an operator of its own."""
    layer = build.kept_linear(name, n_in, n_out, bias=c.flag("bias"))
    layer.adds_bias = True
    return layer


def _spread(x: Tensor, heads: int) -> Tensor:
    """Copy each key-value head to the query heads of its group, in the memory order of a projection."""
    out = ops.repeat_heads(x, heads // x.shape[1])
    out.strided = True
    return out


def _full(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, ops.repeat_heads(b, a.shape[1] // b.shape[1])


def _rotated(q: Tensor, k: Tensor, shared: Positions) -> tuple[Tensor, Tensor]:
    assert shared.cos is not None
    assert shared.sin is not None
    turned = layers.rotary(q, shared.cos, shared.sin)
    return turned, layers.rotary(k, shared.cos, shared.sin)


class Mlp:
    """dense_4h_to_h(act(dense_h_to_4h(x)))."""

    def __init__(self, c: Config, build: Build) -> None:
        width = c.count("hidden_size")
        inner = int(c.get("ffn_hidden_size") or 4 * width)
        self.widen = _linear(build, "mlp.dense_h_to_4h", width, inner, c)
        self.project = _linear(build, "mlp.dense_4h_to_h", inner, width, c)
        self.act = layers.find_activation(c.get("activation"))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = self.act(self.widen(x))
        return self.project(x)


class Block:
    """x + attention(norm(x)) + mlp(norm(x)) with one norm or two, or one after the other."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width = c.count("hidden_size")
        new = c.flag("new_decoder_architecture")
        norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
        self.two_norms = new and norms == 2
        self.parallel = new or c.flag("parallel_attn")
        self.dropout, self.attention_dropout = c.rate("hidden_dropout"), c.rate("attention_dropout")
        self.attention = Attention(c, build, index)
        self.mlp = Mlp(c, build)
        first, second = ("ln_attn", "ln_mlp") if self.two_norms else ("input_layernorm", "post_attention_layernorm")
        self.mlp_norm = LayerNorm(build, second, width) if self.two_norms or not self.parallel else None
        self.attention_norm = LayerNorm(build, first, width)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]; the probabilities go out too."""
        assert isinstance(shared, FalconPositions)
        residual = x
        attention_in = mlp_in = self.attention_norm(x)
        if self.two_norms and self.mlp_norm is not None:
            mlp_in = self.mlp_norm(x)
        attended, weights = self.attention(attention_in, shared, context)
        if not self.parallel and self.mlp_norm is not None:
            residual = self._joined(attended, residual, self.attention_dropout)
            mlp_in = self.mlp_norm(residual)
        fed = self.mlp(mlp_in)
        if self.parallel:
            fed = ops.add_in_place(fed, attended)
        return self._joined(fed, residual, self.dropout), weights

    def _joined(self, x: Tensor, residual: Tensor, rate: float) -> Tensor:
        dropped = ops.dropout(x, rate)
        return ops.add(residual, dropped)


@family("falcon")
class Falcon(RotaryDecoder):
    """The recipe."""

    flash = False
    token_head, token_dropout = "classifier", 0.0
    trunk, tokens, layers = "transformer", "word_embeddings", "h"
    default_targets = ("query_key_value",)
    aliases: ClassVar = {"n_embed": "hidden_size"}
    defaults: ClassVar = {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "activation": "gelu",
        "tie_word_embeddings": True,
    }

    def make(self, c: Config, build: Build) -> None:
        """Allocate the parameters; there are as many key-value heads as heads, unless told."""
        c.default("num_kv_heads", c.get("num_attention_heads"))
        self.heads, self.alibi = c.count("num_attention_heads"), c.flag("alibi")
        super().make(c, build)

    def block(self, c: Config, build: Build, index: int) -> Block:
        """Make one layer."""
        return Block(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm and the rotary frequencies, which models with alibi have too."""
        self.final_norm = LayerNorm(build, "ln_f", self.width)
        self.make_rotary(c, build)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make the mask, alibi's bias in it, and the rotary tables."""
        batch, tokens = ids.shape
        keys = context.keys(tokens)
        tape = x.tape
        alibi = self._slopes(x, batch, keys, padded=context.padded) if self.alibi else None
        numbers = tape.new((1, tokens), INT64)
        mask = attention.causal_mask(
            x, batch=batch, queries=tokens, keys=keys, padded=context.padded, kind=context.attention, needed=True
        )
        assert mask is not None  # it is asked for whatever is seen
        if alibi is not None:
            mask = _biased(alibi, mask, x)
        tables = super().positions(x, ids, context)
        del numbers
        return FalconPositions(cos=tables.cos, sin=tables.sin, mask=mask, alibi=alibi)

    def mask(self, x: Tensor, ids: Tensor, context: Context) -> Tensor | None:
        """Make none: see `positions`."""
        return None

    def _slopes(self, x: Tensor, batch: int, keys: int, *, padded: bool) -> Tensor:
        tape = x.tape
        counted = tape.new((batch, keys), INT64)
        bias = ops.cast(tape.new((batch, self.heads, 1, keys), BF16), x.dtype)
        del counted
        return bias


def _biased(alibi: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Join alibi's bias and the mask: [B, H, T, S]."""
    tape, (batch, heads, _, keys) = alibi.tape, alibi.shape
    queries = mask.shape[2]
    mask = ops.cast(mask, x.dtype)
    scaled = ops.scale(alibi)
    hidden = tape.new((batch, 1, queries, keys), BOOL)
    joined = tape.new((batch, heads, queries, keys), x.dtype)
    tape.launch(joined.bytes + mask.bytes + hidden.bytes)
    del scaled, hidden
    return joined
