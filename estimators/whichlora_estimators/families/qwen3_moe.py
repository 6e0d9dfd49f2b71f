"""Qwen 3 with experts (transformers/models/qwen3_moe, 5.23)."""

from __future__ import annotations

from collections.abc import Callable

from ..layers import Build
from ..tape import Tensor
from .base import Config, Context, Positions, family
from .experts import QWEN_STACKS, SparseBlock, sparse_kinds
from .llama import Qwen3
from .windows import all_layers


@family("qwen3_moe")
class Qwen3Moe(Qwen3):
    """Qwen 3 with experts."""

    always_masks_full = False
    defaults = {
        **Qwen3.defaults,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }
    aliases = {"num_local_experts": "num_experts"}
    default_targets = ()
    stack_names = QWEN_STACKS

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return SparseBlock(c, build, index, norm=self.norm)

    @classmethod
    def layer_kinds(cls, c: Config) -> list[object]:
        """Return each layer's window, and whether it has experts."""
        return sparse_kinds(c, super().layer_kinds(c))

    @classmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the windows: those of every layer, if the config wants any."""
        return all_layers(c) if c.flag("use_sliding_window") else {}
