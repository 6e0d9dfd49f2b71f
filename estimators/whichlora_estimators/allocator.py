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
from .allocator_pool import ADDRESS_BITS, ADDRESS_MASK, PAGE_BYTES, Addresses, Pool, ceil_to
from .errors import BadValue, WhichloraError
from .units import MIB, format_bytes

__all__ = ["AllocatorConfig", "AllocatorState", "CachingAllocator", "OutOfMemory", "replay"]

_BLOCK_BYTES = 512  # every block is a multiple
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

        self._addresses = Addresses(keep_ages=self._collects)
        self._pools: dict[int, tuple[Pool, Pool]] = {}  # stream -> small, large
        self._segments: dict[int, int] = {}  # address of a segment that cudaMalloc gave -> its size
        self._live: dict[int, tuple[int, int, int, Pool]] = {}  # handle -> address, block bytes, requested bytes, pool
        self._handle = 0
        self._device_used_bytes = 0

        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.reserved_bytes = self.reserved_peak_bytes = 0
        self.retry_count = self.oom_count = self.device_malloc_count = self.device_free_count = 0

    @property
    def active_bytes(self) -> int:
        """Bytes of blocks in use: those allocated, as no block is used by several streams."""
        return self.allocated_bytes

    @property
    def requested_bytes(self) -> int:
        """Bytes that the live allocations asked for."""
        return sum(requested for _, _, requested, _ in self._live.values())

    @property
    def inactive_split_bytes(self) -> int:
        """Free bytes of segments that are partly in use; torch leaves expandable segments out."""
        if self._expandable:
            return 0
        sizes = self._addresses.sizes
        return sum(size for address, size in sizes.items() if self._segments.get(address) != size)

    @property
    def segment_count(self) -> int:
        """Segments that cudaMalloc gave; torch leaves expandable segments out."""
        return len(self._segments)

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
        self._handle -= 1  # tensors of `run` are known by 0 and up
        if size_bytes:
            self._allocate(self._handle, size_bytes, stream)
        else:
            self._live[self._handle] = 0, 0, 0, self._pools_of(stream)[0]
        return self._handle

    def free(self, handle: int) -> None:
        """Put the block of a handle back into the cache. BadValue for a handle that is not live."""
        if handle not in self._live:
            raise BadValue("this handle is not live", value=handle, todo="Free once what malloc returned.")
        self._free(handle)

    def empty_cache(self) -> None:
        """Give CUDA every segment, or page of an expandable segment, that is entirely free."""
        for pool in self._all_pools():
            for key in list(pool.free):
                if self._expandable:
                    if freed := pool.unmap(key & ADDRESS_MASK):
                        self._unreserve(freed)
                elif self._is_whole(key):
                    self._release(pool, key)

    def run(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Replay events on stream 0: `i` allocates tensor `i` of `sizes_bytes[i]` bytes and `~i` frees it.

        A tensor may be allocated again once freed, and a live one stays so for the next call, given the same sizes.
        Raises OutOfMemory, with the peaks so far in `held`; BadValue for a tensor freed that is not live.
        """
        smallest = min(sizes_bytes, default=0)
        if smallest < 0:
            raise BadValue("cannot allocate", value=smallest, todo="Ask for 0 bytes or more.")
        if smallest == 0:
            events = [event for event in events if sizes_bytes[event if event >= 0 else ~event]]
        try:
            if self._config.max_split_size_bytes is None and not self._collects:
                self._run_inlined(sizes_bytes, events)
                return
            for event in events:
                if event < 0:
                    self._free(~event)
                else:
                    self._allocate(event, sizes_bytes[event], 0)
        except KeyError as error:
            todo = "Allocate every tensor before it is freed."
            raise BadValue("a tensor is freed that is not live", value=error.args[0], todo=todo) from None

    def _run_inlined(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Do what `_allocate` and `_free` do, in one loop: an estimate replays 10,000 events and should take 10 ms."""
        small, large = self._pools_of(0)
        live, sizes, starts = self._live, self._addresses.sizes, self._addresses.starts
        pop_live, pop_size, pop_start = live.pop, sizes.pop, starts.pop
        rounded, expandable = self._rounded(sizes_bytes), self._expandable
        allocated, peak = self.allocated_bytes, self.allocated_peak_bytes
        try:
            for event in events:
                if event < 0:
                    address, size, _, pool = pop_live(~event)
                    allocated -= size
                    free = pool.free
                    end = address + size
                    after = pop_size(end, 0)
                    if after:
                        del free[bisect_left(free, after << ADDRESS_BITS | end)]
                        end += after
                    before = pop_start(address, None)
                    if before is not None:
                        del free[bisect_left(free, address - before << ADDRESS_BITS | before)]
                        address = before
                    size = end - address
                    sizes[address] = size
                    starts[end] = address
                    insort(free, size << ADDRESS_BITS | address)
                    continue
                size = rounded[event]
                pool = small if size <= _SMALL_BYTES else large
                free = pool.free
                index = bisect_left(free, size << ADDRESS_BITS)
                if index == len(free):
                    self.allocated_bytes, self.allocated_peak_bytes = allocated, peak
                    index = self._grow(sizes_bytes[event], size, pool)
                elif expandable:
                    index = pool.least_expandable(index)
                address = free[index] & ADDRESS_MASK
                end = address + pop_size(address)
                rest = address + size
                if end - rest > pool.slack_bytes:
                    sizes[rest] = end - rest
                    starts[end] = rest
                    key = end - rest << ADDRESS_BITS | rest
                    if index and key < free[index - 1]:
                        del free[index]
                        insort(free, key)
                    else:
                        free[index] = key
                else:
                    size = end - address
                    del free[index], starts[end]
                live[event] = address, size, sizes_bytes[event], pool
                allocated += size
                if allocated > peak:
                    peak = allocated
        finally:
            self.allocated_bytes, self.allocated_peak_bytes = allocated, peak

    def _allocate(self, handle: int, requested_bytes: int, stream: int) -> None:
        """Find or make a free block for a request of at least one byte, and split off what it does not need."""
        size = self._rounded([requested_bytes])[0]
        pool = self._pools_of(stream)[size > _SMALL_BYTES]
        index = self._best_fit(size, pool)
        if index is None:
            index = self._grow(requested_bytes, size, pool)
        address = pool.free[index] & ADDRESS_MASK
        found = pool.take(address)
        if found - size > pool.slack_bytes and (pool.slack_bytes == 0 or size < self._max_split_bytes):
            pool.put(address + size, found - size)
            found = size
        self._live[handle] = address, found, requested_bytes, pool
        self.allocated_bytes += found
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)

    def _free(self, handle: int) -> None:
        address, size, _, pool = self._live.pop(handle)
        if size:
            self.allocated_bytes -= size
            pool.merge(address, size)

    def _rounded(self, sizes_bytes: Sequence[int]) -> list[int]:
        """Round requests up to whole blocks, or to a division of their power of two where the settings ask for it."""
        rounded = [size + _BLOCK_BYTES - 1 & -_BLOCK_BYTES for size in sizes_bytes]
        table = self._config.roundup_table
        if max(table) > 1:
            for index, size in enumerate(sizes_bytes):
                power = max(size.bit_length() - 1, 0)
                divisions = table[min(max(power - 20, 0), len(table) - 1)]
                if divisions > 1 and size > _BLOCK_BYTES * divisions:
                    rounded[index] = ceil_to(size, 2**power // divisions)
        return rounded

    def _pools_of(self, stream: int) -> tuple[Pool, Pool]:
        if stream not in self._pools:
            at, device, page = self._addresses, self._device_bytes, self._config.large_segment_bytes
            slack = 0 if self._expandable else _SMALL_BYTES
            self._pools[stream] = (
                Pool(at, is_large=False, page_bytes=PAGE_BYTES, slack_bytes=0, device_bytes=device),
                Pool(at, is_large=True, page_bytes=page, slack_bytes=slack, device_bytes=device),
            )
        return self._pools[stream]

    def _all_pools(self) -> list[Pool]:
        return [pool for pools in self._pools.values() for pool in pools]

    def _best_fit(self, size: int, pool: Pool) -> int | None:
        """Return the index of the free block that fits best, or None."""
        self._addresses.lookups += pool.is_large
        index = pool.index(0, size)
        if index == len(pool.free):
            return None
        if self._expandable:
            index = pool.least_expandable(index)
        # blocks of max_split_size_mb and more serve only requests of about their size
        found, limit = pool.free[index] >> ADDRESS_BITS, self._max_split_bytes
        slack = self._config.max_non_split_rounding_bytes or self._config.large_segment_bytes
        if size < limit <= found or (size >= limit and found >= size + slack):
            return None
        return index

    # New memory from CUDA, and memory given back to it.

    def _grow(self, requested_bytes: int, size: int, pool: Pool) -> int:
        """Get a free block from CUDA and return its index, giving back what is cached where that is needed."""
        segment = pool.page_bytes if size < _LARGE_BYTES else ceil_to(size, PAGE_BYTES)
        if self._collects:
            self._collect_garbage()
        address = self._new_block(size, segment, pool)
        if not address and self._release_oversize(size, pool):
            address = self._new_block(size, segment, pool)
        if not address:
            self.empty_cache()
            self.retry_count += 1
            address = self._new_block(size, segment, pool)
        if not address:
            self.oom_count += 1
            left = self._limit_bytes - self._device_used_bytes
            raise OutOfMemory(
                requested_bytes=requested_bytes, segment_bytes=segment, free_bytes=left, held=self.state()
            )
        return pool.index(address, self._addresses.sizes[address])

    def _new_block(self, size: int, segment: int, pool: Pool) -> int:
        """Add a segment, or a block of an expandable one, and return its address; 0 where memory lacks."""
        if self.reserved_bytes + segment > self._allowed_bytes:
            return 0
        if self._expandable:
            return self._expand(size, pool)
        if not self._reserve(segment):
            return 0
        address = self._addresses.new(segment)
        self._segments[address] = segment
        pool.put(address, segment)
        return address

    def _expand(self, size: int, pool: Pool) -> int:
        """Map pages at the lowest address with room until a free block there is large enough; 0 where memory lacks."""
        address = pool.place(size)
        while (held := self._addresses.sizes.get(address, 0)) < size:
            hole = address + held
            mapped = ceil_to(min(size - held, self._addresses.unmapped[hole]), pool.page_bytes)
            if not self._reserve(mapped):
                return 0
            pool.map(hole, mapped)
        return address

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

    def _is_whole(self, key: int) -> bool:
        return self._segments.get(key & ADDRESS_MASK) == key >> ADDRESS_BITS

    def _release(self, pool: Pool, key: int) -> None:
        """Give a whole segment back to CUDA."""
        self._unreserve(pool.take(key & ADDRESS_MASK))
        del self._segments[key & ADDRESS_MASK]

    def _release_oversize(self, size: int, pool: Pool) -> bool:
        """Give back one block of max_split_size_mb or more that is as large as `size`, or several that sum to it."""
        limit, free = self._config.max_split_size_bytes, pool.free
        if limit is None or self._expandable:
            return False
        index = pool.index(0, size)  # none from here on is below the limit, or it would have served the request
        if index < len(free):
            self._release(pool, free[index])
            return True
        released = 0
        while released < size and free and free[-1] >> ADDRESS_BITS >= limit:
            released += free[-1] >> ADDRESS_BITS
            self._release(pool, free[-1])
        return released >= size

    def _collect_garbage(self) -> None:
        """Give back whole large segments, those unused for longer than the mean first, down to the threshold."""
        target = self.reserved_bytes - int(self._config.garbage_collection_threshold * self._allowed_bytes)
        ages, now = self._addresses.ages or {}, self._addresses.lookups
        pools = [pool for pool in self._all_pools() if pool.is_large]
        whole = [
            (now - ages[key & ADDRESS_MASK], pool, key) for pool in pools for key in pool.free if self._is_whole(key)
        ]
        while target > 0 and whole:
            mean = sum(age for age, _, _ in whole) / len(whole)
            for age, pool, key in whole:
                if age >= mean:
                    target -= key >> ADDRESS_BITS
                    self._release(pool, key)
            whole = [(age, pool, key) for age, pool, key in whole if age < mean]


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
