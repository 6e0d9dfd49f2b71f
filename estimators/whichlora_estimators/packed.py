"""When a 4-bit product reads the packed weight, and when the weight is dequantized for an ordinary product.

States _gemm_4bit_use_custom_cuda (bitsandbytes 0.50.2, backends/cuda/ops.py), which was tuned card by card: up to so many
rows of the input the packed weight is faster. Cards are told apart by compute capability and by how many of their
multiprocessors have a block of 64 outputs to work on, in waves.

# M rows of the input, N output width, K input width
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .tape import FP16, FP32, Dtype

#: From here on nothing reads the packed weight; up to there everything does.
_MOST_ROWS, _ALWAYS_ROWS = 1536, 4
#: Rows below which cards without matrix units for the dtype do.
_VECTOR_ROWS = 8
_BLOCK, _QUANTIZED_BLOCK = 64, 64
_SMALL_WEIGHT = 4 * 2**20
_T4, _A100, _ORIN, _A10 = (7, 5), (8, 0), (8, 7), (8, 6)
_HOPPER, _BLACKWELL, _THOR, _VOLTA = 9, 10, 11, 7
_RTX_50, _SPARK = (12, 0), (12, 1)


class Product(NamedTuple):
    """The shape of a weight on a card."""

    n: int
    k: int
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def blocks(self) -> int:
        """Count the blocks of outputs."""
        return -(-self.n // _BLOCK)

    @property
    def waves(self) -> float:
        """Return how often the blocks fill the card."""
        return self.blocks / self.multiprocessors

    @property
    def half_full(self) -> bool:
        """Say whether half of the multiprocessors, rounded down, have a block."""
        return self.blocks >= self.multiprocessors // 2

    @property
    def fast_memory(self) -> bool:
        """Say whether the card has HBM (Blackwell's data center cards have rules of their own)."""
        return self.capability == _A100 or self.capability[0] == _HOPPER


@lru_cache(maxsize=4096)
def reads_packed(rows: int, n: int, k: int, dtype: Dtype, capability: tuple[int, int], multiprocessors: int) -> bool:
    """Say whether a product [M, K] x [N, K] of that dtype reads the packed weight."""
    if rows > _MOST_ROWS or k % _QUANTIZED_BLOCK:
        return False
    if rows <= _ALWAYS_ROWS:
        return True
    if dtype is FP32 or capability < _T4 or (capability[0] == _VOLTA and dtype is not FP16):
        return rows < _VECTOR_ROWS
    p = Product(n, k, capability, multiprocessors)
    if capability == _ORIN or capability[0] == _THOR:
        return False
    if capability[0] == _BLACKWELL:
        return rows <= _blackwell_rows(p)
    if n * k < _SMALL_WEIGHT:
        return rows <= _small_weight_rows(p, rows)
    if rows < _VECTOR_ROWS:
        return not _loses_at_few_rows(p, rows)
    return rows <= _large_weight_rows(p)


def _blackwell_rows(p: Product) -> int:
    if p.waves >= 3:
        return 32
    return 8 if p.waves >= 1 and p.k < p.n else 0


def _small_weight_rows(p: Product, rows: int) -> int:
    if 2 * p.k < p.n:
        return _short_weight_rows(p)
    if p.capability == _A100 and p.waves <= 1 / 4:
        return 384 if p.k < p.n else 32 if p.waves <= 1 / 8 else 128
    if p.capability == _T4 and p.waves < 1 and rows > _VECTOR_ROWS:
        return 64
    if p.waves <= 1 / 4:
        return 32 if p.k < p.n or p.fast_memory else 23
    return 16 if p.waves <= 1 / 2 else 0


def _short_weight_rows(p: Product) -> int:
    """Return the rows for a weight of less than half as many inputs as outputs."""
    if p.fast_memory:
        few, many = (1536, 512) if p.capability == _A100 else (512, 320)
        return few if p.waves < 1 / 3 else many
    if p.capability == _T4:
        if p.waves >= 3 or p.k < 704:
            return 320
        return 64 if p.k >= 1024 else 96
    return 192 if p.waves < 1 and p.blocks * p.k > 320 * p.multiprocessors else 320


def _loses_at_few_rows(p: Product, rows: int) -> bool:
    hopper = p.capability[0] == _HOPPER
    if not p.fast_memory or rows == _ALWAYS_ROWS + 1 or p.blocks < (36 if hopper else 48):
        return False
    if p.k > p.n:
        return p.waves < 3 / 4
    if p.k < p.n:
        return False
    return 3 / 5 <= p.waves < 3 / 4 if hopper else p.waves < 3 / 5


def _large_weight_rows(p: Product) -> int:
    if p.capability == _T4:
        return (128 if p.k < p.n else 64) if p.waves >= 3 else 64 if p.half_full else 32
    if p.capability == _A100:
        return _a100_rows(p)
    if p.capability == _A10:
        return 128 if p.waves >= 1 else 64 if p.half_full else 16
    if p.capability[0] == _HOPPER:
        return _hopper_rows(p)
    if p.capability == _SPARK and p.waves >= 1:
        return 256
    return _rtx_50_rows(p) if p.capability == _RTX_50 else _other_rows(p)


def _a100_rows(p: Product) -> int:
    if p.waves >= 1:
        return 128 if p.waves >= 3 else 64 if p.k < p.n else 32
    if p.k >= 3 * p.n and p.waves > 1 / 4:
        return 0
    if p.k == p.n and p.blocks >= 48 and p.waves < 3 / 5:
        return 0
    if p.waves < 1 / 2 and (p.k <= p.n or p.waves >= 1 / 3):
        return 128 if p.k <= p.n else 0
    return 128 if p.half_full and p.k < p.n else 16


def _hopper_rows(p: Product) -> int:
    if p.waves >= 1:
        return 64 if p.waves >= 3 else 48 if p.waves >= 2 else 32
    if not p.half_full or (p.k >= p.n and p.waves < 3 / 4):
        return 0
    return 16


def _rtx_50_rows(p: Product) -> int:
    if p.waves >= 2:
        return 256 if p.waves >= 3 else 128
    if p.waves >= 4 / 5:
        return 96 if p.k >= p.n else 64
    if p.half_full:
        return 64 if 2 * p.k >= p.n and p.blocks >= 128 else 8
    return 16 if p.k > 2 * p.n and p.blocks > 64 else 8


def _other_rows(p: Product) -> int:
    """Return the rows on the RTX 40 series, its kin, and cards that nobody tuned for."""
    tall = p.k > 2 * p.n
    if p.waves >= 2:
        return 256 if p.waves >= 3 else 128
    if p.waves >= 4 / 5:
        if tall or p.blocks >= 200:
            return 128
        return 64 if p.k < p.n else 128 if p.multiprocessors >= 60 else 32
    if p.half_full:
        return 64 if tall else 8 if p.blocks >= 64 else 32
    if p.k > p.n and p.blocks <= 48:
        return 12 if p.k >= 3 * p.n else 10
    return 16 if tall or p.blocks < 48 else 8
