"""The card that a rehearsal runs on: one of our GPU data, or one that never runs out."""

from __future__ import annotations

import dataclasses

from whichlora_estimators.gpus import Gpu, find_gpu

UNLIMITED = "unlimited"
# What an unlimited card is but for its memory; compute capability decides which attention kernels run.
_LIKE = "a100-sxm-80gb"
_ENOUGH_BYTES = 2**42


def find_card(name: str) -> Gpu:
    """Return a card by any name that our GPU data knows, or the one called `unlimited`. Raises UnknownName.

    The unlimited card is an A100 (compute capability 8.0) with more memory than any workload takes: 4 TiB.
    """
    if name.casefold() != UNLIMITED:
        return find_gpu(name)
    like = find_gpu(_LIKE)
    return dataclasses.replace(
        like,
        slug=UNLIMITED,
        name=f"{like.name}, unlimited",
        aliases=(),
        shared_names=(),
        nominal_gb=_ENOUGH_BYTES / 1e9,
        total_bytes=_ENOUGH_BYTES,
        memory_basis="given",
        memory_source="no limit",
    )
