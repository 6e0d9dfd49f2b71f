"""The buffer that a sum over the rows of a matrix takes while it runs.

Source: setReduceConfig and ReduceConfig::global_memory_size in aten/src/ATen/native/cuda/Reduce.cuh (torch 2.14). Where
one block of threads would have too many values to add up, several blocks share an output, and every thread leaves its
partial sum in global memory.
"""

from __future__ import annotations

_THREADS = 512  # in a block, shared among the elements of a vector
_WARP = 32
_FEW_VALUES, _MANY_VALUES = 16, 256  # per thread

#: What of a card decides: its compute capability, and how many multiprocessors it has.
Card = tuple[tuple[int, int], int]
A100: Card = ((8, 0), 108)
#: Threads that a multiprocessor runs at once, where not 2048 (cccl, libcudacxx/include/cuda/__device/arch_traits.h).
_MOST_THREADS = 2048
_MOST_OFFSET = 2**31 - 1
_THREADS_OF = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (11, 0): 1536, (12, 0): 1536, (12, 1): 1536}


def column_sum_bytes(
    rows: int, columns: int, accumulator_bytes: int = 4, *, card: Card = A100, element_bytes: int = 4
) -> int:
    """Bytes of partial sums when [rows, columns] is summed to [columns]; 0 where each block finishes its own.

    Sums of 16-bit values are kept in fp32, and whether any of a column is set in a byte. What is too large for offsets of
    32 bits is summed half by half, one after the other (TensorIterator, with_32bit_indexing).
    """
    while rows > 1 and rows * columns * element_bytes > _MOST_OFFSET:
        rows = -(-rows // 2)
    capability, multiprocessors = card
    vector = next(width for width in (4, 2, 1) if columns % width == 0)
    threads = _THREADS // vector
    across = min(_last_power_of_two(columns // vector), threads)
    height = min(_last_power_of_two(rows), threads, threads // min(across, _WARP))
    width = min(across, threads // height)
    values = rows
    if values < height * _FEW_VALUES and values < _MANY_VALUES:
        return 0
    values = -(-values // height)
    blocks = -(-columns // (vector * width))
    wanted = multiprocessors * (_THREADS_OF.get(capability, _MOST_THREADS) // (width * height))
    if values < _MANY_VALUES or blocks > wanted:
        return 0
    shares = max(min(-(-wanted // blocks), -(-values // _FEW_VALUES)), -(-values // _MANY_VALUES))
    return accumulator_bytes * columns * shares * width * vector if shares > 1 else 0


def _last_power_of_two(count: int) -> int:
    return 1 << (max(count, 1).bit_length() - 1)
