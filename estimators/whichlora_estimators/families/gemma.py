"""Gemma 1 to 3 (text): embeddings scaled, norms that add 1 to their weight, heads wider than their share of the width.

States transformers/models/gemma, gemma2 and gemma3 (5.23). Gemma 2 caps attention scores and logits by tanh; SDPA
cannot, so Transformers runs it eagerly. Gemma 2 and 3 norm each branch before and after, and half or most of their
layers see a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from .. import layers, ops
from ..errors import Unsupported
from ..layers import Build, Embedding, rotary_tables
from ..tape import Tensor
from .base import Config, Context, Positions, family
from .llama import Attention, GatedMlp, Llama
from .windows import WindowedDecoder, WindowedPositions, some_layers


@family("gemma")
class Gemma(Llama):
    """Llama with Gemma's norm and a scaled embedding whose weight the head shares."""

    defaults: ClassVar = {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    norm = staticmethod(layers.gemma_norm)

    def make(self, c: Config, build: Build) -> None:
        """Refuse what sees the future too, then allocate."""
        if c.flag("use_bidirectional_attention"):
            todo = "Only causal attention of this architecture is predicted."
            raise Unsupported("bidirectional attention", value=c.get("model_type"), todo=todo)
        super().make(c, build)

    def make_embeddings(self, c: Config, build: Build) -> None:
        """Allocate the scale of the embedding."""
        self.scale = build.buffer(1)

    def make_tokens(self, build: Build) -> Embedding:
        """Allocate the tokens' embeddings, which are scaled."""
        return build.embedding(self.tokens, self.vocab, self.width, scaled=True)


class GemmaMlp(GatedMlp):
    """That of Gemma 2 and 3, whose activation has another key."""

    act_key = "hidden_activation"


class SandwichBlock:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, c: Config, build: Build, attention: Attention) -> None:
        self.attention = attention
        self.mlp = GemmaMlp(c, build)
        width = c.count("hidden_size")
        self.norm_in = build.parameter("input_layernorm.weight", width)
        self.norm_attended = build.parameter("post_attention_layernorm.weight", width)
        self.norm_mid = build.parameter("pre_feedforward_layernorm.weight", width)
        self.norm_out = build.parameter("post_feedforward_layernorm.weight", width)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = layers.gemma_norm(x, self.norm_in)
        x, _weights = self.attention(x, shared, context)  # lives until the layer ends, as in the real one
        x = layers.gemma_norm(x, self.norm_attended)
        x = ops.add(residual, x)
        residual = x
        x = layers.gemma_norm(x, self.norm_mid)
        x = self.mlp(x)
        x = layers.gemma_norm(x, self.norm_out)
        return ops.add(residual, x)


class WindowedGemma(WindowedDecoder, Gemma):
    """What Gemma 2 and 3 have in common: windows, and logits that may be capped."""

    always_masks_full = True

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate as Llama does, and see whether logits are capped."""
        super().make_final(c, build)
        self.capped = bool(c.optional("final_logit_softcapping"))

    def scores(self, hidden: Tensor) -> Tensor:
        """Apply the head and cap its logits: divide, tanh, multiply."""
        logits = self.head(hidden)
        if self.capped:
            logits = ops.scale(logits)
            logits = ops.activation_of_result(logits)
            logits = ops.scale(logits)
        return logits


@family("gemma2")
class Gemma2(WindowedGemma):
    """Every other layer, from the first on, sees a window."""

    defaults: ClassVar = {
        **Gemma.defaults,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        attention = Attention(c, build, index, norm=self.norm)
        attention.softcap = bool(c.optional("attn_logit_softcapping"))
        return SandwichBlock(c, build, attention)

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the windows: those of the layers 0, 2, 4 ..., unless `layer_types` says otherwise."""
        return some_layers(c, lambda index: index % 2 == 0)

    def backbone(self, ids: Tensor, context: Context) -> Tensor:
        """Run with eager attention, Transformers' choice for this model whatever is the default elsewhere."""
        return super().backbone(ids, replace(context, attention="eager"))


class Gemma3Attention(Attention):
    """Attention with norms of query and key heads, made after all three projections."""

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [B, H, T, E], keys and values [B, K, T, E]."""
        assert self.head_norms is not None
        q, k = self.q(x).heads(self.heads), self.k(x).heads(self.kv_heads)
        v = self.v(x).heads(self.kv_heads)
        q = self.norm(q, self.head_norms[0])
        k = self.norm(k, self.head_norms[1])
        return q, k, v


@family("gemma3_text")
class Gemma3(WindowedGemma):
    """Five layers with a window, then one without; each kind has rotary tables of its own."""

    tasks = ("causal", "seq-cls")
    defaults: ClassVar = {
        **Gemma2.defaults,
        "vocab_size": 262208,
        "head_norms": True,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        attention = Gemma3Attention(c, build, index, norm=self.norm)
        attention.softcap = False  # the config may name a cap, but this model's attention is never given it
        return SandwichBlock(c, build, attention)

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the windows: those of all layers but each sixth, unless the config says otherwise."""
        pattern = c.count("sliding_window_pattern")
        return some_layers(c, lambda index: (index + 1) % pattern != 0)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate as Llama does, the rotary frequencies once more for layers with a window."""
        super().make_final(c, build)
        self.local_frequencies = build.buffer(self.rotated // 2), build.buffer(self.rotated // 2)

    def with_tables(self, x: Tensor, tokens: int, mask: Tensor | None, windowed: Tensor | None) -> Positions:
        """Add cos and sin, other ones for layers with a window."""
        local_cos, local_sin = rotary_tables(x, tokens, self.rotated)
        local = Positions(cos=local_cos, sin=local_sin, mask=windowed)
        if len(self.windows) == len(self.blocks):
            return WindowedPositions(windowed=local)
        cos, sin = rotary_tables(x, tokens, self.rotated)
        return WindowedPositions(cos=cos, sin=sin, mask=mask, windowed=local)
