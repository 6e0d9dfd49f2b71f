"""Random values for weights that were built without a checkpoint, in place and without a byte more.

A card multiplies zeros faster than numbers, and a run that meets NaN may skip steps. Values are only as good as that:
finite, and unlike each other.
"""

from __future__ import annotations

from typing import Any

_STD = 0.02


def give_values(model: Any, *, quantized: bool) -> None:
    """Fill every weight: matrices with normal numbers, norms with 1, biases with 0, packed codes with any.

    A `quantized` model was built without values at all: its buffers get some too. What is there of others is right.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter.data)
            _fill_scales(parameter)
        for buffer in model.buffers() if quantized else ():
            _fill_buffer(buffer)


def _fill(name: str, values: Any) -> None:
    import torch

    if values.dtype == torch.int8:
        values.random_(-127, 128)
    elif not values.is_floating_point():
        values.random_()  # 4-bit codes: every number stands for some weights
    elif values.dim() > 1:
        values.normal_(std=_STD)
    else:
        values.fill_(1.0 if name.endswith("weight") else 0.0)


def _fill_scales(parameter: Any) -> None:
    """Set what bitsandbytes multiplies its codes with, so that weights are about as large as normal ones."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and state.nested:
        state.absmax.random_()
        state.state2.absmax.fill_(_STD)
        state.offset.fill_(2 * _STD)
    elif state is not None:
        state.absmax.fill_(2 * _STD)
    if getattr(parameter, "SCB", None) is not None:
        parameter.SCB.fill_(2 * _STD)


def _fill_buffer(values: Any) -> None:
    """Fill frequencies and scales with a small number, positions with 0 (an index), masks with "shown"."""
    import torch

    if values.is_floating_point():
        values.fill_(_STD)
    else:
        values.fill_(values.dtype == torch.bool)
