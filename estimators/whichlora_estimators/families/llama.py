"""Llama and its kin: RMSNorm, rotary grouped-query attention, gated MLP (transformers/models/llama, mistral, qwen2, qwen3)."""

from __future__ import annotations

from collections.abc import Callable

from .. import attention, layers, ops
from ..layers import Build
from ..tape import Tensor
from .base import Config, Context, Positions, RotaryDecoder, family, head_width
from .windows import WindowedDecoder, all_layers, some_layers

Norm = Callable[[Tensor, Tensor], Tensor]


class Attention:
    """Projections, optional norms of query and key heads, rotation, attention, output projection."""

    def __init__(self, c: Config, build: Build, index: int, *, norm: Norm = layers.rms_norm) -> None:
        width, self.head_dim, self.index, self.norm = c.count("hidden_size"), head_width(c), index, norm
        self.heads, self.kv_heads = c.count("num_attention_heads"), c.count("num_key_value_heads")
        bias, out_bias = c.flag("attention_bias"), c.flag("attention_out_bias")
        self.q = build.linear("self_attn.q_proj", width, self.heads * self.head_dim, bias=bias)
        self.k = build.linear("self_attn.k_proj", width, self.kv_heads * self.head_dim, bias=bias)
        self.v = build.linear("self_attn.v_proj", width, self.kv_heads * self.head_dim, bias=bias)
        self.o = build.linear("self_attn.o_proj", self.heads * self.head_dim, width, bias=out_bias)
        self.head_norms = None
        if c.flag("head_norms"):
            self.head_norms = (
                build.parameter("self_attn.q_norm.weight", self.head_dim),
                build.parameter("self_attn.k_norm.weight", self.head_dim),
            )
        self.softcap = bool(c.get("attn_logit_softcapping"))
        self.dropout = c.rate("attention_dropout")
        self.output_dropout = 0.0

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> tuple[Tensor, Tensor | None]:
        """Attend [B, T, D] to itself and the cache; eager attention also returns its probabilities."""
        q, k, v = self.projected(x)
        if shared.cos is not None and shared.sin is not None:
            q, k = self.rotated(q, k, shared.cos, shared.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        dropout = self.dropout if context.training else 0.0
        out, weights = attention.attend(
            q, k, v, shared.mask, kind=context.attention, dropout=dropout, softcap=self.softcap
        )
        out = self.o(out)
        out = ops.dropout(out, self.output_dropout)
        return out, weights

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries [B, H, T, E], keys and values [B, K, T, E]."""
        q = self.q(x).heads(self.heads)
        if self.head_norms is not None:
            q = self.norm(q, self.head_norms[0])
        k = self.k(x).heads(self.kv_heads)
        if self.head_norms is not None:
            k = self.norm(k, self.head_norms[1])
        return q, k, self.v(x).heads(self.kv_heads)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by position."""
        turned = layers.partial_rotary(q, cos, sin)
        return turned, layers.partial_rotary(k, cos, sin)


class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    #: The config key of the activation.
    act_key = "hidden_act"

    def __init__(self, c: Config, build: Build, *, name: str = "mlp", inner_key: str = "intermediate_size") -> None:
        width, inner, bias = c.count("hidden_size"), c.count(inner_key), c.flag("mlp_bias")
        self.act = layers.find_activation(c.get(self.act_key, "silu"))
        self.gate = build.linear(f"{name}.gate_proj", width, inner, bias=bias)
        self.up = build.linear(f"{name}.up_proj", width, inner, bias=bias)
        self.down = build.linear(f"{name}.down_proj", inner, width, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        return self.down(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate(x))
        return ops.mul(gate, self.up(x))


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Config, build: Build, index: int, *, norm: Norm = layers.rms_norm) -> None:
        self.norm = norm
        self.attention = Attention(c, build, index, norm=norm)
        self.mlp = self.make_mlp(c, build, index)
        width = c.count("hidden_size")
        self.norm_in = build.parameter("input_layernorm.weight", width)
        self.norm_mid = build.parameter("post_attention_layernorm.weight", width)

    def make_mlp(self, c: Config, build: Build, index: int) -> Callable[[Tensor], Tensor]:
        """Make what follows attention."""
        return GatedMlp(c, build)

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        residual = x
        x = self.norm(x, self.norm_in)
        x, weights = self.attention(x, shared, context)  # weights live until the layer ends, as they do in the real one
        x = ops.add(residual, x)
        residual = x
        x = self.norm(x, self.norm_mid)
        x = self.mlp(x)
        x = ops.add(residual, x)
        del weights
        return x


@family("llama")
class Llama(RotaryDecoder):
    """The recipe that the others vary."""

    defaults = {"mlp_bias": False, "attention_bias": False, "tie_word_embeddings": False}
    norm = staticmethod(layers.rms_norm)

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return Block(c, build, index, norm=self.norm)

    def make(self, c: Config, build: Build) -> None:
        """Fill in what the config leaves to its class, then allocate."""
        self.complete(c)
        super().make(c, build)

    def complete(self, c: Config) -> None:
        """Derive config values that the class computes: as many key-value heads as heads, unless told."""
        c.default("num_key_value_heads", c.get("num_attention_heads"))
        c.default("attention_out_bias", c.get("attention_bias"))

    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm and the rotary frequencies."""
        self.final_norm = build.parameter("norm.weight", self.width)
        self.make_rotary(c, build)

    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""
        return self.norm(x, self.final_norm)


class WindowedLlama(WindowedDecoder, Llama):
    """Llama some of whose layers may see a window."""

    always_masks_full = True

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the windows: those of the layers from `max_window_layers` on, if the config wants any."""
        if not c.flag("use_sliding_window"):
            return {}
        return some_layers(c, lambda index: index >= int(c.get("max_window_layers")))


@family("qwen2")
class Qwen2(WindowedLlama):
    """Llama with biases on query, key and value."""

    defaults = {
        **Llama.defaults,
        "attention_bias": True,
        "attention_out_bias": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }


@family("qwen3")
class Qwen3(WindowedLlama):
    """Llama with a norm of each query and key head."""

    defaults = {
        **Llama.defaults,
        "head_norms": True,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }


@family("mistral")
class Mistral(WindowedDecoder, Llama):
    """Llama all of whose layers see the window, where the config has one."""

    defaults = {**Llama.defaults, "num_key_value_heads": 8, "sliding_window": 4096}

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the window of every layer."""
        return all_layers(c)
