"""StableLM: Llama's MLP between layer norms, a quarter of each head rotated (transformers/models/stablelm, 5.23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .. import ops
from ..layers import Build, LayerNorm
from ..tape import Tensor
from .base import Config, Context, Positions, RotaryDecoder, family
from .llama import GatedMlp
from .phi import Norm, PhiAttention, rotary_columns


class HeadNorms:
    """A layer norm without bias for each head, on [B, H, T, E]."""

    def __init__(self, build: Build, name: str, heads: int, width: int) -> None:
        self.weights = [build.parameter(f"{name}.norms.{head}.weight", width) for head in range(heads)]

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise head by head, each from a copy in memory order, and put the heads together again."""
        heads = ops.single_heads(x)
        return ops.concat([ops.layer_norm_of_view(h, w, None) for h, w in zip(heads, self.weights, strict=True)], 1)


class StableLmAttention(PhiAttention):
    """As in Phi, without biases (or without that of the output), with norms that differ from head to head."""

    output_name = "o_proj"

    def make_head_norms(self, c: Config, build: Build) -> tuple[Norm, Norm]:
        """Allocate the norms of query and key heads."""
        q = HeadNorms(build, "self_attn.q_layernorm", self.heads, self.head_dim)
        return q, HeadNorms(build, "self_attn.k_layernorm", self.kv_heads, self.head_dim)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [B, H, T, E], keys and values [B, K, T, E]: all projections before any is seen as heads."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q.heads(self.heads), k.heads(self.kv_heads), v.heads(self.kv_heads)


class StableLmBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)); or both branches on one norm."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        self.attention = StableLmAttention(c, build, index)
        self.mlp = GatedMlp(c, build)
        width = c.count("hidden_size")
        self.norm_in = LayerNorm(build, "input_layernorm", width)
        parallel = c.flag("use_parallel_residual")
        self.norm_mid = None if parallel else LayerNorm(build, "post_attention_layernorm", width)
        self.dropout = c.rate("hidden_dropout")

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]; what attention gave lives as long as the layer runs."""
        residual = x
        x = self.norm_in(x)
        attended, _weights = self.attention(x, shared, context)
        if self.norm_mid is None:
            fed = ops.dropout(self.mlp(x), self.dropout)
            return ops.add(ops.add(residual, attended), fed)
        residual = ops.add(residual, attended)
        fed = ops.dropout(self.mlp(self.norm_mid(residual)), self.dropout)
        return ops.add(residual, fed)


@family("stablelm")
class StableLm(RotaryDecoder):
    """Llama's frame with layer norms."""

    token_dropout = 0.0
    defaults: ClassVar = {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
    }

    def make(self, c: Config, build: Build) -> None:
        """Say which layers have biases, then allocate."""
        c.force("attention_bias", c.flag("use_qkv_bias"))
        c.force("head_dim", c.count("hidden_size") // c.count("num_attention_heads"))
        for key in ("attention_out_bias", "mlp_bias"):
            c.force(key, False)
        super().make(c, build)

    def rotary_width(self, c: Config) -> int:
        """Return how many columns of a head are rotated."""
        return rotary_columns(c)

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return StableLmBlock(c, build, index)

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm and the rotary frequencies."""
        self.final_norm = LayerNorm(build, "norm", self.width)
        self.make_rotary(c, build)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.final_norm(x)
