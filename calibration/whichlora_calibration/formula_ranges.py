"""The formula's own intervals: of bytes as rehearsals showed them, of times as published runs on held-out cards did."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from whichlora_estimators.roofline import time_span
from whichlora_estimators.units import MIB

Bounds = tuple[float, float]

#: By how much the CUDA context of a card was missed at worst when its own readings were held out
#: (whichlora_estimators/data/cuda_context.json; tests/estimators/test_gpus.py recomputes it).
CONTEXT_ERROR_BYTES = 103 * MIB


def rehearsed_range(counter: str, phase: str) -> Bounds:
    """Return quantiles of measured over predicted bytes, or of `reserved_over_allocated`, on rehearsed workloads."""
    low, high = _ratios()["ratios"][phase][counter]
    return low, high


def rehearsed_coverage() -> float:
    """Return the share of rehearsed workloads within their range."""
    coverage: float = _ratios()["coverage"]
    return coverage


def with_context(reserved: tuple[int, int], context_bytes: int) -> tuple[int, int]:
    """Return the range of process bytes: that of reserved bytes, and the context with its own error."""
    low, high = reserved
    return low + max(0, context_bytes - CONTEXT_ERROR_BYTES), high + context_bytes + CONTEXT_ERROR_BYTES


def own_bounds(target: str, phase: str, predicted: Mapping[str, float]) -> Bounds:
    """Return the formula's own interval of a counter or time: logarithms of its ends over what is predicted.

    `predicted` are bytes and seconds by target; of a time the ratio is that of any length.
    """
    if target in ("allocated", "reserved"):
        low, high = rehearsed_range(target, phase)
    elif target == "process":
        reserved, process = int(predicted["reserved"]), int(predicted["process"])
        ends = with_context(_scaled(reserved, rehearsed_range("reserved", phase)), process - reserved)
        low, high = (each / process for each in ends)
    else:
        span = time_span(1.0, "train" if target == "step" else target)
        low, high = span.low_s, span.high_s
    return math.log(low), math.log(high)


def _scaled(expected_bytes: int, ratios: Bounds) -> tuple[int, int]:
    return int(expected_bytes * ratios[0]), int(expected_bytes * ratios[1])


@cache
def _ratios() -> Any:
    """Read the quantiles (data/formula_ratios.json says of which workloads)."""
    text = resources.files(__package__).joinpath("data/formula_ratios.json").read_text(encoding="utf-8")
    return json.loads(text)
