"""Time from the roofline: each launch's duration on a card, and a step on two lanes, host and device.

A matrix product is cut into tiles that the card's SMs work on in waves; everything else is bound by the bytes it moves.
The constants are few and mean something; `data/roofline.json` holds their values, what they were fitted on, and the
error on cards that were held out.

# m x n result, k summed over; all of it `batch` times
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain, pairwise
from math import ceil
from pathlib import Path
from typing import Any

from .decomposed import SVD, WAIT_S, svd_seconds
from .gpus import Gpu, all_gpus
from .tape import Kernel
from .tensor import WAITS

_DATA = Path(__file__).with_name("data") / "roofline.json"

#: Tiles of a result that libraries offer, long edge first (CUTLASS and cuBLAS kernel names, e.g. 256x128 and 64x32).
TILES = ((256, 128), (128, 128), (128, 64), (64, 64), (64, 32), (32, 32))
#: A product's k is split over SMs that would idle (split-k kernels), but into few parts and none shorter than this.
SHORTEST_SPLIT, MOST_SPLITS = 128, 16
#: Queries that one block of fused attention works on (FlashAttention 2, kBlockM of head widths up to 128).
ATTENTION_ROWS = 128
#: int8 tensor cores do twice the operations of fp16, from Turing on (NVIDIA's architecture whitepapers).
INT8_OVER_FP16 = 2.0
#: From here on, no published run shows tensor cores that the card's power limit slows down.
POWER_SUFFICES_FROM = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineConstants:
    """What the data sheet of a card does not say.

    Shares are of the rated FLOP/s or bandwidth. `flops_per_joule` is what tensor cores sustain for the card's power;
    the lower of the two counts. `tile_overhead` is the extra time of a tile of edges a and b over 1/a + 1/b, since
    operands come through shared memory. `wave_rounding` says how much of a last wave's idle SMs is lost (1: all of it),
    `product_start_s` what any product takes on top. `cached_share` of the L2 serves kernels that move little, at
    `cache_bytes_per_s_per_sm` for each SM, but no slower than memory. `vector_bandwidth_share` is what batched products
    with a single row reach, as eager attention of one new token. `host_s_per_launch` depends on the host and its Python:
    the mean over runs on servers that differ by a factor of two, `desktop_host_s_per_launch` that of machines with
    consumer cards; `recording_host_ratio` is how much longer a launch takes the host while autograd records or runs backward.
    """

    product_flops_share: float
    attention_flops_share: float
    flops_per_joule: float
    tile_overhead: float
    wave_rounding: float
    product_bandwidth_share: float
    vector_bandwidth_share: float
    product_start_s: float
    pointwise_bandwidth_share: float
    pointwise_floor_s: float
    cached_share: float
    cache_bytes_per_s_per_sm: float
    host_s_per_launch: float
    desktop_host_s_per_launch: float
    recording_host_ratio: float

    def launch_s(self, gpu: Gpu, *, recording: bool = False) -> float:
        """Return the seconds that the host of a card takes for a launch."""
        plain_s = self.desktop_host_s_per_launch if gpu.segment == "consumer" else self.host_s_per_launch
        return plain_s * self.recording_host_ratio if recording else plain_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneTimes:
    """A sequence of launches on two lanes: the host issues them one by one, the device executes them in order.

    `device_s` sums the kernels, `host_s` the launches; `total_s` ends with the last kernel, none of which starts before
    it was issued. `matmul_flops` counts a multiplication and an addition as two.
    """

    device_s: float
    host_s: float
    total_s: float
    matmul_flops: int
    moved_bytes: int
    launches: int


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return document


@cache
def default_constants() -> RooflineConstants:
    """Return the constants of `data/roofline.json`."""
    return RooflineConstants(**_document()["constants"])


def launch_seconds(gpu: Gpu, *, recording: bool = False) -> float:
    """Return the seconds that the host of a card takes for a launch: of the machines that we know for it, or the mean."""
    known = _document()["known_hosts"].get(gpu.slug)
    constants = default_constants()
    if known is None:
        return constants.launch_s(gpu, recording=recording)
    plain_s = float(known["launch_s"])
    return plain_s * constants.recording_host_ratio if recording else plain_s


def lane_times(
    kernels: Sequence[Kernel], gpu: Gpu, *, constants: RooflineConstants | None = None, recording: bool = False
) -> LaneTimes:
    """Lay launches on the two lanes of a card and its host; `recording` says that they are a training step's.

    Give other `constants` for another host or a calibrated card. Raises UnknownName for a product in an unknown dtype.
    """
    if constants is None:
        constants, launch_s = default_constants(), launch_seconds(gpu, recording=recording)
    else:
        launch_s = constants.launch_s(gpu, recording=recording)
    counts = Counter(kernels)
    roofline = Roofline(gpu, constants)
    durations = {kernel: roofline.kernel_s(kernel) for kernel in counts}
    lane = list(map(durations.__getitem__, kernels))
    waits: list[int] = []
    if any(kernel.dtype == WAITS for kernel in counts):
        waits = [number for number, kernel in enumerate(kernels, 1) if kernel.dtype == WAITS]
    return LaneTimes(
        device_s=sum(lane),
        host_s=len(lane) * launch_s,
        total_s=sum(_total_s(lane[start:stop], launch_s) for start, stop in pairwise([0, *waits, len(lane)])),
        matmul_flops=sum(2 * k.batch * k.m * k.n * k.k * times for k, times in counts.items()),
        moved_bytes=sum(k.moved_bytes * times for k, times in counts.items()),
        launches=len(lane),
    )


def _total_s(lane: list[float], launch_s: float) -> float:
    """Return when the last of these launches ends, or has been issued, the lanes being level at the start.

    Kernel i starts at the later of its issue and the end of the one before; so what the device waits for the host in
    total is the largest lead, over all i, of the issue of i over the device time of all before it.
    """
    if not lane:
        return 0.0
    before = accumulate(chain((0.0,), lane[:-1]))
    return sum(lane) + max(launch_s * number - done for number, done in enumerate(before, 1))


@cache
def _l2_of_chip(compute_capability: tuple[int, int], sm_count: int) -> int:
    """Return the L2 that cards of the same chip have, for a card that nobody lists it for; 0 where there are none."""
    alike = (gpu for gpu in all_gpus() if (gpu.compute_capability, gpu.sm_count) == (compute_capability, sm_count))
    return min((gpu.l2_bytes for gpu in alike if gpu.l2_bytes), default=0)


class Roofline:
    """A card's rates with the constants applied: how long each launch keeps the device busy."""

    def __init__(self, gpu: Gpu, constants: RooflineConstants | None = None) -> None:
        self.constants = constants = constants or default_constants()
        self.sm_count = gpu.sm_count
        self.rates = gpu.matmul_flops_per_s
        limited = gpu.power_w is not None and gpu.compute_capability < POWER_SUFFICES_FROM
        self.power_flops_per_s = gpu.power_w * constants.flops_per_joule if gpu.power_w and limited else float("inf")
        self.stream_bytes_per_s = gpu.hbm_bytes_per_s * constants.product_bandwidth_share
        self.vector_bytes_per_s = gpu.hbm_bytes_per_s * constants.vector_bandwidth_share
        self.cache_bytes_per_s = constants.cache_bytes_per_s_per_sm * gpu.sm_count
        self.pointwise_bytes_per_s = gpu.hbm_bytes_per_s * constants.pointwise_bandwidth_share
        self.cached_bytes = (gpu.l2_bytes or _l2_of_chip(gpu.compute_capability, gpu.sm_count)) * constants.cached_share

    def kernel_s(self, kernel: Kernel) -> float:
        """Return the seconds of one launch: the later of matrix work and memory. UnknownName for a product's dtype."""
        if not kernel.m:
            return self._pointwise_s(kernel.moved_bytes)
        if kernel.dtype == SVD:
            return kernel.batch * (svd_seconds(kernel.m) + 2 * WAIT_S)
        if kernel.fused:
            return self._attention_s(kernel)
        return self._product_s(kernel)

    def _pointwise_s(self, moved_bytes: int) -> float:
        if not moved_bytes:
            return 0.0  # no kernel: the host's time
        from_memory = (moved_bytes - self.cached_bytes) / self.pointwise_bytes_per_s
        from_cache = moved_bytes / max(self.pointwise_bytes_per_s, self.cache_bytes_per_s)
        return max(from_memory, from_cache, self.constants.pointwise_floor_s)

    def _product_s(self, kernel: Kernel) -> float:
        c = self.constants
        memory_s = kernel.moved_bytes / self._operand_bytes_per_s(kernel)
        sm_flops_per_s = self._flops_per_s(kernel.dtype, c.product_flops_share) / self.sm_count
        longer, shorter = max(kernel.m, kernel.n), min(kernel.m, kernel.n)
        # a split writes and reads fp32 parts of the result
        part_s = 8 * kernel.batch * kernel.m * kernel.n / max(self.stream_bytes_per_s, self.cache_bytes_per_s)
        best = float("inf")
        for a, b in TILES:
            tiles = kernel.batch * ceil(longer / a) * ceil(shorter / b)
            k_s = 2 * a * b * (1 + c.tile_overhead * (1 / a + 1 / b)) / sm_flops_per_s
            best = min(best, max(memory_s, self._waves(tiles) * k_s * kernel.k))
            splits = 2
            while tiles * splits <= self.sm_count and splits <= MOST_SPLITS:
                part_k = max(kernel.k / splits, SHORTEST_SPLIT)
                best = min(best, max(memory_s, self._waves(tiles * splits) * k_s * part_k) + splits * part_s)
                splits *= 2
        return best + c.product_start_s

    def _operand_bytes_per_s(self, kernel: Kernel) -> float:
        single_row = kernel.batch > 1 and kernel.m == 1
        return self.vector_bytes_per_s if single_row else self.stream_bytes_per_s

    def _attention_s(self, kernel: Kernel) -> float:
        c = self.constants
        memory_s = kernel.moved_bytes / self.stream_bytes_per_s
        if kernel.m == 1:  # one new token: the keys are split over the SMs, and bytes decide
            return memory_s + c.product_start_s
        sm_flops_per_s = self._flops_per_s(kernel.dtype, c.attention_flops_share) / self.sm_count
        blocks = kernel.batch * ceil(kernel.m / ATTENTION_ROWS)
        work_s = self._waves(blocks) * 2 * ATTENTION_ROWS * kernel.n * kernel.k / sm_flops_per_s
        return max(memory_s, work_s) + c.product_start_s

    def _waves(self, blocks: int) -> float:
        """Return how often every SM works: the last wave leaves some idle."""
        waves = blocks / self.sm_count
        return waves + self.constants.wave_rounding * (ceil(waves) - waves)

    def _flops_per_s(self, dtype: str, share: float) -> float:
        if dtype in ("int8", "uint8"):
            return INT8_OVER_FP16 * self._flops_per_s("fp16", share)
        rated = self.rates.for_dtype(dtype)
        by_power = float("inf") if rated == self.rates.fp32 else self.power_flops_per_s  # no tensor cores at work
        return min(rated * share, by_power)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSpan:
    """Seconds that are expected, where the measured value lies with probability `coverage`, and the evidence."""

    expected_s: float
    low_s: float
    high_s: float
    coverage: float
    evidence: str = "formula"

    def times(self, count: float) -> TimeSpan:
        """Return the span of so many such times in a row, all off by the same share."""
        return replace(self, expected_s=self.expected_s * count, low_s=self.low_s * count, high_s=self.high_s * count)

    def plus(self, other: TimeSpan) -> TimeSpan:
        """Return the span of both in a row, off together at the worst."""
        low_s, high_s = self.low_s + other.low_s, self.high_s + other.high_s
        return replace(self, expected_s=self.expected_s + other.expected_s, low_s=low_s, high_s=high_s)


def time_span(seconds: float, phase: str) -> TimeSpan:
    """Bound a predicted time of `train`, `prefill` or `decode` by what published runs on held-out cards showed.

    The quantiles of measured over predicted seconds are those of `data/roofline.json`: no run of the predicted card
    informed the prediction, and its host was not known.
    """
    fitted = _document()["fit"]["measured_over_predicted"]
    low, high = fitted["ratios"][phase]
    return TimeSpan(expected_s=seconds, low_s=seconds * low, high_s=seconds * high, coverage=fitted["coverage"])
