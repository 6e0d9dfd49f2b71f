"""The blocks of PyTorch's CUDA caching allocator: those in use, and the free ones of a stream by size.

Source: Block, BlockPool, ExpandableSegment and what goes with them in c10/cuda/CUDACachingAllocator.cpp of torch 2.14.1.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any

PAGE_BYTES = 2 * 2**20  # what CUDA hands out, and most segments, are multiples

# A block is a list, which is quick to make, and which compares by address: also its size and state, the blocks that it
# touches, and how often the large pool had been searched when it became free.
Block = list[Any]
ADDRESS, SIZE, STATE, BEFORE, AFTER, AGE = range(6)
IN_USE, FREE, UNMAPPED = False, True, None  # the last: addresses of an expandable segment without memory behind them


class Addresses:
    """What all pools share: where the next segment lies, and what lies at both ends of each."""

    __slots__ = ("edge", "lookups", "next")

    def __init__(self) -> None:
        self.next = PAGE_BYTES
        self.lookups = 0  # how often the large pool was searched
        self.edge: Block = [0, 0, IN_USE, None, None, 0]

    def segment(self, size: int, state: bool | None) -> Block:
        """Return a block above all others, as a fresh process mostly sees it. No two segments touch."""
        address = self.next
        self.next += ceil_to(size, PAGE_BYTES) + PAGE_BYTES
        return [address, size, state, self.edge, self.edge, self.lookups]

    def is_whole(self, block: Block) -> bool:
        """Say whether a block is all of its segment."""
        return block[BEFORE] is self.edge is block[AFTER]


class Pool:
    """The free blocks of one stream, small (up to 1 MiB) or large.

    `of_size` holds them by size, each list by address; `sizes` are its keys in order, some of whose lists may be empty.
    """

    __slots__ = (
        "at",
        "growths",
        "is_large",
        "of_size",
        "page_bytes",
        "sizes",
        "slack_bytes",
        "span_bytes",
        "starts",
        "unmapped",
    )

    def __init__(
        self, addresses: Addresses, *, is_large: bool, page_bytes: int, slack_bytes: int, device_bytes: int
    ) -> None:
        self.at = addresses
        self.is_large = is_large
        self.page_bytes = page_bytes  # the segment of a request below 10 MiB, and what an expandable segment grows by
        self.slack_bytes = slack_bytes  # a remainder up to this stays with its block
        self.span_bytes = ceil_to(device_bytes + device_bytes // 8, page_bytes)  # addresses of an expandable segment
        self.of_size: dict[int, list[Block]] = {}
        self.sizes: list[int] = []
        self.growths = 0  # how often CUDA gave memory
        self.starts: list[int] = []  # addresses of the expandable segments, ascending
        self.unmapped: list[Block] = []  # their blocks without memory, by address

    def blocks(self, size: int = 0) -> Iterator[Block]:
        """Go through the free blocks of at least `size` bytes in PyTorch's order of best fit: by size, then address."""
        for each in self.sizes[bisect_left(self.sizes, size) :]:
            yield from self.of_size[each]

    def largest(self) -> Block | None:
        """Return the last of them."""
        return next((blocks[-1] for size in reversed(self.sizes) if (blocks := self.of_size[size])), None)

    def add(self, block: Block) -> None:
        """Make a block a free one."""
        block[STATE], block[AGE] = FREE, self.at.lookups
        size = block[SIZE]
        if size not in self.of_size:
            self.of_size[size] = []
            insort(self.sizes, size)
        insort(self.of_size[size], block)

    def remove(self, block: Block) -> None:
        """Take a block out of the free ones."""
        block[STATE] = IN_USE
        self.of_size[block[SIZE]].remove(block)

    def split(self, block: Block, size: int) -> Block:
        """Cut what is above `size` bytes off a block that is not free and return it, in the same state."""
        rest = [block[ADDRESS] + size, block[SIZE] - size, block[STATE], block, block[AFTER], 0]
        block[SIZE] = size
        block[AFTER][BEFORE] = rest
        block[AFTER] = rest
        return rest

    def merge(self, block: Block) -> Block:
        """Add a block to the free ones as one with those that touch it."""
        if block[AFTER][STATE] is FREE:
            self.remove(block[AFTER])
            _join(block, block[AFTER])
        if block[BEFORE][STATE] is FREE:
            block = block[BEFORE]
            self.remove(block)
            _join(block, block[AFTER])
        self.add(block)
        return block

    def least_expandable(self, size: int) -> Block | None:
        """Move on from the best fit, if it could grow into unmapped addresses, to those that would end up smaller."""
        found, least = None, 0
        for block in self.blocks(size):
            after = block[AFTER]
            reach = block[SIZE] + (after[SIZE] if after[STATE] is UNMAPPED else 0)
            if found is not None and reach >= least:
                break
            found, least = block, reach
        return found

    # Expandable segments: addresses for more than the card has, backed page by page from the lowest on.

    def place(self, size: int) -> Block:
        """Return the first of the free and unmapped blocks with the lowest `size` bytes: at need a new segment."""
        for hole in self.unmapped:
            first = block = hole[BEFORE] if hole[BEFORE][STATE] is FREE else hole
            room = 0
            while block[STATE] is not IN_USE:
                room += block[SIZE]
                if room >= size:
                    return first
                block = block[AFTER]
        segment = self.at.segment(self.span_bytes, UNMAPPED)
        self.starts.append(segment[ADDRESS])
        self.unmapped.append(segment)
        return segment

    def map(self, hole: Block, size: int) -> Block:
        """Back the first `size` bytes, whole pages, of an unmapped block; returns the free block they are in."""
        index = bisect_left(self.unmapped, hole)
        if hole[SIZE] > size:
            self.unmapped[index] = self.split(hole, size)
        else:
            del self.unmapped[index]
        return self.merge(hole)

    def unmap(self, block: Block) -> int:
        """Give up the pages that lie entirely in a free block and return their bytes."""
        address: int = block[ADDRESS]
        end: int = address + block[SIZE]
        start = self.starts[bisect_right(self.starts, address) - 1]
        hole_start = start + ceil_to(address - start, self.page_bytes)
        hole_end = end - (end - start) % self.page_bytes
        if hole_start >= hole_end:
            return 0
        self.remove(block)
        hole = block
        if address < hole_start:
            hole = self.split(block, hole_start - address)
            self.add(block)
        if hole_end < end:
            self.add(self.split(hole, hole_end - hole_start))
        self._add_hole(hole, start)
        return hole_end - hole_start

    def _add_hole(self, hole: Block, start: int) -> None:
        """Merge an unmapped block with those that touch it; a segment with nothing mapped gives up its addresses."""
        hole[STATE] = UNMAPPED
        index = bisect_left(self.unmapped, hole)
        if hole[AFTER][STATE] is UNMAPPED:
            del self.unmapped[index]
            _join(hole, hole[AFTER])
        if hole[BEFORE][STATE] is UNMAPPED:
            hole = hole[BEFORE]
            index -= 1
            del self.unmapped[index]
            _join(hole, hole[AFTER])
        if self.at.is_whole(hole):
            self.starts.remove(start)
        else:
            self.unmapped.insert(index, hole)


def _join(block: Block, after: Block) -> None:
    block[SIZE] += after[SIZE]
    block[AFTER] = after[AFTER]
    block[AFTER][BEFORE] = block


def ceil_to(value: int, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return -(-value // unit) * unit
