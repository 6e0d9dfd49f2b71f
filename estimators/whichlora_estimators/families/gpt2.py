"""GPT-2: learned positions, fused qkv, dropout (transformers/models/gpt2, 5.23).

Its linear layers are Conv1D: weights stored [in, out], the same sizes as a linear layer's. Loading with bitsandbytes
quantizes them too (transformers/integrations/bitsandbytes.py), so they count as linear layers here.
"""

from __future__ import annotations

from typing import ClassVar

from .. import attention, layers, ops
from ..errors import Unsupported
from ..layers import Build, LayerNorm, Linear
from ..tape import INT64, Tensor
from .base import Config, Context, Decoder, Positions, family


class Attention:
    """One product for query, key and value, attention, output product, dropout."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.width, self.heads, self.index = c.count("n_embd"), c.count("n_head"), index
        self.qkv = _linear(build, "attn.c_attn", self.width, 3 * self.width)
        self.out = _linear(build, "attn.c_proj", self.width, self.width)
        self.dropout, self.residual_dropout = c.rate("attn_pdrop"), c.rate("resid_pdrop")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        q, k, v = (part.heads(self.heads) for part in ops.split_last(self.qkv(x), (self.width,) * 3))
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(q, k, v, shared.mask, kind=context.attention, dropout=dropout, upcast=False)
        out = self.out(out)
        return ops.dropout(out, self.residual_dropout), weights


def _linear(build: Build, name: str, n_in: int, n_out: int) -> Linear:
    layer = build.linear(name, n_in, n_out, bias=True)
    layer.transposed = not layer.quantized
    return layer


class Mlp:
    """dropout(project(act(widen(x))))."""

    def __init__(self, c: Config, build: Build) -> None:
        width = c.count("n_embd")
        inner = int(c.get("n_inner") or 4 * width)
        self.widen = _linear(build, "mlp.c_fc", width, inner)
        self.project = _linear(build, "mlp.c_proj", inner, width)
        self.act = layers.find_activation(c.get("activation_function"))
        self.dropout = c.rate("resid_pdrop")

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = self.widen(x)
        x = self.act(x)
        x = self.project(x)
        return ops.dropout(x, self.dropout)


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width = c.count("n_embd")
        self.norm_1 = LayerNorm(build, "ln_1", width)
        self.attention = Attention(c, build, index)
        self.norm_2 = LayerNorm(build, "ln_2", width)
        self.mlp = Mlp(c, build)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = self.norm_1(x)
        attended, weights = self.attention(x, shared, context)
        x = ops.add(attended, residual)
        residual = x
        x = self.norm_2(x)
        fed = self.mlp(x)
        x = ops.add(residual, fed)
        del attended, weights, fed  # held to the end, as in the real one
        return x


@family("gpt2")
class Gpt2(Decoder):
    """The recipe."""

    layers_key = "n_layer"
    width_key = "n_embd"
    token_head = "classifier"
    trunk, tokens, layers = "transformer", "wte", "h"
    default_targets = ("c_attn",)
    aliases: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    defaults: ClassVar = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
    }

    @classmethod
    def longest(cls, c: Config) -> int:
        """Return the rows of the table of positions."""
        return c.count("n_positions")

    def make_embeddings(self, c: Config, build: Build) -> None:
        """Allocate learned positions."""
        for flag in ("add_cross_attention", "reorder_and_upcast_attn"):
            if c.flag(flag):
                raise Unsupported(f"GPT-2 with {flag}", value=True, todo=f"Set {flag} to false.")
        self.places = build.embedding("wpe", c.count("n_positions"), self.width)
        self.dropout = c.rate("embd_pdrop")

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
        """Add the positions' embeddings, [1, T, D], and drop out."""
        inputs = self.looked_up(ids, context)
        numbers = ids.tape.new((1, ids.shape[1]), INT64)
        positions = self.places(numbers)
        x = ops.add(inputs, positions)
        kept += [inputs, numbers, positions]
        shared = self.positions(inputs, ids, context)
        return ops.dropout(x, self.dropout), shared
