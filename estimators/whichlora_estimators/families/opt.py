"""OPT: learned positions with an offset of 2, biases, dropout (transformers/models/opt, 5.23).

opt-350m normalises behind attention and MLP, not before, and its tokens' embeddings are narrower than its blocks, with
a projection in and one out.
"""

from __future__ import annotations

from typing import ClassVar

from .. import attention, layers, ops
from ..errors import Unsupported
from ..layers import Build, Embedding, LayerNorm, Linear
from ..tape import FP32, INT64, Tensor
from .base import Config, Context, Decoder, Positions, family

#: Rows of the position table before the first position.
OFFSET = 2


class Attention:
    """Projections, the query scaled beforehand, attention, output projection."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.heads, self.index = c.count("hidden_size"), c.count("num_attention_heads"), index
        bias = c.flag("enable_bias")
        self.k = build.linear("self_attn.k_proj", width, width, bias=bias)
        self.v = build.linear("self_attn.v_proj", width, width, bias=bias)
        self.q = build.linear("self_attn.q_proj", width, width, bias=bias)
        self.out = build.linear("self_attn.out_proj", width, width, bias=bias)
        self.dropout = c.rate("attention_dropout")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        q = ops.scale(self.q(x)).heads(self.heads)
        k = self.k(x)
        v = self.v(x)
        k, v = k.heads(self.heads), v.heads(self.heads)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(q, k, v, shared.mask, kind=context.attention, dropout=dropout)
        return self.out(out), weights


class Block:
    """Attention and a ReLU MLP, each with dropout and a residual; norms before them, or behind the sums."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, inner, bias = c.count("hidden_size"), c.count("ffn_dim"), c.flag("enable_bias")
        affine = c.flag("layer_norm_elementwise_affine")
        self.norm_first, self.dropout = c.flag("do_layer_norm_before"), c.rate("dropout")
        self.act = layers.find_activation(c.get("activation_function"))
        self.attention = Attention(c, build, index)
        self.attention_norm = LayerNorm(build, "self_attn_layer_norm", width, affine=affine)
        self.fc1 = build.linear("fc1", width, inner, bias=bias)
        self.fc2 = build.linear("fc2", inner, width, bias=bias)
        self.mlp_norm = LayerNorm(build, "final_layer_norm", width, affine=affine)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        if self.norm_first:
            x = self.attention_norm(x)
        x, weights = self.attention(x, shared, context)
        x = ops.dropout(x, self.dropout)
        x = ops.add(residual, x)
        if not self.norm_first:
            x = self.attention_norm(x)
        shape = x.shape
        x = ops.reshape(x, shape[0] * shape[1], shape[2])
        residual = x
        if self.norm_first:
            x = self.mlp_norm(x)
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        x = ops.dropout(x, self.dropout)
        x = ops.reshape(ops.add(residual, x), *shape)
        if not self.norm_first:
            x = self.mlp_norm(x)
        del weights  # held to the end, as in the real one
        return x


@family("opt")
class Opt(Decoder):
    """The recipe."""

    tasks = ("causal", "seq-cls")
    defaults: ClassVar = {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    }
    trunk = "model.decoder"

    @classmethod
    def longest(cls, c: Config) -> int:
        """Return the rows of the table of positions."""
        return c.count("max_position_embeddings")

    project_in: Linear | None = None
    project_out: Linear | None = None
    final_norm: LayerNorm | None = None

    def make(self, c: Config, build: Build) -> None:
        """Allocate the parameters; token embeddings are as wide as the blocks unless told."""
        if c.rate("layerdrop"):
            todo = "Set layerdrop to 0: a step that skips layers by chance has no one answer."
            raise Unsupported("OPT with layerdrop", value=c.get("layerdrop"), todo=todo)
        c.default("word_embed_proj_dim", c.count("hidden_size"))
        self.narrow = c.count("word_embed_proj_dim")
        super().make(c, build)

    def make_tokens(self, build: Build) -> Embedding:
        """Allocate the tokens' embeddings."""
        return build.embedding(self.tokens, self.vocab, self.narrow)

    def make_embeddings(self, c: Config, build: Build) -> None:
        """Allocate learned positions, the projections, and the final norm, which comes before the layers here."""
        width = self.width
        rows = c.count("max_position_embeddings") + OFFSET
        self.position_table = build.parameter("embed_positions.weight", rows, width)  # not to be adapted: PEFT fails
        if self.narrow != width:
            self.project_out = build.linear("project_out", width, self.narrow)
            self.project_in = build.linear("project_in", self.narrow, width)
        if c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm"):
            affine = c.flag("layer_norm_elementwise_affine")
            self.final_norm = LayerNorm(build, "final_layer_norm", width, affine=affine)

    def block(self, c: Config, build: Build, index: int) -> Block:
        """Make one layer."""
        return Block(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate nothing: see `make_embeddings`."""

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm and the projection out, where the model has them."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Project the tokens' embeddings and add those of the positions, [B, T, D], counted per sample."""
        tape, (batch, tokens) = ids.tape, ids.shape
        inputs = self.looked_up(ids, context)
        past = context.cache.length if context.cache is not None else 0
        if not context.padded:
            kept.append(tape.new((batch, past + tokens), FP32))
        numbers = tape.new((batch, past + tokens), INT64)
        shared = self.positions(inputs, ids, context)
        shifted = tape.new((batch, tokens), INT64)
        positions = ops.embedding(shifted, self.position_table)
        del shifted
        if self.project_in is not None:
            inputs = self.project_in(inputs)
        kept += [inputs, numbers, positions]
        return ops.add(inputs, positions), shared
