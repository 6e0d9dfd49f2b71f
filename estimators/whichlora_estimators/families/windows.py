"""Layers that see a window of past tokens: their masks and what they keep of the cache.

States transformers/masking_utils.py (create_sliding_window_causal_mask) and cache_utils.py (DynamicSlidingWindowLayer),
both read in 5.23. A batch as long as the window needs a mask even where nothing is padded, which rules out flash
attention.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .. import attention
from ..layers import Build, rotary_tables
from ..tape import INT64, Tensor
from .base import Block, Config, Context, Positions, RotaryDecoder


@dataclass(slots=True, kw_only=True)
class WindowedPositions(Positions):
    """What full layers share, and what those with a window share."""

    windowed: Positions


class WindowedLayer:
    """A layer that takes what layers with a window share."""

    def __init__(self, layer: Block) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, shared: Positions, context: Context) -> Tensor | tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]."""
        assert isinstance(shared, WindowedPositions)
        return self.layer(x, shared.windowed, context)


class WindowedDecoder(RotaryDecoder):
    """A decoder some or all of whose layers see a window."""

    #: Whether a mask for full layers is made even where there are none of them.
    always_masks_full: ClassVar[bool] = False

    windows: Mapping[int, int]

    def make(self, c: Config, build: Build) -> None:
        """Allocate, then tell the layers with a window what they share."""
        super().make(c, build)
        self.windows = self.layer_windows(c)
        self.blocks = [WindowedLayer(block) if i in self.windows else block for i, block in enumerate(self.blocks)]

    @classmethod
    @abstractmethod
    def layer_windows(cls, c: Config) -> dict[int, int]:
        """Return the window of each layer that has one."""

    @classmethod
    def layer_kinds(cls, c: Config) -> list[object]:
        """Return each layer's window."""
        windows = cls.layer_windows(c)
        return [(kind, windows.get(index)) for index, kind in enumerate(super().layer_kinds(c))]

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make the masks, then cos and sin."""
        if context.cache is not None and not context.cache.plain:
            context.cache.windows = self.windows
        ids_of_positions = x.tape.new((1, ids.shape[1]), INT64)
        full = self.always_masks_full or len(self.windows) < len(self.blocks)
        mask = self.mask(x, ids, context) if full else None
        windowed = self.windowed_mask(x, ids, context)
        shared = self.with_tables(x, ids.shape[1], mask, windowed)
        del ids_of_positions
        return shared

    def with_tables(self, x: Tensor, tokens: int, mask: Tensor | None, windowed: Tensor | None) -> Positions:
        """Add cos and sin, the same for all layers."""
        cos, sin = rotary_tables(x, tokens, self.rotated)
        shared = Positions(cos=cos, sin=sin, mask=windowed)
        return WindowedPositions(cos=cos, sin=sin, mask=mask, windowed=shared)

    def windowed_mask(self, x: Tensor, ids: Tensor, context: Context) -> Tensor | None:
        """Make the mask of layers with a window (Transformers knows one window per model)."""
        if not self.windows:
            return None
        window = min(self.windows.values())
        batch, tokens = ids.shape
        keys, fixed = context.keys(tokens, window), context.cache is not None and context.cache.fixed
        if context.attention == "sdpa" and not context.padded and not x.tape.stack.masks_windows(self.model_type):
            return None
        packed = context.cache is None and not context.padded and attention.searches_packed(x, batch, tokens)
        return attention.windowed_mask(
            x,
            batch=batch,
            queries=tokens,
            keys=keys,
            window=window,
            padded=context.padded,
            kind=context.attention,
            needed=packed or (fixed and tokens == 1),
            first=context.is_prefill,
        )


def all_layers(c: Config) -> dict[int, int]:
    """Return the same window for every layer, where the config has one (Mistral, Phi-3, Starcoder2)."""
    window = c.optional("sliding_window")
    return {} if window is None else dict.fromkeys(range(c.count("num_hidden_layers")), int(window))


def some_layers(c: Config, slides: Callable[[int], bool]) -> dict[int, int]:
    """Return the window of the layers that `layer_types` names, or else of those that `slides`."""
    window = c.optional("sliding_window")
    if window is None:
        return {}
    kinds = c.get("layer_types")
    layers = range(c.count("num_hidden_layers"))
    return {i: int(window) for i in layers if (kinds[i] == "sliding_attention" if kinds else slides(i))}
