"""Tell Transformers, on the null device, that a batch of one sample is not several samples in a row.

It asks whether all of the last entries of a comparison are zero. "All of them" is answered as the device is set to, but
of a single element PyTorch takes the comparison itself, which the device answers with no: packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODULE = "transformers.masking_utils"
_NAME = "find_packed_sequence_indices"


def patch(masking_utils: ModuleType, answer_bool: Callable[[bool], None]) -> None:
    """Answer the question of a batch of one with: not packed. Versions that never ask are left as they are."""
    ask = getattr(masking_utils, _NAME, None)
    if ask is None:
        return

    @functools.wraps(ask)
    def answer(position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if position_ids.shape[0] == 1:
            answer_bool(True)
        return ask(position_ids, *args, **kwargs)

    setattr(masking_utils, _NAME, answer)
