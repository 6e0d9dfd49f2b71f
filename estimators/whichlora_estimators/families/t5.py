"""T5 and mT5: encoder and decoder with a learned bias by distance in attention (transformers/models/t5, mt5, 5.23).

Both share one embedding with the head, whatever the config says (since Transformers 5). Loading never quantizes `wo`.

# B batch, T query tokens, S key tokens, D width, H heads, E head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from .. import attention, layers, ops
from ..layers import Build, token_ids
from ..tape import BOOL, FP16, FP32, INT64, LOGITS_AND_LOSS, Dtype, Tensor
from ..workload import Workload
from .base import Config, Context, InputLeaf, Model, family, with_input_grad
from .caches import Cache, StaticCache


class Norm:
    """x / rms(x) * weight, the root mean square in fp32."""

    def __init__(self, c: Config, build: Build, name: str) -> None:
        self.weight = build.parameter(f"{name}.weight", c.count("d_model"))

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the weight's dtype."""
        variance = ops.mean_last(ops.square(ops.cast(x, FP32)))
        x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
        if self.weight.dtype is not FP32:
            x = ops.cast(x, self.weight.dtype)
        return ops.mul(self.weight, x)


@dataclass(slots=True, kw_only=True)
class Biases:
    """What the layers of a stack share: masks."""

    mask: Tensor | None
    cross_mask: Tensor | None = None


