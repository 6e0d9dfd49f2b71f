"""A training step without arithmetic: tensors that have a size and a lifetime, and autograd over them.

Recipes and methods are written as ordinary forward code over `Tensor`. Every allocation and every free lands on the tape
in the order in which PyTorch would make it, because lifetimes follow the rule that PyTorch's own follow: storage is freed
when the last reference to it dies. Python counts those references here as it does there, so a local variable that keeps a
tensor alive in the real code does so on the tape. (CPython only: a collector without reference counts would free too late.)

Autograd states the behaviour of torch/csrc/autograd/engine.cpp and input_buffer.cpp (read in 2.14): nodes run in
descending order of creation, a gradient is summed in place when nobody else holds it, inputs are released before the
node's saved tensors. Checkpointing states torch/utils/checkpoint.py (non-reentrant): saved tensors are dropped, and the
first one that backward asks for recomputes the region up to its last saved tensor. Reentrant checkpointing runs a
backward of its own for each region.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, TypeVar
from weakref import ref

from .reductions import column_sum_bytes
from .stack import NEWEST_STACK, Stack
from .tensor import (
    BF16,
    BOOL,
    FP16,
    FP32,
    INT8,
    INT32,
    INT64,
    UINT8,
    WAITS,
    Backward,
    Dtype,
    Edge,
    Frame,
    Kernel,
    Leaf,
    Node,
    Saved,
    Shape,
    Storage,
    Tensor,
    View,
    computed,
)

__all__ = [
    "BF16",
    "BOOL",
    "FP16",
    "FP32",
    "INT8",
    "INT32",
    "INT64",
    "UINT8",
    "Backward",
    "Dtype",
    "Edge",
    "Kernel",
    "Leaf",
    "Mark",
    "Node",
    "Saved",
    "Shape",
    "Storage",
    "Tape",
    "Tensor",
    "View",
    "total_bytes",
]

T = TypeVar("T")


#: Components that the tape itself tells apart: a parameter's gradient, and what backward allocates on the way to it.
GRADIENTS = "gradients"
TEMPORARIES = "backward temporaries"
LOGITS_AND_LOSS = "logits and loss"

#: What PyTorch reserves for a cuBLAS handle below compute capability 9.0, and from there on (getChosenWorkspaceSize: the
#: settings ":4096:2:16:8" and 32 MiB; CUDABlas.cpp and CublasHandlePool.cpp of torch 2.14).
CUBLAS_WORKSPACE_BYTES, HOPPER_CUBLAS_WORKSPACE_BYTES = (4096 * 2 + 16 * 8) * 1024, 32 * 2**20


#: What the null device's own card has, and what a timeline is laid for unless it is told of a card.
A100_MULTIPROCESSORS = 108

#: Kernels are the same again and again.
_bytes_bound = cache(Kernel)
#: No kernel, but as much of the host's time as launching one; and one that the host waits for.
HOST_ONLY, HOST_WAITS = Kernel(0), Kernel(0, dtype=WAITS)


class _StopRecomputation(Exception):
    """The region's last saved tensor has been recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A named place on the tape: the numbers of events, of kernels and of storages before it."""

    label: str
    event: int
    kernel: int
    storage: int


class _Tagged:
    """A context manager; one made of a generator takes four times as long, and every adapter's weight has one."""

    __slots__ = ("before", "component", "tape")

    def __init__(self, tape: Tape, component: str) -> None:
        self.tape, self.component = tape, component

    def __enter__(self) -> None:
        self.before, self.tape.component = self.tape.component, self.component

    def __exit__(self, *_: object) -> None:
        self.tape.component = self.before


class Tape:
    """Allocations, frees and launches of a step, in order.

    `sizes[i]` bytes are asked for by storage `i` with component `tags[i]`; `events` holds `i` for its allocation and `~i`
    for its free. Those in `once` happen in the first step only; `emptied` counts the events before each emptying of the
    allocator's cache.
    """

    def __init__(
        self,
        compute_capability: tuple[int, int] = (8, 0),
        *,
        multiprocessors: int = A100_MULTIPROCESSORS,
        stack: Stack = NEWEST_STACK,
    ) -> None:
        self.compute_capability = compute_capability
        self.multiprocessors = multiprocessors
        self.card = compute_capability, multiprocessors
        self.stack = stack
        newer = compute_capability >= (9, 0)
        self.workspace_bytes = HOPPER_CUBLAS_WORKSPACE_BYTES if newer else CUBLAS_WORKSPACE_BYTES
        self.sizes: list[int] = []
        self.tags: list[str] = []
        self.events: list[int] = []
        self.kernels: list[Kernel] = []
        self.marks: list[Mark] = []
        #: Marks and all other places where the tape can be cut into sections.
        self.cuts: list[Mark] = []
        #: After how many layers their structure repeats, where those that are alike need not all be laid (0: they do).
        self.period = 0
        #: How many periods were not laid, by the name of a stack of layers.
        self.left_out: dict[str, int] = {}
        self.emptied: list[int] = []
        self.component = "weights"
        self.section = "setup"
        self.grad_enabled = False
        self.autocast: Dtype | None = None
        self.autocast_weights: dict[int, Tensor] = {}
        self.workspaces: list[Tensor] = []
        self.once: set[int] = set()
        self.workspace_due = True
        #: Whether modules drop out: while training, with gradients recorded or not.
        self.drops = False
        #: Whether the model hands flash attention one key and value for each query head.
        self.flash_repeats = False
        self.reentrant = False
        self._seq = 0
        self._frame: Frame | None = None
        self._rerun: Frame | None = None
        #: Gradients of parameters that wait for more of them before they are added to those of an earlier backward.
        self._again = False
        self._awaited: dict[Leaf, int] = {}
        self._sums: dict[Leaf, Tensor] = {}

    def new(self, shape: Shape, dtype: Dtype) -> Tensor:
        """Allocate a tensor; one without elements takes no storage."""
        size = prod(shape) * dtype.bytes
        if not size:
            return Tensor(self, None, shape, dtype)
        index, events = len(self.sizes), self.events
        self.sizes.append(size)
        self.tags.append(self.component)
        events.append(index)
        return Tensor(self, Storage(events, index), shape, dtype)

    def empty_cache(self) -> None:
        """Note that the allocator gives back its cache here."""
        self.emptied.append(len(self.events))

    def launch(self, moved_bytes: int) -> None:
        """Record a kernel that is bound by the bytes it moves."""
        self.kernels.append(_bytes_bound(moved_bytes))

    def issue(self, launches: int) -> None:
        """Record host time that goes into no kernel, counted in launches."""
        self.kernels += [HOST_ONLY] * launches

    def wait(self) -> None:
        """Record that the host waits for the device, to read a value back."""
        self.kernels.append(HOST_WAITS)

    def convert(self, tensor: Tensor, dtype: Dtype) -> None:
        """Convert a weight for good, at its first use."""
        with self.tagged("weights"):
            converted = self.new(tensor.shape, dtype)
        self.once.add(self.events[-1])
        tensor.storage, tensor.dtype = converted.storage, dtype
        self.once.add(self.events[-1])

    def allocate_workspace(self) -> None:
        """Give this thread's cuBLAS handle its workspace: at its first product, forward and backward each (CUDABlas.cpp)."""
        self.workspace_due = False
        with self.tagged("workspaces"):
            workspace = self.new((self.workspace_bytes,), UINT8)
        self.workspaces.append(workspace)
        self.once.add(self.events[-1])

    def mark(self, label: str) -> None:
        """Name the section of the tape that begins here; backward repeats the name for what undoes the section."""
        self.section = label
        self._mark(label)

    def _mark(self, label: str) -> None:
        self.marks.append(self.cut(label))

    def cut(self, label: str) -> Mark:
        """Let a section begin here without a name for backward."""
        self.cuts.append(self.here(label))
        return self.cuts[-1]

    def here(self, label: str) -> Mark:
        """Return this place."""
        return Mark(label=label, event=len(self.events), kernel=len(self.kernels), storage=len(self.sizes))

    def layers(self, blocks: Sequence[T], stack: str = "") -> Iterator[T]:
        """Go through a stack of layers, marking each; of many that are alike, some are left out (deepen.py)."""
        period, count, label = self.period, len(blocks), f"{stack} layer".lstrip()
        left = period and (count - 2 * period - 2) // period
        if left > 0:
            self.left_out[stack] = left
        for index, block in enumerate(blocks):
            if left <= 0 or not period < index <= period + left * period:
                self.mark(f"{label} {index}")
                yield block

    def tagged(self, component: str) -> _Tagged:
        """Count what is allocated inside as `component`."""
        return _Tagged(self, component)

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
        edges = tuple([None if source is None else source.edge() for source in inputs])
        if not any(edges):
            return None
        self._seq += 1
        node = Node(self._seq, edges, backward, outputs, self.section)
        node.kept = kept
        out.node = node
        if any(saved):
            self._save(node, saved, None if saves_results else out)
        else:
            node.saved = saved
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

    def checkpoint(self, run: partial[T]) -> T:
        """Run a region whose saved tensors are dropped now and recomputed in backward (inside a rerun: just run it)."""
        if not self.grad_enabled or self._rerun is not None:
            return run()
        if self.reentrant:
            return self._run_unrecorded(run)
        before, self._frame = self._frame, Frame(run, self.autocast)
        try:
            return run()
        finally:
            self._frame = before

    def _run_unrecorded(self, run: partial[T]) -> T:
        """Run a region without recording; its node saves the arguments, and its backward runs region and backward (reentrant).

        Only arguments that are tensors take gradients, as in torch/utils/checkpoint.py (CheckpointFunction).
        """
        self.grad_enabled = False
        results = run()
        self.grad_enabled = True
        autocast, given, again = self.autocast, run.args, run.func
        tensors = tuple([each for each in given if isinstance(each, Tensor)])
        others = [None if isinstance(each, Tensor) else each for each in given]
        of_tensor = [isinstance(each, Tensor) for each in given]
        needed = [tensor.node is not None for tensor in tensors]
        outs = [out for out in (results if isinstance(results, tuple) else (results,)) if isinstance(out, Tensor)]
        kinds = [(out.shape, out.dtype) for out in outs]

        def backward(given: list[Tensor | None] | Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
            grads: list[Tensor | None] = given if isinstance(given, list) else [given]
            for index, kind in enumerate(kinds):  # a result that nobody used has a gradient of zeros
                grads[index] = self.new(*kind) if grads[index] is None else grads[index]
            detached = [tensor.detach() for tensor in saved]
            for tensor, need in zip(detached, needed, strict=True):
                tensor.node = Leaf() if need else None
            rest = iter(detached)
            arguments = [next(rest) if is_tensor else other for is_tensor, other in zip(of_tensor, others, strict=True)]
            results = self._recorded(partial(again, *arguments), autocast)
            remade = [out for out in (results if isinstance(results, tuple) else (results,)) if isinstance(out, Tensor)]
            del arguments
            if self._again:
                self._awaited |= _uses(remade)
            self._walk(list(zip(remade, grads, strict=True)), self.section)
            return tuple([tensor.node.grad if isinstance(tensor.node, Leaf) else None for tensor in detached])

        node = self.record(outs[0], tensors, tensors, backward, outputs=len(outs))
        for nr, out in enumerate(outs):
            out.node, out.nr = node, nr
        return results

    def _recorded(self, run: Callable[[], T], autocast: Dtype | None) -> T:
        component, self.component = self.component, "activations"
        self.grad_enabled, self.autocast = True, autocast
        try:
            return run()
        finally:
            self.grad_enabled, self.autocast, self.component = False, None, component
            self.autocast_weights.clear()

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

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Run backward from a scalar; parameters' gradients end in their leaves, `again` added to those that are there."""
        before, self.grad_enabled = self.grad_enabled, False
        self.workspace_due = len(self.workspaces) < 2
        self._again = again
        self._awaited = _uses([loss]) if again else {}
        self._walk([(loss, self.new((1,), loss.dtype))], "")
        self._awaited.clear()  # it holds what the graph's end would free
        self.grad_enabled = before

    def _walk(self, roots: list[tuple[Tensor, Tensor | None]], section: str) -> None:
        """Run nodes from the latest one down, given the gradients of some tensors."""
        waiting: dict[Node, list[Tensor | None]] = {}
        queue: list[tuple[int, Node]] = []
        while roots:
            root, grad = roots.pop()
            edge = root.edge()
            if edge is not None and grad is not None:
                self._deliver(edge, grad, waiting, queue)
            del root, grad, edge
        while queue:
            node = heapq.heappop(queue)[1]
            if node.section != section:
                section = self.section = node.section
                self.component = LOGITS_AND_LOSS if section == "loss" else TEMPORARIES
                self._mark(f"{section} backward")
            grads = self._run(node, waiting.pop(node))
            for edge in node.edges:  # nodes live until the loss dies, and `kept` with them
                grad = grads.pop(0)
                if edge is not None and grad is not None:
                    self._deliver(edge, grad, waiting, queue)
                del grad
            assert not grads

    def _deliver(
        self, edge: Edge, grad: Tensor, waiting: dict[Node, list[Tensor | None]], queue: list[tuple[int, Node]]
    ) -> None:
        node, nr, _, _ = edge
        if isinstance(node, Leaf):
            if node in self._awaited:
                self._add_to_earlier(node, grad)
            else:
                _accumulate(node, grad)
            return
        buffers = waiting.get(node)
        if buffers is None:
            buffers = waiting[node] = [None] * node.outputs
            heapq.heappush(queue, (-node.seq, node))
        held = buffers[nr]
        if held is None:
            buffers[nr] = grad
        elif not _only_ours(held):
            buffers[nr] = computed(held, held.shape, held.dtype)
        else:
            self.launch(3 * grad.bytes)

    def _add_to_earlier(self, leaf: Leaf, grad: Tensor) -> None:
        """Sum what one backward brings, then add it in place to what an earlier one left."""
        self._awaited[leaf] -= 1
        held = self._sums.get(leaf)
        if held is not None and not _only_ours(held):
            self._sums[leaf] = grad = computed(held, held.shape, held.dtype)
        elif held is not None:
            self.launch(3 * grad.bytes)
            grad = held
        if self._awaited[leaf]:
            self._sums[leaf] = grad
            return
        self._sums.pop(leaf, None)
        if leaf.grad is None:
            _accumulate(leaf, grad)
        else:
            self.launch(3 * grad.bytes)

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
        if grad.shape != shape and grad.numel != prod(shape):  # of one size: a view
            grad = _summed(grad, shape)
        grads[index] = grad if grad.dtype is dtype else computed(grad, grad.shape, dtype)


def _summed(grad: Tensor, shape: Shape) -> Tensor:
    total = computed(grad, shape, grad.dtype)
    if grad.shape[-1] == shape[-1]:
        columns = prod(shape)
        rows, card = grad.numel // columns, grad.tape.card
        grad.tape.new((column_sum_bytes(rows, columns, card=card, element_bytes=grad.dtype.bytes),), UINT8)
    return total


def _uses(results: Iterable[Tensor]) -> dict[Leaf, int]:
    """Count how often each parameter that has a gradient already was used on the way to results."""
    uses: dict[Leaf, int] = {}
    seen: set[Node] = set()
    todo = [result.node for result in results]
    while todo:
        node = todo.pop()
        if isinstance(node, Leaf):
            if node.grad is not None:
                uses[node] = uses.get(node, 0) + 1
        elif node is not None and node not in seen:
            seen.add(node)
            todo += [edge[0] for edge in node.edges if edge is not None]
    return uses


def _accumulate(leaf: Leaf, grad: Tensor) -> None:
    """Keep a first gradient, copied where it is a part of a larger one; sum a later one in place where that can be."""
    held = leaf.grad
    if held is None:
        parted = isinstance(grad, View) and grad.numel < grad.viewed.numel and grad.shape[0] > 1
        leaf.grad = grad = computed(grad, grad.shape, grad.dtype) if parted else grad
    elif not _only_ours(held):
        leaf.grad = grad = computed(held, held.shape, held.dtype)
    if grad.storage is not None:
        grad.tape.tags[grad.storage.index] = GRADIENTS


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
