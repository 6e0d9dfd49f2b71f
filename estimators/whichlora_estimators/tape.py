"""A training step without arithmetic: tensors that have a size and a lifetime, and autograd over them.

Recipes and methods are written as ordinary forward code over `Tensor`. Every allocation and every free lands on the tape
in the order in which PyTorch would make it, because lifetimes follow the rule that PyTorch's own follow: storage is freed
when the last reference to it dies. Python counts those references here as it does there, so a local variable that keeps a
tensor alive in the real code does so on the tape. (CPython only: a collector without reference counts would free too late.)

Autograd states the behaviour of torch/csrc/autograd/engine.cpp and input_buffer.cpp (read in 2.14): nodes run in
descending order of creation, a gradient is summed in place when nobody else holds it, inputs are released before the
node's saved tensors. Checkpointing states torch/utils/checkpoint.py (non-reentrant): saved tensors are dropped, and the
first one that backward asks for recomputes the region up to its last saved tensor.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import ref

from .reductions import column_sum_bytes

Shape = tuple[int, ...]
T = TypeVar("T")


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

#: Components that the tape itself tells apart: a parameter's gradient, and what backward allocates on the way to it.
GRADIENTS = "gradients"
TEMPORARIES = "backward temporaries"
LOGITS_AND_LOSS = "logits and loss"

#: What PyTorch reserves for a cuBLAS handle below compute capability 9.0, and from there on (getChosenWorkspaceSize: the
#: settings ":4096:2:16:8" and 32 MiB; CUDABlas.cpp and CublasHandlePool.cpp of torch 2.14).
CUBLAS_WORKSPACE_BYTES, HOPPER_CUBLAS_WORKSPACE_BYTES = (4096 * 2 + 16 * 8) * 1024, 32 * 2**20


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
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, before the allocator rounds."""
        return math.prod(self.shape) * self.dtype.bytes

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


def _merge_heads(g: Tensor) -> tuple[Tensor]:
    batch, heads, tokens, width = g.shape
    shape = (batch, tokens, heads * width)
    if g.strided or heads == 1 or tokens == 1:
        return (View(g, shape),)
    merged = _kernel(g, shape, g.dtype)
    merged.strided = False
    return (merged,)


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


class _StopRecomputation(Exception):
    """The region's last saved tensor has been recomputed."""