class Attention:
    """Projections without bias, unscaled attention with a bias by distance, output projection."""

    def __init__(
        self,
        c: Config,
        build: Build,
        *,
        first: bool,
        causal: bool = False,
        bidirectional: bool = True,
        crosses: bool = False,
        cached_as: int | None = None,
    ) -> None:
        width, self.heads, self.crosses, self.cached_as = c.count("d_model"), c.count("num_heads"), crosses, cached_as
        inner = self.heads * c.count("d_kv")
        self.causal, self.bidirectional, self.dropout = causal, bidirectional, c.rate("dropout_rate")
        self.q, self.k, self.v = (build.linear(name, width, inner) for name in "qkv")
        self.o = build.linear("o", inner, width)
        buckets = c.count("relative_attention_num_buckets")
        self.table = build.embedding("relative_attention_bias", buckets, self.heads) if first else None

    def __call__(
        self, x: Tensor, states: Tensor, mask: Tensor | None, bias: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend [B, T, D] to [B, S, D]; returns the bias and, if eager, the probabilities too."""
        counted = _counted_past(x, context)
        q = self.q(x).heads(self.heads)
        k, v = self._keys(states, context)
        if bias is None:
            bias = self._bias(q, k, context)
        out, weights = self._attended(q, k, v, mask, bias, context)
        projected = self.o(out)
        del counted
        return projected, bias, weights

    def _keys(self, states: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Make keys and values, and cache them; those of the encoder's states are there after a first token."""
        cache = context.cache if context.crossed is None or not self.crosses else context.crossed
        if cache is context.crossed and cache is not None and self.cached_as in cache.layers:
            return cache.layers[self.cached_as]
        k = self.k(states).heads(self.heads)
        v = self.v(states).heads(self.heads)
        if self.cached_as is not None and cache is not None:
            k, v = cache.update(self.cached_as, k, v)
        return k, v

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        if context.attention == "eager":
            return _eager(q, k, v, mask, bias, self.dropout)
        joined = _joined(bias, mask, q, causal=self.causal and q.shape[2] > 1)
        return attention.attend(q, k, v, joined, kind="sdpa", dropout=self.dropout)

    def _bias(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Make the bias, [1, H, T, S]: from the table, or zeros, which ask for a gradient under checkpointing."""
        queries, keys = q.shape[2], k.shape[2]
        if self.table is None:
            zeros = q.tape.new((1, self.heads, queries, keys), q.dtype)
            if context.checkpointing and q.tape.grad_enabled:
                zeros.node = InputLeaf(zeros.detach())
            return zeros
        rows, columns = _chain(q, (queries,), INT64, INT64), q.tape.new((keys,), INT64)
        distances = q.tape.new((queries, keys), INT64)
        values = self.table(_buckets(q, queries, keys, bidirectional=self.bidirectional))
        values = values.view(1, self.heads, queries, keys)
        values.strided = True
        del distances, rows, columns
        return values


def _counted_past(x: Tensor, context: Context) -> Tensor | None:
    """Copy the number of tokens in a cache that counts them on the device."""
    return (
        x.tape.new((1,), INT64) if context.cache is not None and context.cache.fixed and context.cache.length else None
    )


def _buckets(like: Tensor, queries: int, keys: int, *, bidirectional: bool) -> Tensor:
    """Give each distance, [T, S], its row of the table: half of the rows by logarithms (_relative_position_bucket)."""
    tape, shape = like.tape, (queries, keys)
    side = _chain(like, shape, BOOL, INT64, INT64, INT64) if bidirectional else None
    distance = tape.new(shape, INT64) if bidirectional else _negative_distance(like, shape)
    near = tape.new(shape, BOOL)
    far = _far_buckets(like, shape)
    chosen = tape.new(shape, INT64)
    result = tape.new(shape, INT64) if side is None else side
    tape.launch(20 * distance.bytes)
    del side, chosen, distance, near, far
    return result


def _chain(like: Tensor, shape: tuple[int, ...], *dtypes: Dtype) -> Tensor:
    """Allocate the results of operators each of which takes the one before."""
    x = like.tape.new(shape, dtypes[0])
    for dtype in dtypes[1:]:
        x = like.tape.new(shape, dtype)
    return x


def _negative_distance(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    zeros = like.tape.new(shape, INT64)
    smaller = like.tape.new(shape, INT64)
    del zeros
    distance = like.tape.new(shape, INT64)
    del smaller
    return distance


def _far_buckets(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    bucket = _chain(like, shape, *[FP32] * 5, INT64, INT64)
    limit = like.tape.new(shape, INT64)
    clipped = like.tape.new(shape, INT64)
    del bucket, limit
    return clipped


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor, rate: float
) -> tuple[Tensor, Tensor | None]:
    weights = ops.scale(attention.compared(q, k))
    weights = ops.add(weights, bias)
    if mask is not None:
        weights = ops.add(weights, mask)
    weights = ops.softmax(weights)
    weights = ops.dropout(weights, rate)
    return attention.heads_last(attention.weighted(weights, v)), weights


def _joined(bias: Tensor, mask: Tensor | None, q: Tensor, *, causal: bool) -> Tensor:
    """Join bias and mask to the float mask that sdpa takes, in memory order (create_position_bias_mask)."""
    tape, (_, heads, queries, keys) = bias.tape, bias.shape
    if mask is not None or causal:
        allowed = tape.new((queries, keys), BOOL) if mask is None else mask
        bias = _where(allowed, bias, (1 if mask is None else q.shape[0], heads, queries, keys))
    return ops.copy(bias) if bias.strided else bias


def _where(allowed: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    tape, original = bias.tape, bias.shape
    out = tape.new(shape, bias.dtype)
    out.strided = bias.strided
    tape.launch(out.bytes + bias.bytes + allowed.bytes)

    def backward(g: Tensor, allowed: Tensor) -> tuple[Tensor | None, ...]:
        masked = ops.scale(g)
        return (masked if masked.shape == original else ops.fitted(masked, original),)

    tape.record(out, (bias,), (allowed,), backward)
    return out


class Mlp:
    """wo(dropout(act(wi(x)))), or gated: wo(dropout(act(wi_0(x)) * wi_1(x)))."""

    def __init__(self, c: Config, build: Build) -> None:
        width, inner = c.count("d_model"), c.count("d_ff")
        kind = str(c.get("feed_forward_proj"))
        self.gated, self.dropout = kind.startswith("gated-"), c.rate("dropout_rate")
        self.act = layers.find_activation("gelu_new" if kind == "gated-gelu" else kind.rsplit("-", 1)[-1])
        self.widen = build.linear("wi_0" if self.gated else "wi", width, inner)
        self.gate = build.linear("wi_1", width, inner) if self.gated else None
        self.project = build.kept_linear("wo", inner, width)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        if self.gate is None:
            x = self.widen(x)
            x = self.act(x)
        else:
            gelu = self.act(self.widen(x))
            linear = self.gate(x)
            x = ops.mul(gelu, linear)
        x = ops.dropout(x, self.dropout)
        assert self.project.weight is not None
        x = ops.cast(x, self.project.weight.dtype)
        x = self.project(x)
        return x  # noqa: RET504 - what the projection read dies here, not with its call


class Block:
    """Self-attention, cross-attention in a decoder, MLP: each behind a norm, with dropout and a residual."""

    def __init__(self, c: Config, build: Build, index: int, *, decoder: bool) -> None:
        self.decoder, self.dropout = decoder, c.rate("dropout_rate")
        cached_as = 2 * index if decoder else None
        with build.inside("0.SelfAttention"):
            self.attention = Attention(
                c, build, first=index == 0, causal=decoder, bidirectional=not decoder, cached_as=cached_as
            )
        self.attention_norm = Norm(c, build, "0.layer_norm")
        with build.inside("1.EncDecAttention"):
            cross = partial(Attention, c, build, first=False, crosses=True, cached_as=2 * index + 1)
            self.cross = cross() if decoder else None
        self.cross_norm = Norm(c, build, "1.layer_norm") if decoder else None
        last = 2 if decoder else 1
        with build.inside(f"{last}.DenseReluDense"):
            self.mlp = Mlp(c, build)
        self.mlp_norm = Norm(c, build, f"{last}.layer_norm")

    def __call__(
        self,
        x: Tensor,
        states: Tensor | None,
        shared: Biases,
        bias: Tensor | None,
        cross_bias: Tensor | None,
        context: Context,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map [B, T, D], and the encoder's [B, S, D], to [B, T, D]; the biases go out too."""
        x, bias, weights = self._attended(x, shared.mask, bias, context)
        if x.dtype is FP16:
            x = _clamped(x)
        if self.cross is not None and states is not None:
            x, cross_bias, weights = self._crossed(x, states, shared.cross_mask, cross_bias, context)
            if x.dtype is FP16:
                x = _clamped(x)
        x = self._fed(x)
        if x.dtype is FP16:
            x = _clamped(x)
        del weights  # held to the end, as in the real one
        return x, bias, cross_bias

    def _attended(
        self, x: Tensor, mask: Tensor | None, bias: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        normed = self.attention_norm(x)
        out, bias, weights = self.attention(normed, normed, mask, bias, context)
        out = ops.add(x, ops.dropout(out, self.dropout))
        return out, bias, weights

    def _crossed(
        self, x: Tensor, states: Tensor, mask: Tensor | None, bias: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.cross is not None
        assert self.cross_norm is not None
        normed = self.cross_norm(x)
        out, bias, weights = self.cross(normed, states, mask, bias, context)
        summed = ops.add(x, ops.dropout(out, self.dropout))
        return summed, bias, weights

    def _fed(self, x: Tensor) -> Tensor:
        fed = self.mlp_norm(x)
        fed = self.mlp(fed)
        return ops.add(x, ops.dropout(fed, self.dropout))


def _clamped(x: Tensor) -> Tensor:
    """Clamp to what fp16 holds, a little less where something is infinite; which elements were clamped is found again."""
    tape, shape = x.tape, x.shape
    absolute, infinite = ops.empty_like(x), tape.new(shape, BOOL)
    tape.launch(3 * x.bytes + infinite.bytes)
    del absolute, infinite
    out = ops.empty_like(x)
    tape.launch(2 * x.bytes)

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        equal = [tape.new(shape, BOOL) for _ in range(3)]  # to a bound, by both of them, and either
        tied = tape.new(shape, BOOL)
        del equal
        compared = [tape.new(shape, BOOL) for _ in range(2)]
        outside = tape.new(shape, BOOL)
        del compared
        halved, grad = ops.empty_like(g), ops.empty_like(g)
        tape.launch(2 * x.bytes + 4 * g.bytes)
        del halved, outside, tied
        return (grad,)

    tape.record(out, (x,), (x,), backward)
    return out


class Stack:
    """Embedding and dropout, blocks, norm and dropout: the encoder or the decoder."""

    def __init__(self, c: Config, build: Build, embedding: Tensor, count: int, *, decoder: bool) -> None:
        self.name, self.dropout = "decoder" if decoder else "encoder", c.rate("dropout_rate")
        #: An embedding of its own, which tying replaces.
        self.replaced: Tensor | None = build.place(embedding.shape, embedding.dtype)
        self.blocks = [self._block(c, build, index, decoder=decoder) for index in range(count)]
        self.norm = Norm(c, build, f"{self.name}.final_layer_norm")

    def _block(self, c: Config, build: Build, index: int, *, decoder: bool) -> Block:
        with build.inside(f"{self.name}.block.{index}.layer"):
            return Block(c, build, index, decoder=decoder)

    def __call__(self, inputs: Tensor, context: Context, states: Tensor | None = None) -> Tensor:
        """Map embeddings [B, T, D], and the encoder's states [B, S, D], to [B, T, D]."""
        tape = inputs.tape
        shared = self._shared(inputs, context, states)
        x = ops.dropout(inputs, self.dropout)
        bias: Tensor | None = None
        cross_bias: Tensor | None = None
        for block in tape.layers(self.blocks, self.name):
            run = partial(block, x, states, shared, bias, cross_bias, context)
            x, bias, cross_bias = tape.checkpoint(run) if context.checkpointing else run()
            del run
        tape.mark(f"{self.name} final")
        x = self.norm(x)
        x = ops.dropout(x, self.dropout)
        del inputs, bias, cross_bias
        return x

    def _shared(self, x: Tensor, context: Context, states: Tensor | None) -> Biases:
        batch, tokens = x.shape[0], x.shape[1]
        if states is None:
            mask = _bidirectional_mask(x, batch, tokens, tokens, context)
            return Biases(mask=mask)
        fixed = context.cache is not None and context.cache.fixed
        mask = attention.causal_mask(
            x,
            batch=batch,
            queries=tokens,
            keys=context.keys(tokens),
            padded=False,
            kind=context.attention,
            needed=fixed and tokens == 1,
        )
        return Biases(mask=mask, cross_mask=_bidirectional_mask(x, batch, tokens, states.shape[1], context))


def _bidirectional_mask(x: Tensor, batch: int, queries: int, keys: int, context: Context) -> Tensor | None:
    """Make the mask of padding, none where nothing is padded: bool for sdpa, float for eager."""
    if not context.padded:
        return None
    allowed = x.tape.new((batch, 1, queries, keys), BOOL)
    x.tape.launch(allowed.bytes)
    return allowed if context.attention == "sdpa" else ops.cast(allowed, x.dtype)


@family("t5")
class T5(Model):
    """The recipe."""

    tasks = ("seq2seq",)
    layers_key = "num_layers"
    default_targets = ("q", "v")
    aliases: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    defaults: ClassVar = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
    }
    #: Whether the decoder's result is scaled before the head, unless the config says that the head is not tied.
    scales: ClassVar[bool] = True

    def make(self, c: Config, build: Build) -> None:
        """Allocate the shared embedding, encoder and decoder."""
        c.default("num_decoder_layers", c.get("num_layers"))
        self.scaled = self.scales and c.get("tie_word_embeddings", True) is not False
        shared = build.embedding("shared", c.count("vocab_size"), c.count("d_model"))
        self.embed = shared.weight
        self.encoder = Stack(c, build, self.embed, c.count("num_layers"), decoder=False)
        self.decoder = Stack(c, build, self.embed, c.count("num_decoder_layers"), decoder=True)
        self.head = build.head("lm_head", c.count("d_model"), c.count("vocab_size"), tied=self.embed)
        self.encoder.replaced = self.decoder.replaced = None
        self.words = build.shared_embedding("encoder.embed_tokens", self.embed)
        self.targets = build.shared_embedding("decoder.embed_tokens", self.embed)

    def make_inputs(self, workload: Workload) -> list[Tensor]:
        """Allocate ids [B, S], labels [B, T] and a mask."""
        tape, batch = self.build.tape, workload.batch_size
        ids = [token_ids(tape, batch, workload.seq_len) for _ in range(2 if workload.padded else 1)]
        return [ids[0], token_ids(tape, batch, workload.target_len or workload.seq_len), *ids[1:]]

    def step_loss(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, object]:
        """Return the loss of the target's tokens; logits and the encoder's states stay."""
        ids, labels = inputs[0], inputs[1]
        states = self.encoder(self.looked_up(ids, context), context)
        shifted = labels.tape.new(labels.shape, INT64)
        if not context.checkpointing and context.cache is None:
            context.cache = Cache()  # `use_cache: false` does not reach the config of the decoder
        words = with_input_grad(self.targets(shifted), context)
        hidden = self.decoder(words, context, states)
        del words
        hidden.tape.mark("loss")
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            scaled = ops.scale(hidden) if self.scaled else hidden
            logits = self.head(scaled)
            loss = ops.cross_entropy(logits.view(labels.numel, logits.shape[-1]), labels)
        del hidden, scaled
        return loss, (logits, states)

    def make_caches(self, workload: Workload, context: Context) -> None:
        """Make one for each kind of attention (transformers' EncoderDecoderCache), as long as `generate` does."""
        if workload.cache == "static":
            context.cache, context.crossed = StaticCache(workload.decode_len), StaticCache(workload.prefill_len)
        else:
            context.cache, context.crossed = Cache(), Cache()
        context.cache.label = _layer_of

    def prefill(self, ids: Tensor, context: Context, *, last_only: bool) -> tuple[Tensor, Tensor]:
        """Run the encoder on [B, S], the decoder on the token that begins an answer: its logits [B, 1, V], and it."""
        context.states = self.encoder(self.looked_up(ids, context), context)
        begin = token_ids(ids.tape, ids.shape[0], 1)
        return self.decode(begin, context), begin

    def decode(self, token: Tensor, context: Context) -> Tensor:
        """Map a token [B, 1] to an fp32 copy of its logits [B, 1, V], all that `generate` keeps until the next one."""
        logits = self._logits(self.decoder(self.targets(token), context, context.states))
        with logits.tape.tagged(LOGITS_AND_LOSS):
            return ops.copy(logits) if logits.dtype is FP32 else ops.cast(logits, FP32)

    def _logits(self, hidden: Tensor) -> Tensor:
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            scaled = ops.scale(hidden) if self.scaled else hidden
            return self.head(scaled)


def _layer_of(cached_as: int) -> str:
    return f"decoder layer {cached_as // 2}"


@family("mt5")
class Mt5(T5):
    """A gated MLP, a larger vocabulary, no scaling."""

    scales = False
    defaults: ClassVar = {
        **T5.defaults,
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }
