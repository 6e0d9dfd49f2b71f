"""The free blocks of PyTorch's CUDA caching allocator, and the addresses that its segments lie at.

Source: BlockPool, ExpandableSegment and the functions around them in c10/cuda/CUDACachingAllocator.cpp of torch 2.14.1.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

PAGE_BYTES = 2 * 2**20  # what CUDA hands out, and most segments, are multiples

# A free block is known by one integer, its size above its address: sorted, these are in PyTorch's order of best fit.
ADDRESS_BITS = 56
ADDRESS_MASK = 2**ADDRESS_BITS - 1


class Addresses:
    """What lies where, over all pools. No two segments touch, so that blocks of one never merge with another's."""

    __slots__ = ("ages", "lookups", "next", "sizes", "starts", "unmapped")

    def __init__(self, *, keep_ages: bool) -> None:
        self.sizes: dict[int, int] = {}  # address of a free block -> its size
        self.starts: dict[int, int] = {}  # end of a free block -> its address
        self.unmapped: dict[int, int] = {}  # address of an unmapped range of an expandable segment -> its size
        self.next = PAGE_BYTES
        self.lookups = 0  # how often the large pool was searched
        self.ages: dict[int, int] | None = {} if keep_ages else None  # address of a free block -> `lookups` until then

    def new(self, size: int) -> int:
        """Return where a segment of `size` bytes begins: above all others, as a fresh process mostly sees it."""
        address = self.next
        self.next += ceil_to(size, PAGE_BYTES) + PAGE_BYTES
        return address


class Pool:
    """The free blocks of one stream, small (up to 1 MiB) or large."""

    __slots__ = ("addresses", "bases", "free", "is_large", "page_bytes", "slack_bytes", "span_bytes", "unmapped")

    def __init__(
        self, addresses: Addresses, *, is_large: bool, page_bytes: int, slack_bytes: int, device_bytes: int
    ) -> None:
        self.addresses = addresses
        self.is_large = is_large
        self.page_bytes = page_bytes  # the segment of a request below 10 MiB, and what an expandable segment grows by
        self.slack_bytes = slack_bytes  # a remainder up to this stays with its block
        self.span_bytes = ceil_to(device_bytes + device_bytes // 8, page_bytes)  # addresses of an expandable segment
        self.free: list[int] = []  # keys, ascending
        self.bases: list[int] = []  # addresses of the expandable segments, ascending
        self.unmapped: list[int] = []  # addresses of their unmapped ranges, ascending

    def put(self, address: int, size: int) -> None:
        """Add a free block."""
        at = self.addresses
        at.sizes[address] = size
        at.starts[address + size] = address
        insort(self.free, size << ADDRESS_BITS | address)
        if at.ages is not None:
            at.ages[address] = at.lookups

    def take(self, address: int) -> int:
        """Remove the free block at an address and return its size."""
        size = self.addresses.sizes.pop(address)
        del self.addresses.starts[address + size]
        del self.free[self.index(address, size)]
        return size

    def index(self, address: int, size: int) -> int:
        """Return where a block is, or would be, among the free ones."""
        return bisect_left(self.free, size << ADDRESS_BITS | address)

    def merge(self, address: int, size: int) -> None:
        """Add a free block as one with those that touch it."""
        end = address + size
        if end in self.addresses.sizes:
            end += self.take(end)
        before = self.addresses.starts.get(address)
        if before is not None:
            self.take(before)
            address = before
        self.put(address, end - address)

    def least_expandable(self, index: int) -> int:
        """Move on from a block that could grow into unmapped addresses to those that would end up smaller."""
        here = self._reach(index)
        while index + 1 < len(self.free) and (there := self._reach(index + 1)) < here:
            index, here = index + 1, there
        return index

    def _reach(self, index: int) -> int:
        size, address = self.free[index] >> ADDRESS_BITS, self.free[index] & ADDRESS_MASK
        return size + self.addresses.unmapped.get(address + size, 0)

    # Expandable segments: addresses for more than the card has, backed page by page from the lowest on.

    def place(self, size: int) -> int:
        """Return where the lowest `size` bytes of free and unmapped addresses begin: at need in a new segment."""
        at = self.addresses
        for hole in self.unmapped:
            address = end = at.starts.get(hole, hole)
            while end - address < size and (step := at.sizes.get(end) or at.unmapped.get(end)):
                end += step
            if end - address >= size:
                return address
        base = at.new(self.span_bytes)
        self.bases.append(base)
        self.unmapped.append(base)
        at.unmapped[base] = self.span_bytes
        return base

    def map(self, hole: int, size: int) -> None:
        """Back the first `size` bytes, whole pages, of an unmapped range."""
        rest = self.addresses.unmapped.pop(hole) - size
        index = bisect_left(self.unmapped, hole)
        if rest:
            self.addresses.unmapped[hole + size] = rest
            self.unmapped[index] = hole + size
        else:
            del self.unmapped[index]
        self.merge(hole, size)

    def unmap(self, address: int) -> int:
        """Give up the pages that lie entirely in the free block at an address and return their bytes."""
        end = address + self.addresses.sizes[address]
        base = self.bases[bisect_right(self.bases, address) - 1]
        hole = base + ceil_to(address - base, self.page_bytes)
        hole_end = end - (end - base) % self.page_bytes
        if hole >= hole_end:
            return 0
        self.take(address)
        if address < hole:
            self.put(address, hole - address)
        if hole_end < end:
            self.put(hole_end, end - hole_end)
        self._add_hole(hole, hole_end, base)
        return hole_end - hole

    def _add_hole(self, hole: int, end: int, base: int) -> None:
        """Merge an unmapped range with those that touch it; a segment with nothing mapped gives up its addresses."""
        sizes = self.addresses.unmapped
        index = bisect_left(self.unmapped, hole)
        if end in sizes:
            end += sizes.pop(end)
            del self.unmapped[index]
        if index and (before := self.unmapped[index - 1]) + sizes[before] == hole:
            index -= 1
            hole = self.unmapped.pop(index)
        if end - hole == self.span_bytes:
            sizes.pop(hole, None)
            self.bases.remove(base)
        else:
            sizes[hole] = end - hole
            self.unmapped.insert(index, hole)


def ceil_to(value: int, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return -(-value // unit) * unit