class Kernel(NamedTuple):
    """One launch: bytes that it moves, and for a matrix product its (batched) m x n x k and the dtype it runs in.

    `fused` says that it is attention in one kernel: its products, queries x keys, laid end to end along k.
    """

    moved_bytes: int
    batch: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    fused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A named place on the tape: the numbers of events and of kernels before it."""

    label: str
    event: int
    kernel: int


class Tape:
    """Allocations, frees and launches of a step, in order.

    `sizes[i]` bytes are asked for by storage `i` with component `tags[i]`; `events` holds `i` for its allocation and `~i`
    for its free.
    """

    def __init__(self, compute_capability: tuple[int, int] = (8, 0)) -> None:
        self.compute_capability = compute_capability
        newer = compute_capability >= (9, 0)
        self.workspace_bytes = HOPPER_CUBLAS_WORKSPACE_BYTES if newer else CUBLAS_WORKSPACE_BYTES
        self.sizes: list[int] = []
        self.tags: list[str] = []
        self.events: list[int] = []
        self.kernels: list[Kernel] = []
        self.marks: list[Mark] = []
        self.emptied: list[int] = []
        self.component = "weights"
        self.section = "setup"
        self.grad_enabled = False
        self.autocast: Dtype | None = None
        self.autocast_weights: dict[int, Tensor] = {}
        self.workspaces: list[Tensor] = []
        self.workspace_due = True
        self._seq = 0
        self._frame: Frame | None = None
        self._rerun: Frame | None = None

    def new(self, shape: Shape, dtype: Dtype) -> Tensor:
        """Allocate a tensor; one without elements takes no storage."""
        size = math.prod(shape) * dtype.bytes
        if not size:
            return Tensor(self, None, shape, dtype)
        index = len(self.sizes)
        self.sizes.append(size)
        self.tags.append(self.component)
        self.events.append(index)
        return Tensor(self, Storage(self.events, index), shape, dtype)

    def empty_cache(self) -> None:
        """Note that the allocator gives back its cache here."""
        self.emptied.append(len(self.events))

    def launch(self, moved_bytes: int) -> None:
        """Record a kernel that is bound by the bytes it moves."""
        self.kernels.append(Kernel(moved_bytes))

    def allocate_workspace(self) -> None:
        """Give this thread's cuBLAS handle its workspace: at its first product, forward and backward each (CUDABlas.cpp)."""
        self.workspace_due = False
        with self.tagged("workspaces"):
            self.workspaces.append(self.new((self.workspace_bytes,), UINT8))

    def mark(self, label: str) -> None:
        """Name the section of the tape that begins here; backward repeats the name for what undoes the section."""
        self.section = label
        self._mark(label)

    def _mark(self, label: str) -> None:
        self.marks.append(Mark(label=label, event=len(self.events), kernel=len(self.kernels)))

    @contextmanager
    def tagged(self, component: str) -> Iterator[None]:
        """Count what is allocated inside as `component`."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    # Autograd ---------------------------------------------------------------------------------------------------------

    def record(
        self,
        out: Tensor,
        inputs: tuple[Tensor | None, ...],
        saved: Saved,
        backward: Backward,
        *,
        outputs: int = 1,
        kept: Saved = (),
        saves_results: bool = False,
    ) -> Node | None:
        """Make `out` the result of a node over `inputs`, unless no gradient is asked for.

        `saves_results` says that some of the saved tensors are results beside `out`, which exists when they are saved.
        """
        if not self.grad_enabled:
            return None
        edges = tuple(
            None if source is None or source.node is None else (source.node, source.nr, source.dtype, source.shape)
            for source in inputs
        )
        if not any(edges):
            return None
        self._seq += 1
        node = Node(self._seq, edges, backward, outputs, self.section)
        node.kept = kept
        out.node = node
        if any(tensor is not None for tensor in saved):
            self._save(node, saved, None if saves_results else out)
        return node

    def _save(self, node: Node, saved: Saved, out: Tensor | None) -> None:
        if self._rerun is not None:
            frame = self._rerun
            assert frame.recomputed is not None
            wanted = frame.savers[len(frame.recomputed)]() is not None
            frame.recomputed.append(tuple(tensor and tensor.detach() for tensor in saved) if wanted else ())
            node.saved = saved
            if len(frame.recomputed) == len(frame.savers):
                if out is not None:
                    self._take_back_unsaved(out, saved)
                raise _StopRecomputation
        elif self._frame is not None:
            node.frame, node.slot = self._frame, len(self._frame.savers)
            self._frame.savers.append(ref(node))
        else:
            node.saved = saved

    def _take_back_unsaved(self, out: Tensor, saved: Saved) -> None:
        """Undo the allocation of a result that is not saved: inputs are saved before an operator runs, and that ends it."""
        storage = out.storage
        if storage is None or any(tensor is not None and tensor.storage is storage for tensor in saved):
            return
        position = len(self.events) - 1
        while self.events[position] != storage.index:
            position -= 1
        del self.events[position]
        storage.index = -1

    def checkpoint(self, run: Callable[[], T]) -> T:
        """Run a region whose saved tensors are dropped now and recomputed in backward (inside a rerun: just run it)."""
        if not self.grad_enabled or self._rerun is not None:
            return run()
        before, self._frame = self._frame, Frame(run, self.autocast)
        try:
            return run()
        finally:
            self._frame = before

    def _recompute(self, frame: Frame) -> None:
        frame.recomputed = []
        component, self.component = self.component, "activations"
        self.grad_enabled, self.autocast, self._rerun = True, frame.autocast, frame
        try:
            frame.run()
        except _StopRecomputation:
            pass
        finally:
            self.grad_enabled, self.autocast, self._rerun = False, None, None
            self.autocast_weights.clear()
            self.component = component

    def _unpack(self, node: Node) -> Saved:
        frame = node.frame
        if frame is None:
            saved, node.saved = node.saved, ()
            return saved
        if frame.recomputed is None:
            self._recompute(frame)
            assert frame.recomputed is not None
        saved, frame.recomputed[node.slot] = frame.recomputed[node.slot], ()
        return saved

    def backward(self, loss: Tensor) -> None:
        """Run backward from a scalar; parameters' gradients end in their leaves."""
        assert isinstance(loss.node, Node)
        before, self.grad_enabled = self.grad_enabled, False
        self.workspace_due = len(self.workspaces) < 2
        section = ""
        waiting: dict[Node, list[Tensor | None]] = {loss.node: [self.new((1,), loss.dtype)]}
        queue: list[tuple[int, Node]] = [(-loss.node.seq, loss.node)]
        while queue:
            node = heapq.heappop(queue)[1]
            if node.section != section:
                section = node.section
                self.component = LOGITS_AND_LOSS if section == "loss" else TEMPORARIES
                self._mark(f"{section} backward")
            grads = self._run(node, waiting.pop(node))
            arrivals = list(zip(node.edges, grads, strict=True))  # nodes live until the loss dies, and `kept` with them
            del grads
            while arrivals:
                edge, grad = arrivals.pop(0)
                if edge is not None and grad is not None:
                    _deliver(edge, grad, waiting, queue)
                del grad
        self.grad_enabled = before

    def _run(self, node: Node, buffers: list[Tensor | None]) -> list[Tensor | None]:
        """Run one node; gradients come back in the shape and dtype of the inputs they belong to.

        What was saved dies last, but first where it was recomputed.
        """
        saved = self._unpack(node)
        given = buffers[0] if node.outputs == 1 else buffers
        grads = list(node.backward(given, *saved))
        if node.frame is not None:
            node.frame = None
            del saved
        _as_edges(grads, node.edges)
        del given
        buffers.clear()
        node.backward = _released
        return grads


