"""A prediction: an estimate, the interval that it is trusted to, its evidence, and the verdict for a card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

from whichlora_estimators.estimate import Estimate, estimate
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.stack import NEWEST_STACK, Stack
from whichlora_estimators.units import MIB
from whichlora_estimators.workload import Workload

#: By how much the CUDA context of a card was missed at worst when its own readings were held out
#: (whichlora_estimators/data/cuda_context.json; tests/estimators/test_gpus.py recomputes it).
CONTEXT_ERROR_BYTES = 103 * MIB


class Verdict(str, Enum):
    """Whether a workload runs on a card: `tight` where the interval straddles the limit."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does-not-fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the measured value lies with probability `coverage`."""

    low_bytes: int
    high_bytes: int
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """An estimate with the intervals of its allocated and process bytes, its verdict and its evidence."""

    estimate: Estimate
    allocated: Interval
    process: Interval
    verdict: Verdict
    evidence: str = "formula"


def predict(workload: Workload, gpu: Gpu, *, stack: Stack = NEWEST_STACK) -> Prediction:
    """Predict a workload on a card under some library versions.

    Raises UnknownName, BadValue or Unsupported for what has no formula.
    """
    found = estimate(workload, gpu, stack=stack)
    allocated = _interval("allocated", workload, found.allocated_peak_bytes)
    process = _with_context(_interval("reserved", workload, found.reserved_peak_bytes), found.context_bytes)
    needed_bytes = allocated.low_bytes + found.context_bytes
    return Prediction(
        estimate=found,
        allocated=allocated,
        process=process,
        verdict=judge(needed_bytes, process.high_bytes, gpu.total_bytes),
    )


def judge(least_bytes: int, most_bytes: int, limit_bytes: int) -> Verdict:
    """Compare what a workload needs with a limit: `least_bytes` if all goes well, `most_bytes` at the worst.

    The least is live bytes and context: PyTorch gives cached blocks back before it gives up.
    """
    if most_bytes <= limit_bytes:
        return Verdict.FITS
    return Verdict.TIGHT if least_bytes <= limit_bytes else Verdict.DOES_NOT_FIT


def reserved_range(workload: Workload, allocated_peak_bytes: int) -> tuple[int, int]:
    """Bound what PyTorch reserves for an allocated peak: live bytes at least, the allocator's usual slack at most.

    For searches that replay no allocator; `predict` does.
    """
    ratios = _ratios()["ratios"][workload.phase]
    low, high = ratios["allocated"][0], ratios["reserved_over_allocated"][1]
    return int(allocated_peak_bytes * low), int(allocated_peak_bytes * high)


def _with_context(reserved: Interval, context_bytes: int) -> Interval:
    return Interval(
        low_bytes=reserved.low_bytes + max(0, context_bytes - CONTEXT_ERROR_BYTES),
        high_bytes=reserved.high_bytes + context_bytes + CONTEXT_ERROR_BYTES,
        coverage=reserved.coverage,
    )


def _interval(counter: str, workload: Workload, predicted_bytes: int) -> Interval:
    table = _ratios()
    low, high = table["ratios"][workload.phase][counter]
    return Interval(
        low_bytes=int(predicted_bytes * low), high_bytes=int(predicted_bytes * high), coverage=table["coverage"]
    )


@cache
def _ratios() -> Any:
    """Quantiles of measured over predicted bytes on rehearsed workloads (data/formula_ratios.json says which)."""
    text = resources.files(__package__).joinpath("data/formula_ratios.json").read_text(encoding="utf-8")
    return json.loads(text)
