"""Tensors that have a size and a lifetime, and the graph that autograd makes of them; tape.py records both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

if TYPE_CHECKING:
    from .tape import Tape

Shape = tuple[int, ...]


class Dtype(NamedTuple):
    """An element type: its name, its bytes, and its rank in type promotion."""

    name: str
    bytes: int
    rank: int


BOOL = Dtype("bool", 1, 0)
UINT8 = Dtype("uint8", 1, 1)
INT8 = Dtype("int8", 1, 1)
INT32 = Dtype("int32", 4, 2)
INT64 = Dtype("int64", 8, 3)
FP16 = Dtype("fp16", 2, 4)
BF16 = Dtype("bf16", 2, 4)
FP32 = Dtype("fp32", 4, 5)


class Storage:
    """Bytes on the device; `index` is its number on the tape (-1: taken back). Its death is the free."""

    __slots__ = ("events", "index")

    def __init__(self, events: list[int], index: int) -> None:
        self.events = events
        self.index = index

    def __del__(self) -> None:
        if self.index >= 0:
            self.events.append(~self.index)


class Tensor:
    """A view of a storage with a shape and a dtype; `node` made it (None: no gradient flows here), as output number `nr`.

    `strided` says that [B, H, T, E] lies in memory as [B, T, H, E], as projections split into heads do; elementwise results
    keep that order.
    """

    __slots__ = ("dtype", "node", "nr", "shape", "storage", "strided", "tape")

    def __init__(self, tape: Tape, storage: Storage | None, shape: Shape, dtype: Dtype) -> None:
        self.tape = tape
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.node: Node | Leaf | None = None
        self.nr = 0
        self.strided = False

    @property
    def numel(self) -> int:
        """Count the elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, before the allocator rounds."""
        return prod(self.shape) * self.dtype.bytes

    def view(self, *shape: int) -> Tensor:
        """Return the same storage under another shape; gradients pass through unchanged in size."""
        seen = Tensor(self.tape, self.storage, shape, self.dtype)
        seen.node, seen.nr = self.node, self.nr
        return seen

    def heads(self, count: int) -> Tensor:
        """View [B, T, H * E] as [B, H, T, E]; a gradient in another memory order is copied."""
        batch, tokens, width = self.shape
        seen = Tensor(self.tape, self.storage, (batch, count, tokens, width // count), self.dtype)
        seen.strided = count > 1 and tokens > 1
        self.tape.record(seen, (self,), (), _merge_heads)
        return seen

    def edge(self) -> Edge | None:
        """Return where the gradient goes, and what it looks like there."""
        return None if self.node is None else (self.node, self.nr, self.dtype, self.shape)

    def detach(self) -> Tensor:
        """Return the same storage without its history."""
        seen = Tensor(self.tape, self.storage, self.shape, self.dtype)
        seen.strided = self.strided
        return seen


class View(Tensor):
    """A gradient that backward brought to its shape as a view: autograd keeps the viewed tensor, so no sum is made in it."""

    __slots__ = ("viewed",)

    def __init__(self, viewed: Tensor, shape: Shape) -> None:
        super().__init__(viewed.tape, viewed.storage, shape, viewed.dtype)
        self.viewed = viewed


class Leaf:
    """Where a parameter's gradient accumulates (torch's AccumulateGrad)."""

    __slots__ = ("grad", "seq")

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.seq = sys.maxsize


# A backward formula: gradients of the outputs (one, or a list where a node has several outputs) and the saved tensors in,
# gradients of the inputs out.
Backward = Callable[..., "tuple[Tensor | None, ...]"]
Saved = tuple["Tensor | None", ...]
Edge = tuple["Node | Leaf", int, Dtype, Shape]


class Node:
    """One backward formula with its saved tensors and the edges to what made its inputs.

    `kept` are tensors that a custom function holds on its context beside the saved ones: checkpointing does not drop them,
    and they die with the graph, not with the node's run.
    """

    __slots__ = ("__weakref__", "backward", "edges", "frame", "kept", "outputs", "saved", "section", "seq", "slot")

    def __init__(
        self, seq: int, edges: tuple[Edge | None, ...], backward: Backward, outputs: int, section: str
    ) -> None:
        self.seq = seq
        self.section = section
        self.edges = edges
        self.backward = backward
        self.outputs = outputs
        self.saved: Saved = ()
        self.kept: Saved = ()
        self.frame: Frame | None = None
        self.slot = 0


class Frame:
    """One checkpointed call: how to run it again, which nodes saved something, and what the rerun gave back."""

    __slots__ = ("autocast", "recomputed", "run", "savers")

    def __init__(self, run: Callable[[], object], autocast: Dtype | None) -> None:
        self.run = run
        self.autocast = autocast
        self.savers: list[ref[Node]] = []
        self.recomputed: list[Saved] | None = None


#: The dtype of no product: the host waits.
WAITS = "waits"


class Kernel(NamedTuple):
    """One launch: bytes that it moves, and for a matrix product its (batched) m x n x k and the dtype it runs in.

    `fused` says that it is attention in one kernel: its products, queries x keys, laid end to end along k. One that moves
    nothing is host time only; with `dtype` WAITS the host then waits until the device has done all before it.
    """

    moved_bytes: int
    batch: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    fused: bool = False


def computed(source: Tensor, shape: Shape, dtype: Dtype) -> Tensor:
    """Allocate what one kernel makes of a tensor, in its memory order."""
    result = source.tape.new(shape, dtype)
    result.strided = source.strided
    source.tape.launch(source.bytes + result.bytes)
    return result


def _merge_heads(g: Tensor) -> tuple[Tensor]:
    batch, heads, tokens, width = g.shape
    shape = (batch, tokens, heads * width)
    if g.strided or heads == 1 or tokens == 1:
        return (View(g, shape),)
    merged = computed(g, shape, g.dtype)
    merged.strided = False
    return (merged,)
