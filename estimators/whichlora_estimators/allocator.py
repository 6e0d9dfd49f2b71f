"""PyTorch's CUDA caching allocator in plain Python: what it holds, byte for byte, after any malloc and free.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.14.1, whose counters this equals after every event
(tests/estimators/test_allocator.py drives the real one). Not modelled: blocks that several streams use
(`record_stream`), private pools (CUDA graphs), and where CUDA places a segment: here, above all earlier ones.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .allocator_config import AllocatorConfig
from .errors import BadValue, WhichloraError
from .units import MIB, format_bytes

__all__ = ["AllocatorConfig", "AllocatorState", "CachingAllocator", "OutOfMemory", "replay"]

_BLOCK_BYTES = 512  # every block is a multiple
_SMALL_BYTES = MIB  # the largest block of the small pool, whose segments are one page
_PAGE_BYTES = 2 * MIB  # what CUDA hands out, and most segments, are multiples
_LARGE_BYTES = 10 * MIB  # from here on a request gets a segment of its own size
_UNLIMITED_BYTES = 2**42  # more than any card has and any block is

# A free block is known by one integer, its size above its address: sorted, these are in PyTorch's order of best fit.
_ADDRESS_BITS = 56
_ADDRESS_MASK = 2**_ADDRESS_BITS - 1

_Live = tuple[int, int, int, list[int]]  # address, block bytes, requested bytes, free list of the pool


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


class _Pool:
    """The free blocks of one stream, small (up to 1 MiB) or large."""

    __slots__ = ("bases", "free", "is_large", "page_bytes", "slack_bytes", "span_bytes", "unmapped")

    def __init__(self, *, is_large: bool, page_bytes: int, slack_bytes: int, device_bytes: int) -> None:
        self.is_large = is_large
        self.page_bytes = page_bytes  # the segment of a request below 10 MiB, and what an expandable segment grows by
        self.slack_bytes = slack_bytes  # a remainder up to this stays with its block
        self.span_bytes = _ceil(device_bytes + device_bytes // 8, page_bytes)  # addresses of an expandable segment
        self.free: list[int] = []  # keys, ascending
        self.bases: list[int] = []  # addresses of the expandable segments, ascending
        self.unmapped: list[int] = []  # addresses of their unmapped ranges, ascending


class CachingAllocator:
    """The allocator of one device in one process.

    `limit_bytes` is what CUDA can give this process, `device_bytes` (by default the same) what the card has in all:
    `per_process_memory_fraction` is a fraction of the latter. No limit means that nothing ever runs out.
    """

    __slots__ = (
        "_ages",
        "_allowed_bytes",
        "_config",
        "_device_bytes",
        "_device_used_bytes",
        "_expandable",
        "_handle",
        "_limit_bytes",
        "_live",
        "_lookups",
        "_max_split_bytes",
        "_next_address",
        "_pools",
        "_segments",
        "_sizes",
        "_starts",
        "_unmapped",
        "allocated_bytes",
        "allocated_peak_bytes",
        "device_free_count",
        "device_malloc_count",
        "oom_count",
        "reserved_bytes",
        "reserved_peak_bytes",
        "retry_count",
    )

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
        self._allowed_bytes = _UNLIMITED_BYTES
        if config.per_process_memory_fraction < 1:
            self._allowed_bytes = int(config.per_process_memory_fraction * self._device_bytes)
        # PyTorch collects garbage only where a fraction limits the process
        collects = config.garbage_collection_threshold > 0 and config.per_process_memory_fraction < 1
        self._ages: dict[int, int] | None = {} if collects else None  # address of a free block -> lookups until then
        self._lookups = 0

        self._pools: dict[int, tuple[_Pool, _Pool]] = {}  # stream -> small, large
        self._live: dict[int, _Live] = {}
        self._sizes: dict[int, int] = {}  # address of a free block -> its size
        self._starts: dict[int, int] = {}  # end of a free block -> its address
        self._unmapped: dict[int, int] = {}  # address of an unmapped range of an expandable segment -> its size
        self._segments: dict[int, int] = {}  # address of a segment that cudaMalloc gave -> its size
        self._next_address = _PAGE_BYTES
        self._device_used_bytes = 0
        self._handle = 0

        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.reserved_bytes = self.reserved_peak_bytes = 0
        self.retry_count = self.oom_count = self.device_malloc_count = self.device_free_count = 0

    @property
    def active_bytes(self) -> int:
        """Bytes of blocks in use: without streams that share them, those allocated."""
        return self.allocated_bytes

    @property
    def requested_bytes(self) -> int:
        """Bytes that the live allocations asked for."""
        return sum(live[2] for live in self._live.values())

    @property
    def inactive_split_bytes(self) -> int:
        """Free bytes that cannot go back to CUDA, since their segment is in use; expandable ones do not count."""
        if self._expandable:
            return 0
        whole = sum(size for address, size in self._sizes.items() if self._segments.get(address) == size)
        return sum(self._sizes.values()) - whole

    @property
    def segment_count(self) -> int:
        """Segments from cudaMalloc; expandable ones do not count."""
        return len(self._segments)

    def state(self) -> AllocatorState:
        """Return every counter as it is now."""
        return AllocatorState(**{name: getattr(self, name) for name in AllocatorState.__slots__})

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
            self._live[self._handle] = self._allocate(size_bytes, stream)
        return self._handle

    def free(self, handle: int) -> None:
        """Put the block of a handle back into the cache. BadValue where it is not live."""
        live = self._live.pop(handle, None)
        if live:
            self._free(live)

    def empty_cache(self) -> None:
        """Give CUDA every segment, or page of an expandable segment, that is entirely free."""
        for pools in self._pools.values():
            for pool in pools:
                for key in list(pool.free):
                    if self._expandable:
                        self._unmap(key, pool)
                    elif self._is_whole(key):
                        self._release(pool.free, key)

    def run(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:
        """Replay events on stream 0: `i` allocates tensor `i` of `sizes_bytes[i]` bytes and `~i` frees it.

        A tensor freed may be allocated again, and live ones stay so for the next call with the same sizes.
        Raises OutOfMemory; BadValue where a tensor is freed that is not live, or has fewer bytes than none.
        """
        if min(sizes_bytes, default=0) < 0:
            raise BadValue("cannot allocate", value=min(sizes_bytes), todo="Ask for 0 bytes or more.")
        if 0 in sizes_bytes:
            events = [event for event in events if sizes_bytes[event if event >= 0 else ~event]]
        try:
            if self._config.max_split_size_bytes is None and self._ages is None:
                self._run_inlined(sizes_bytes, events)
                return
            for event in events:
                if event < 0:
                    self._free(self._live.pop(~event))
                else:
                    self._live[event] = self._allocate(sizes_bytes[event], 0)
        except KeyError as error:
            todo = "Allocate every tensor before it is freed."
            raise BadValue("a tensor is freed that is not live", value=error.args[0], todo=todo) from None

    def _run_inlined(self, sizes_bytes: Sequence[int], events: Sequence[int]) -> None:  # noqa: C901
        """Do what `_allocate` and `_free` do, in one loop: an estimate replays 10,000 events and should take 10 ms."""
        small, large = self._pools_of(0)
        small_free, large_free = small.free, large.free
        live, sizes, starts, unmapped = self._live, self._sizes, self._starts, self._unmapped
        pop_live, pop_size, pop_start = live.pop, sizes.pop, starts.pop
        rounded = self._rounded(sizes_bytes)
        large_slack, expandable = large.slack_bytes, self._expandable
        allocated, peak = self.allocated_bytes, self.allocated_peak_bytes
        try:
            for event in events:
                if event < 0:
                    address, size, _, free = pop_live(~event)
                    allocated -= size
                    end = address + size
                    after = pop_size(end, 0)
                    if after:
                        del free[bisect_left(free, after << _ADDRESS_BITS | end)]
                        end += after
                    before = pop_start(address, None)
                    if before is not None:
                        del free[bisect_left(free, address - before << _ADDRESS_BITS | before)]
                        address = before
                    size = end - address
                    sizes[address] = size
                    starts[end] = address
                    insort(free, size << _ADDRESS_BITS | address)
                    continue
                size = rounded[event]
                free, slack = (small_free, 0) if size <= _SMALL_BYTES else (large_free, large_slack)
                index = bisect_left(free, size << _ADDRESS_BITS)
                if index < len(free):
                    if expandable:
                        index = self._least_expandable(free, index)
                    key = free.pop(index)
                    address = key & _ADDRESS_MASK
                    found = pop_size(address)
                else:
                    self.allocated_bytes, self.allocated_peak_bytes = allocated, peak
                    key = self._grow(sizes_bytes[event], size, small if size <= _SMALL_BYTES else large)
                    address, found = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
                end = address + found
                if found - size > slack:
                    rest = address + size
                    sizes[rest] = end - rest
                    starts[end] = rest
                    insort(free, end - rest << _ADDRESS_BITS | rest)
                else:
                    size = found
                    pop_start(end, None)
                live[event] = address, size, sizes_bytes[event], free
                allocated += size
                if allocated > peak:
                    peak = allocated
        finally:
            self.allocated_bytes, self.allocated_peak_bytes = allocated, peak

    def _allocate(self, requested_bytes: int, stream: int) -> _Live:
        """Find or make a block for a request of at least one byte, and split off what it does not need."""
        size = self._rounded([requested_bytes])[0]
        pool = self._pools_of(stream)[size > _SMALL_BYTES]
        key = self._cached(size, pool) or self._grow(requested_bytes, size, pool)
        address, found = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
        if found - size > pool.slack_bytes and (pool.slack_bytes == 0 or size < self._max_split_bytes):
            self._put(pool.free, address + size, found - size)
            found = size
        self.allocated_bytes += found
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return address, found, requested_bytes, pool.free

    def _free(self, live: _Live) -> None:
        address, size, _, free = live
        self.allocated_bytes -= size
        self._merge(free, address, size)

    def _rounded(self, sizes_bytes: Sequence[int]) -> list[int]:
        """Round requests up to whole blocks, or to a division of their power of two where the settings ask for it."""
        rounded = [size + _BLOCK_BYTES - 1 & -_BLOCK_BYTES for size in sizes_bytes]
        table = self._config.roundup_table
        if max(table) > 1:
            for index, size in enumerate(sizes_bytes):
                power = max(size.bit_length() - 1, 0)
                divisions = table[min(max(power - 20, 0), len(table) - 1)]
                if divisions > 1 and size > _BLOCK_BYTES * divisions:
                    rounded[index] = -(-size // (step := 2**power // divisions)) * step
        return rounded

    def _pools_of(self, stream: int) -> tuple[_Pool, _Pool]:
        if stream not in self._pools:
            device, page = self._device_bytes, self._config.large_segment_bytes
            slack = 0 if self._expandable else _SMALL_BYTES
            self._pools[stream] = (
                _Pool(is_large=False, page_bytes=_PAGE_BYTES, slack_bytes=0, device_bytes=device),
                _Pool(is_large=True, page_bytes=page, slack_bytes=slack, device_bytes=device),
            )
        return self._pools[stream]

    # The free blocks: kept in `free` by size, and in `_sizes` and `_starts` by where they begin and end.

    def _put(self, free: list[int], address: int, size: int) -> None:
        self._sizes[address] = size
        self._starts[address + size] = address
        insort(free, size << _ADDRESS_BITS | address)
        if self._ages is not None:
            self._ages[address] = self._lookups

    def _take(self, free: list[int], key: int) -> int:
        """Remove a free block and return its size."""
        del free[bisect_left(free, key)]
        size = self._sizes.pop(key & _ADDRESS_MASK)
        del self._starts[(key & _ADDRESS_MASK) + size]
        return size

    def _merge(self, free: list[int], address: int, size: int) -> int:
        """Put a block, merged with the free ones beside it, and return its address."""
        end = address + size
        if after := self._sizes.get(end):
            end += self._take(free, after << _ADDRESS_BITS | end)
        before = self._starts.get(address)
        if before is not None:
            self._take(free, address - before << _ADDRESS_BITS | before)
            address = before
        self._put(free, address, end - address)
        return address

    def _cached(self, size: int, pool: _Pool) -> int:
        """Take the free block that fits best and return its key, or 0."""
        if pool.is_large and self._ages is not None:
            self._lookups += 1
        free = pool.free
        index = bisect_left(free, size << _ADDRESS_BITS)
        if index == len(free):
            return 0
        if self._expandable:
            index = self._least_expandable(free, index)
        key = free[index]
        found, limit = key >> _ADDRESS_BITS, self._max_split_bytes
        # blocks from max_split_size_mb up serve only requests of about their size
        slack = self._config.max_non_split_rounding_bytes or self._config.large_segment_bytes
        if size < limit <= found or (size >= limit and found >= size + slack):
            return 0
        self._take(free, key)
        return key

    def _least_expandable(self, free: list[int], index: int) -> int:
        """Move on from a block that could grow into unmapped addresses to those that would end up smaller."""

        def reach(key: int) -> int:
            size = key >> _ADDRESS_BITS
            return size + self._unmapped.get((key & _ADDRESS_MASK) + size, 0)

        here = reach(free[index])
        while index + 1 < len(free) and (there := reach(free[index + 1])) < here:
            index, here = index + 1, there
        return index

    # New memory from CUDA, and memory given back to it.

    def _grow(self, requested_bytes: int, size: int, pool: _Pool) -> int:
        """Get a block from CUDA and return its key, giving back what is cached where that is needed."""
        segment = pool.page_bytes if size < _LARGE_BYTES else _ceil(size, _PAGE_BYTES)
        if self._ages is not None:
            self._collect_garbage(self._ages)
        key = self._new_block(size, segment, pool)
        if not key and self._release_oversize(size, pool):
            key = self._new_block(size, segment, pool)
        if not key:
            self.empty_cache()
            self.retry_count += 1
            key = self._new_block(size, segment, pool)
        if not key:
            self.oom_count += 1
            left = self._limit_bytes - self._device_used_bytes
            raise OutOfMemory(
                requested_bytes=requested_bytes, segment_bytes=segment, free_bytes=left, held=self.state()
            )
        return key

    def _new_block(self, size: int, segment: int, pool: _Pool) -> int:
        """Return the key of a segment of its own, or of a block of an expandable one; 0 where memory lacks."""
        if self.reserved_bytes + segment > self._allowed_bytes:
            return 0
        if self._expandable:
            return self._expand(size, pool)
        if not self._reserve(segment):
            return 0
        address = self._new_addresses(segment)
        self._segments[address] = segment
        return segment << _ADDRESS_BITS | address

    def _new_addresses(self, size: int) -> int:
        """Return where `size` bytes of addresses begin that touch no others, so that nothing merges across."""
        address = self._next_address
        self._next_address += _ceil(size, _PAGE_BYTES) + _PAGE_BYTES
        return address

    def _reserve(self, size: int) -> bool:
        """Take memory from the device if it has as much."""
        used = self._device_used_bytes + _ceil(size, _PAGE_BYTES)
        if used > self._limit_bytes:
            return False
        self._device_used_bytes = used
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        self.device_malloc_count += 1
        return True

    def _give_back(self, size: int) -> None:
        self._device_used_bytes -= _ceil(size, _PAGE_BYTES)
        self.reserved_bytes -= size
        self.device_free_count += 1

    def _is_whole(self, key: int) -> bool:
        return self._segments.get(key & _ADDRESS_MASK) == key >> _ADDRESS_BITS

    def _release(self, free: list[int], key: int) -> None:
        """Give a whole segment back to CUDA."""
        self._give_back(self._take(free, key))
        del self._segments[key & _ADDRESS_MASK]

    def _release_oversize(self, size: int, pool: _Pool) -> bool:
        """Give back one block of max_split_size_mb or more that is as large as `size`, or several that sum to it."""
        limit = self._max_split_bytes
        if self._config.max_split_size_bytes is None or self._expandable:
            return False
        free, wanted, released = pool.free, max(size, limit), 0
        index = bisect_left(free, wanted << _ADDRESS_BITS)
        if index < len(free):
            self._release(free, free[index])
            return True
        while released < wanted and free and free[-1] >> _ADDRESS_BITS >= limit:
            released += free[-1] >> _ADDRESS_BITS
            self._release(free, free[-1])
        return released >= wanted

    def _collect_garbage(self, ages: dict[int, int]) -> None:
        """Give back whole large segments, those unused for longer than the mean first, down to the threshold."""
        target = self.reserved_bytes - int(self._config.garbage_collection_threshold * self._allowed_bytes)
        whole = [(key, large.free) for _, large in self._pools.values() for key in large.free if self._is_whole(key)]
        freed = True
        while target > 0 and freed and whole:
            by_age = [(self._lookups - ages[key & _ADDRESS_MASK], key, free) for key, free in whole]
            mean = sum(age for age, _, _ in by_age) / len(by_age)
            for age, key, free in by_age:
                if age >= mean:
                    target -= key >> _ADDRESS_BITS
                    self._release(free, key)
            whole = [(key, free) for age, key, free in by_age if age < mean]
            freed = len(whole) < len(by_age)

    # Expandable segments: addresses for more than the card has, backed page by page from the lowest on.

    def _expand(self, size: int, pool: _Pool) -> int:
        """Map pages at the lowest address with room, take the block there and return its key; 0 where memory lacks."""
        address = self._place(size, pool)
        end = address + self._sizes.get(address, 0)
        while end - address < size:
            if not self._map(end, min(size - (end - address), self._unmapped[end]), pool):
                return 0
            end = address + self._sizes[address]
        key = end - address << _ADDRESS_BITS | address
        self._take(pool.free, key)
        return key

    def _place(self, size: int, pool: _Pool) -> int:
        """Return where the lowest `size` bytes of free and unmapped addresses begin: at need in a new segment."""
        for hole in pool.unmapped:
            address = end = self._starts.get(hole, hole)
            while end - address < size and (step := self._sizes.get(end) or self._unmapped.get(end)):
                end += step
            if end - address >= size:
                return address
        base = self._new_addresses(pool.span_bytes)
        pool.bases.append(base)
        pool.unmapped.append(base)
        self._unmapped[base] = pool.span_bytes
        return base

    def _map(self, hole: int, size: int, pool: _Pool) -> bool:
        """Back the first `size` bytes of an unmapped range, rounded up to pages, if the device has as much."""
        mapped = _ceil(size, pool.page_bytes)
        if not self._reserve(mapped):
            return False
        rest = self._unmapped.pop(hole) - mapped
        index = bisect_left(pool.unmapped, hole)
        if rest:
            self._unmapped[hole + mapped] = rest
            pool.unmapped[index] = hole + mapped
        else:
            del pool.unmapped[index]
        self._merge(pool.free, hole, mapped)
        return True

    def _unmap(self, key: int, pool: _Pool) -> None:
        """Give back the pages that lie entirely in a free block of an expandable segment."""
        address, end = key & _ADDRESS_MASK, (key & _ADDRESS_MASK) + (key >> _ADDRESS_BITS)
        base = pool.bases[bisect_right(pool.bases, address) - 1]
        hole = base + _ceil(address - base, pool.page_bytes)
        hole_end = end - (end - base) % pool.page_bytes
        if hole >= hole_end:
            return
        self._take(pool.free, key)
        if address < hole:
            self._put(pool.free, address, hole - address)
        if hole_end < end:
            self._put(pool.free, hole_end, end - hole_end)
        self._give_back(hole_end - hole)
        self._add_hole(hole, hole_end, base, pool)

    def _add_hole(self, hole: int, end: int, base: int, pool: _Pool) -> None:
        """Merge an unmapped range with those beside it; a segment with nothing mapped gives up its addresses."""
        index = bisect_left(pool.unmapped, hole)
        if end in self._unmapped:
            end += self._unmapped.pop(end)
            del pool.unmapped[index]
        if index and (before := pool.unmapped[index - 1]) + self._unmapped[before] == hole:
            index -= 1
            hole = pool.unmapped.pop(index)
        self._unmapped[hole] = end - hole
        pool.unmapped.insert(index, hole)
        if end - hole == pool.span_bytes:
            del self._unmapped[hole], pool.unmapped[index]
            pool.bases.remove(base)


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


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit
