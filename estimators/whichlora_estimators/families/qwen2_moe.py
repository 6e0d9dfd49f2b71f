"""Qwen 2 and 1.5 with experts, one of them for all tokens (transformers/models/qwen2_moe, 5.23)."""

from __future__ import annotations

from collections.abc import Callable

from .. import attention
from ..layers import Build
from ..tape import Tensor
from .base import Config, Context, Positions, family
from .experts import SharedMixture, SparseBlock, sparse_kinds
from .llama import Qwen2
from .windows import WindowedPositions, some_layers


class Qwen2MoeBlock(SparseBlock):
    """A block whose MLP is a mixture with a shared expert."""

    mixture = SharedMixture


@family("qwen2_moe")
class Qwen2Moe(Qwen2):
    """Qwen 2 with experts."""

    defaults = {
        **Qwen2.defaults,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }
    aliases = {"qkv_bias": "attention_bias"}
    default_targets = ()

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return Qwen2MoeBlock(c, build, index, norm=self.norm)

    @classmethod
    def layer_kinds(cls, c: Config) -> list[object]:
        """Return each layer's window, and whether it has experts."""
        return sparse_kinds(c, super().layer_kinds(c))

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the windows: those of every other layer below `max_window_layers`, if the config wants any."""
        if not c.flag("use_sliding_window"):
            return {}
        return some_layers(c, lambda index: index % 2 == 0 and index < int(c.get("max_window_layers")))

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Return what the blocks take; a mask that no layer takes lives until the pass is over, but not in checkpoints."""
        x, shared = super().enter(ids, context, kept)
        assert isinstance(shared, WindowedPositions)
        if not self.windows and shared.windowed.mask is not None:
            kept.append(shared.windowed.mask)
            shared.windowed.mask = None
        return x, shared

    def windowed_mask(self, x: Tensor, ids: Tensor, context: Context) -> Tensor | None:
        """Make a mask of layers with a window even where there are none: its window is 0 unless the config wants any."""
        if self.windows:
            return super().windowed_mask(x, ids, context)
        batch, tokens = ids.shape
        if context.cache is None and not context.padded:
            attention.search_packed(x, batch, tokens)
        window = int(self.config.get("sliding_window") or 0) if self.config.flag("use_sliding_window") else 0
        keys = context.keys(tokens)
        return attention.windowed_mask(
            x, batch=batch, queries=tokens, keys=keys, window=window, padded=context.padded, kind=context.attention
        )