def _released(*_: Any) -> tuple[Tensor | None, ...]:
    raise AssertionError("this node ran already")


def _as_edges(grads: list[Tensor | None], edges: tuple[Edge | None, ...]) -> None:
    """Sum gradients to the shapes of inputs that were broadcast, then convert them (engine.cpp, validate_outputs)."""
    for index, edge in enumerate(edges):
        grad = grads[index]
        if grad is None or edge is None or (grad.dtype is edge[2] and grad.shape == edge[3]):
            continue
        grads[index] = None
        _, _, dtype, shape = edge
        if grad.shape != shape and grad.numel != math.prod(shape):  # of one size: a view
            grad = _summed(grad, shape)
        grads[index] = grad if grad.dtype is dtype else _kernel(grad, grad.shape, dtype)


def _summed(grad: Tensor, shape: Shape) -> Tensor:
    total = _kernel(grad, shape, grad.dtype)
    if grad.shape[-1] == shape[-1]:
        columns = math.prod(shape)
        grad.tape.new((column_sum_bytes(grad.numel // columns, columns),), UINT8)
    return total


def _kernel(source: Tensor, shape: Shape, dtype: Dtype) -> Tensor:
    result = source.tape.new(shape, dtype)
    result.strided = source.strided
    source.tape.launch(source.bytes + result.bytes)
    return result


def _deliver(edge: Edge, grad: Tensor, waiting: dict[Node, list[Tensor | None]], queue: list[tuple[int, Node]]) -> None:
    node, nr, _, _ = edge
    if isinstance(node, Leaf):
        held = node.grad
        if held is None:
            node.grad = grad
        elif not _only_ours(held):
            node.grad = _kernel(held, held.shape, held.dtype)
        if grad.storage is not None:
            grad.tape.tags[grad.storage.index] = GRADIENTS
        return
    buffers = waiting.get(node)
    if buffers is None:
        buffers = waiting[node] = [None] * node.outputs
        heapq.heappush(queue, (-node.seq, node))
    held = buffers[nr]
    if held is None:
        buffers[nr] = grad
    elif not _only_ours(held):
        buffers[nr] = _kernel(held, held.shape, held.dtype)
    else:
        grad.tape.launch(3 * grad.bytes)


def _only_ours(held: Tensor) -> bool:
    """Say whether the caller's list slot and local variable are the only holders of a tensor and its storage."""
    return sys.getrefcount(held) <= _HELD_TWICE and sys.getrefcount(held.storage) <= _STORED_ONCE


def _reference_counts() -> tuple[int, int]:
    """Measure what `sys.getrefcount` says of a tensor held as `_only_ours` finds it: interpreters count differently."""
    counts: list[int] = []

    def count(held: Tensor) -> None:
        counts.append(sys.getrefcount(held))
        counts.append(sys.getrefcount(held.storage))

    slot: list[Tensor | None] = [Tape().new((1,), BOOL)]
    held = slot[0]
    assert held is not None
    count(held)
    return counts[0], counts[1]


_HELD_TWICE, _STORED_ONCE = _reference_counts()


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors."""
    return sum(tensor.bytes for tensor in tensors)
