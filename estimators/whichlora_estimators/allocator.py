"""PyTorch's CUDA caching allocator in plain Python: what it holds, byte for byte, after any malloc and free.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.14.1, whose counters this equals after every event
(tests/estimators/test_allocator.py drives the real one). Not modelled: blocks that several streams use
(`record_stream`), private pools (CUDA graphs), and where CUDA places a segment: here, above all earlier ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .allocator_config import AllocatorConfig
from .allocator_pool import (
    ADDRESS,
    AFTER,
    AGE,
    BEFORE,
    FREE,
    IN_USE,
    PAGE_BYTES,
    SIZE,
    STATE,
    UNMAPPED,
    Addresses,
    Block,
    Pool,
    ceil_to,
)
from .errors import BadValue, WhichloraError
from .units import MIB, format_bytes

__all__ = ["BLOCK_BYTES", "AllocatorConfig", "AllocatorState", "CachingAllocator", "OutOfMemory", "replay"]

BLOCK_BYTES = 512  # every block is a multiple (c10/core/AllocatorConfig.h, kMinBlockSize)
_SMALL_BYTES = MIB  # the largest block of the small pool, whose segments are one page
_LARGE_BYTES = 10 * MIB  # from here on a request gets a segment of its own size
_UNLIMITED_BYTES = 2**42  # more than any card has and any block is


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorState:
    """The counters of `torch.cuda.memory_stats()`; peaks are since `reset_peaks`, counts since the beginning."""

    allocated_bytes: int
    allocated_peak_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int
    active_bytes: int
    inactive_split_bytes: int
    requested_bytes: int
    segment_count: int
    retry_count: int
    oom_count: int
    device_malloc_count: int
    device_free_count: int


class OutOfMemory(WhichloraError):
    """CUDA has too little left although everything cached was given back; `held` is the state at that moment."""

    def __init__(self, *, requested_bytes: int, segment_bytes: int, free_bytes: int, held: AllocatorState) -> None:
        self.requested_bytes = requested_bytes
        self.segment_bytes = segment_bytes
        self.free_bytes = free_bytes
        self.held = held
        super().__init__(
            f"out of device memory: {format_bytes(segment_bytes)} needed for a tensor of "
            f"{format_bytes(requested_bytes)}, {format_bytes(free_bytes)} free, "
            f"{format_bytes(held.allocated_bytes)} allocated, {format_bytes(held.reserved_bytes)} reserved",
            todo="Take a smaller batch, a shorter sequence or a larger GPU; where far more is reserved than allocated, "
            "set expandable_segments:True.",
        )


class CachingAllocator:
    """The allocator of one device in one process.

    `limit_bytes` is what CUDA can give this process, `device_bytes` (by default the same) what the card has in all:
    `per_process_memory_fraction` is a fraction of the latter. Without a limit nothing ever runs out.
    """

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        *,
        limit_bytes: int | None = None,
        device_bytes: int | None = None,
    ) -> None:
        config = config or AllocatorConfig()
        self._config = config
        self._expandable = config.expandable_segments
        self._max_split_bytes = config.max_split_size_bytes or _UNLIMITED_BYTES
        self._limit_bytes = _UNLIMITED_BYTES if limit_bytes is None else limit_bytes
        self._device_bytes = self._limit_bytes if device_bytes is None else device_bytes
        fraction = config.per_process_memory_fraction
        self._allowed_bytes = int(fraction * self._device_bytes) if fraction < 1 else _UNLIMITED_BYTES
        # torch collects garbage only where a fraction limits the process
        self._collects = config.garbage_collection_threshold > 0 and fraction < 1

        self._at = Addresses()
        self._pools: dict[int, tuple[Pool, Pool]] = {}  # stream -> small, large
        # handle of `malloc` -> block, requested bytes, pool
        self._given: dict[int, tuple[Block | None, int, Pool]] = {}
        self._handle = 0
        self._tensors: list[Block | None] = []  # the block of each tensor of `run`
        self._sizes_bytes: Sequence[int] = ()  # what it asked for
        self._rounded_bytes: list[int] = []  # and that in whole blocks
        self._device_used_bytes = 0

        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.reserved_bytes = self.reserved_peak_bytes = 0
        self.retry_count = self.oom_count = self.device_malloc_count = self.device_free_count = 0
        #: Segments that cudaMalloc gave; torch leaves expandable segments out.
        self.segment_count = 0

    @property
    def active_bytes(self) -> int:
        """Bytes of blocks in use: those allocated, as no block is used by several streams."""
        return self.allocated_bytes

    @property
    def requested_bytes(self) -> int:
        """Bytes that the live allocations asked for."""
        of_tensors = sum(size for size, block in zip(self._sizes_bytes, self._tensors, strict=True) if block)
        return of_tensors + sum(requested for _, requested, _ in self._given.values())

    @property
    def inactive_split_bytes(self) -> int:
        """Free bytes of segments that are partly in use; torch leaves expandable segments out."""
        if self._expandable:
            return 0
        free = (block for pool in self._all_pools() for block in pool.blocks())
        return sum(block[SIZE] for block in free if not self._at.is_whole(block))

    def state(self) -> AllocatorState:
        """Return every counter as it is now."""
        return AllocatorState(**{field.name: getattr(self, field.name) for field in fields(AllocatorState)})

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is held now (`torch.cuda.reset_peak_memory_stats`)."""
        self.allocated_peak_bytes = self.allocated_bytes
        self.reserved_peak_bytes = self.reserved_bytes

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        """Allocate and return a handle for `free`; no bytes take no memory. Raises OutOfMemory."""
        if size_bytes < 0:
            raise BadValue("cannot allocate", value=size_bytes, todo="Ask for 0 bytes or more.")
        self._handle += 1
        pool = self._pool_of(size_bytes, stream)
        block = self._allocate(size_bytes, pool) if size_bytes else None
        self._given[self._handle] = block, size_bytes, pool
        return self._handle

    def free(self, handle: int) -> None:
        """Put the block of a handle back into the cache. BadValue for a handle that is not live."""
        if handle not in self._given:
            raise BadValue("this handle is not live", value=handle, todo="Free once what malloc returned.")
        block, _, pool = self._given.pop(handle)
        if block is not None:
            self._free(block, pool)

    def empty_cache(self) -> None:
        """Give CUDA every segment, or page of an expandable segment, that is entirely free."""
        for pool in self._all_pools():
            for block in list(pool.blocks()):
                if self._expandable:
                    if freed := pool.unmap(block):
                        self._unreserve(freed)
                elif self._at.is_whole(block):
                    self._release(pool, block)

    def run(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Replay events on stream 0: `i` allocates tensor `i` of `sizes_bytes[i]` bytes and `~i` frees it.

        A tensor may be allocated again once freed, and a live one stays so for the next call, given the same sizes.
        Raises OutOfMemory, with the peaks so far in `held`; BadValue for a tensor freed that is not live.
        """
        if sizes_bytes is not self._sizes_bytes or len(sizes_bytes) != len(self._rounded_bytes):
            self._read_sizes(sizes_bytes)
        if 0 in self._rounded_bytes:
            events = [event for event in events if sizes_bytes[event if event >= 0 else ~event]]
        if self._config.max_split_size_bytes is None and not self._collects and not self._expandable:
            self._run_inlined(sizes_bytes, events)
            return
        for event in events:
            if event < 0:
                self._free(self._taken(~event), self._pool_of(sizes_bytes[~event], 0))
            else:
                self._tensors[event] = self._allocate(sizes_bytes[event], self._pool_of(sizes_bytes[event], 0))

    def run_twice(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Replay events that free all they allocate twice: of the second time, what can go another way than the first.

        A pool that got no new memory has the free blocks that it had before, and the same events find the same ones.
        """
        small, large = self._pools_of(0)
        before = small.growths, large.growths
        self.run(sizes_bytes, events)
        limited = min(self._limit_bytes, self._allowed_bytes) < _UNLIMITED_BYTES
        if self._collects or large.growths > before[1] or (limited and small.growths > before[0]):
            self.run(sizes_bytes, events)
        elif small.growths > before[0]:
            # its blocks are no larger than asked for, so that all sums are known but reserved
            is_small = [size <= _SMALL_BYTES for size in self._rounded_bytes]
            is_small += is_small[::-1]  # where a free, ~i, finds that of i
            self.run(sizes_bytes, [event for event in events if is_small[event]])

    def _read_sizes(self, sizes_bytes: Sequence[int]) -> None:
        smallest = min(sizes_bytes, default=0)
        if smallest < 0:
            raise BadValue("cannot allocate", value=smallest, todo="Ask for 0 bytes or more.")
        self._sizes_bytes, self._rounded_bytes = sizes_bytes, self._rounded(sizes_bytes)
        self._tensors += [None] * (len(sizes_bytes) - len(self._tensors))

    def _taken(self, tensor: int) -> Block:
        """Return the block of a tensor that is freed, which has none from then on. Raises BadValue if it has none now."""
        block, self._tensors[tensor] = self._tensors[tensor], None
        if block is None:
            todo = "Allocate every tensor before it is freed."
            raise BadValue("a tensor is freed that is not live", value=tensor, todo=todo)
        return block

    def _run_inlined(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:  # noqa: C901 - calls take too long
        """Do what `_allocate` and `_free` do, in one loop: an estimate replays tens of thousands of events."""
        small, large = self._pools_of(0)
        small_lists, small_sizes, large_lists, large_sizes = small.of_size, small.sizes, large.of_size, large.sizes
        tensors, rounded, large_slack, most_small = self._tensors, self._rounded_bytes, _SMALL_BYTES, _SMALL_BYTES
        allocated, peak = self.allocated_bytes, self.allocated_peak_bytes
        try:
            for event in events:
                if event < 0:  # free a block, as one with those that touch it
                    block = tensors[~event] or self._taken(~event)
                    tensors[~event] = None
                    _, size, _, before, after, _ = block
                    allocated -= size
                    if size <= most_small:
                        lists, sizes = small_lists, small_sizes
                    else:
                        lists, sizes = large_lists, large_sizes
                    if after[STATE]:
                        lists[after[SIZE]].remove(after)
                        block[SIZE] = size = size + after[SIZE]
                        block[AFTER] = after = after[AFTER]
                        after[BEFORE] = block
                    if before[STATE]:
                        lists[before[SIZE]].remove(before)
                        before[SIZE] = size = size + before[SIZE]
                        before[AFTER] = after
                        after[BEFORE] = block = before
                    else:
                        block[STATE] = FREE
                else:  # find a block, and split off what is not needed
                    size = rounded[event]
                    if size <= most_small:
                        lists, sizes, slack = small_lists, small_sizes, 0
                    else:
                        lists, sizes, slack = large_lists, large_sizes, large_slack
                    fitting = lists.get(size)
                    if not fitting:
                        index = bisect_left(sizes, size)
                        while index < len(sizes):
                            fitting = lists[sizes[index]]
                            if fitting:
                                break
                            del lists[sizes[index]], sizes[index]
                        else:
                            self.allocated_bytes, self.allocated_peak_bytes = allocated, peak
                            fitting = lists[self._grow(sizes_bytes[event], size, large if slack else small)[SIZE]]
                    tensors[event] = taken = fitting.pop(0)
                    taken[STATE] = IN_USE
                    rest = taken[SIZE] - size
                    if rest <= slack:
                        allocated += taken[SIZE]
                        if allocated > peak:
                            peak = allocated
                        continue
                    allocated += size
                    if allocated > peak:
                        peak = allocated
                    after = taken[AFTER]
                    block = [taken[ADDRESS] + size, rest, FREE, taken, after, 0]
                    taken[SIZE] = size
                    taken[AFTER] = after[BEFORE] = block
                    size = rest
                fitting = lists.get(size)
                if fitting is None:
                    lists[size] = [block]
                    insort(sizes, size)
                elif fitting:
                    insort(fitting, block)
                else:
                    fitting.append(block)
        finally:
            self.allocated_bytes, self.allocated_peak_bytes = allocated, peak

    def _allocate(self, requested_bytes: int, pool: Pool) -> Block:
        """Find or make a free block for a request of at least one byte, and split off what it does not need."""
        size = self._rounded([requested_bytes])[0]
        block = self._best_fit(size, pool) or self._grow(requested_bytes, size, pool)
        pool.remove(block)
        if block[SIZE] - size > pool.slack_bytes and (pool.slack_bytes == 0 or size < self._max_split_bytes):
            pool.add(pool.split(block, size))
        self.allocated_bytes += block[SIZE]
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return block

    def _free(self, block: Block, pool: Pool) -> None:
        self.allocated_bytes -= block[SIZE]
        pool.merge(block)

    def _rounded(self, sizes_bytes: Sequence[int]) -> list[int]:
        """Round requests up to whole blocks, or to a division of their power of two where the settings ask for it."""
        rounded = [size + BLOCK_BYTES - 1 & -BLOCK_BYTES for size in sizes_bytes]
        table = self._config.roundup_table
        if max(table) > 1:
            for index, size in enumerate(sizes_bytes):
                power = max(size.bit_length() - 1, 0)
                divisions = table[min(max(power - 20, 0), len(table) - 1)]
                if divisions > 1 and size > BLOCK_BYTES * divisions:
                    rounded[index] = ceil_to(size, 2**power // divisions)
        return rounded

    def _pools_of(self, stream: int) -> tuple[Pool, Pool]:
        if stream not in self._pools:
            at, device, page = self._at, self._device_bytes, self._config.large_segment_bytes
            slack = 0 if self._expandable else _SMALL_BYTES
            self._pools[stream] = (
                Pool(at, is_large=False, page_bytes=PAGE_BYTES, slack_bytes=0, device_bytes=device),
                Pool(at, is_large=True, page_bytes=page, slack_bytes=slack, device_bytes=device),
            )
        return self._pools[stream]

    def _pool_of(self, size_bytes: int, stream: int) -> Pool:
        """Return the pool of a request: the large one serves what does not fit the small one's blocks once rounded."""
        return self._pools_of(stream)[self._rounded([size_bytes])[0] > _SMALL_BYTES]

    def _all_pools(self) -> list[Pool]:
        return [pool for pools in self._pools.values() for pool in pools]

    def _best_fit(self, size: int, pool: Pool) -> Block | None:
        """Return the free block that fits best, or None."""
        self._at.lookups += pool.is_large
        block = pool.least_expandable(size) if self._expandable else next(pool.blocks(size), None)
        if block is None:
            return None
        # blocks of max_split_size_mb and more serve only requests of about their size
        found, limit = block[SIZE], self._max_split_bytes
        slack = self._config.max_non_split_rounding_bytes or self._config.large_segment_bytes
        if size < limit <= found or (size >= limit and found >= size + slack):
            return None
        return block

    # New memory from CUDA, and memory given back to it.

    def _grow(self, requested_bytes: int, size: int, pool: Pool) -> Block:
        """Get a free block from CUDA, giving back what is cached where that is needed."""
        segment = pool.page_bytes if size < _LARGE_BYTES else ceil_to(size, PAGE_BYTES)
        if self._collects:
            self._collect_garbage()
        block = self._new_block(size, segment, pool)
        if block is None and self._release_oversize(size, pool):
            block = self._new_block(size, segment, pool)
        if block is None:
            self.empty_cache()
            self.retry_count += 1
            block = self._new_block(size, segment, pool)
        if block is None:
            self.oom_count += 1
            left = self._limit_bytes - self._device_used_bytes
            raise OutOfMemory(
                requested_bytes=requested_bytes, segment_bytes=segment, free_bytes=left, held=self.state()
            )
        return block

    def _new_block(self, size: int, segment: int, pool: Pool) -> Block | None:
        """Add a segment, or a block of an expandable one, and return it; None where memory lacks."""
        pool.growths += 1
        if self.reserved_bytes + segment > self._allowed_bytes:
            return None
        if self._expandable:
            return self._expand(size, pool)
        if not self._reserve(segment):
            return None
        self.segment_count += 1
        block = self._at.segment(segment, IN_USE)
        pool.add(block)
        return block

    def _expand(self, size: int, pool: Pool) -> Block | None:
        """Map pages at the lowest address with room until a free block there is large enough; None without memory."""
        block = pool.place(size)
        while block[STATE] is UNMAPPED or block[SIZE] < size:
            hole, held = (block, 0) if block[STATE] is UNMAPPED else (block[AFTER], block[SIZE])
            mapped = ceil_to(min(size - held, hole[SIZE]), pool.page_bytes)
            if not self._reserve(mapped):
                return None
            block = pool.map(hole, mapped)
        return block

    def _reserve(self, size: int) -> bool:
        """Take memory from the device if it has as much."""
        used = self._device_used_bytes + ceil_to(size, PAGE_BYTES)
        if used > self._limit_bytes:
            return False
        self._device_used_bytes = used
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        self.device_malloc_count += 1
        return True

    def _unreserve(self, size: int) -> None:
        self._device_used_bytes -= ceil_to(size, PAGE_BYTES)
        self.reserved_bytes -= size
        self.device_free_count += 1

    def _release(self, pool: Pool, block: Block) -> None:
        """Give a whole segment back to CUDA."""
        pool.remove(block)
        self._unreserve(block[SIZE])
        self.segment_count -= 1

    def _release_oversize(self, size: int, pool: Pool) -> bool:
        """Give back one block of max_split_size_mb or more that is as large as `size`, or several that sum to it."""
        limit = self._config.max_split_size_bytes
        if limit is None or self._expandable:
            return False
        block = next(pool.blocks(size), None)  # it is not below the limit, or it would have served the request
        if block is not None:
            self._release(pool, block)
            return True
        released = 0
        while released < size and (block := pool.largest()) is not None and block[SIZE] >= limit:
            released += block[SIZE]
            self._release(pool, block)
        return released >= size

    def _collect_garbage(self) -> None:
        """Give back whole large segments, those unused for longer than the mean first, down to the threshold."""
        target = self.reserved_bytes - int(self._config.garbage_collection_threshold * self._allowed_bytes)
        pools = [pool for pool in self._all_pools() if pool.is_large]
        free = [(pool, block) for pool in pools for block in pool.blocks() if self._at.is_whole(block)]
        whole = [(self._at.lookups - block[AGE], pool, block) for pool, block in free]
        while target > 0 and whole:
            mean = sum(age for age, _, _ in whole) / len(whole)
            for age, pool, block in whole:
                if age >= mean:
                    target -= block[SIZE]
                    self._release(pool, block)
            whole = [(age, pool, block) for age, pool, block in whole if age < mean]


def replay(
    sizes_bytes: Sequence[int],
    events: Sequence[int],
    *,
    config: AllocatorConfig | None = None,
    limit_bytes: int | None = None,
) -> AllocatorState:
    """Replay the events of `CachingAllocator.run` on an empty allocator and return its counters.

    Raises OutOfMemory where `limit_bytes` of device memory do not suffice; BadValue as `run` does.
    """
    allocator = CachingAllocator(config, limit_bytes=limit_bytes)
    allocator.run(sizes_bytes, events)
    return allocator.state()
