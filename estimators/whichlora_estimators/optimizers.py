"""What optimizers keep and what their step allocates (torch.optim 2.14 foreach paths; bitsandbytes 0.50 optim/optimizer.py).

An optimizer is two functions over the trained tensors: `start` allocates the state that stays, `step` the temporaries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from .decomposed import SVD
from .errors import UnknownName, Unsupported
from .reductions import column_sum_bytes
from .tape import BF16, FP32, UINT8, Kernel, Tape, Tensor, total_bytes

OPTIMIZERS: dict[str, Optimizer] = {}


class Optimizer(ABC):
    """State and step of one optimizer."""

    name: ClassVar[str]
    #: The only method that it is for, where there is one.
    method: ClassVar[str] = ""

    @abstractmethod
    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate the state of every parameter."""

    @abstractmethod
    def step(self, parameters: Sequence[Tensor]) -> None:
        """Allocate and free what one step needs beside the state."""

    def real(self, parameters: Iterable[Any]) -> Any:
        """Return the real optimizer over parameters of PyTorch: for those that rehearsals do not know by themselves."""
        raise Unsupported("this optimizer cannot be rehearsed", value=self.name, todo="Choose another one.")


def find_optimizer(name: str, method: str = "") -> Optimizer:
    """Return an optimizer by name; UnknownName otherwise, Unsupported where it is not for the `method` that is given."""
    try:
        found = OPTIMIZERS[name]
    except KeyError:
        todo = f"Optimizers: {', '.join(sorted(OPTIMIZERS))}."
        raise UnknownName("optimizer", name, OPTIMIZERS, todo=todo) from None
    if method and found.method not in ("", method):
        raise Unsupported(f"the optimizer {name} trains {found.method} only", value=method, todo="Choose another one.")
    return found


def _register(optimizer: Optimizer) -> None:
    assert optimizer.name not in OPTIMIZERS, optimizer.name
    OPTIMIZERS[optimizer.name] = optimizer


#: How often each operator of the foreach step reads or writes something of the size of the parameters: decay, first
#: moment, scaling and update of the second, root, two divisions and additions on it, update (torch/optim/adam.py, 2.14).
ADAMW_PASSES = (2, 3, 2, 3, 2, 2, 2, 4)


class AdamW(Optimizer):
    """Two moments in the parameter's dtype; the foreach step makes the roots of the second one for a whole dtype at a time.

    Those of one dtype live until the next one's are there.
    """

    name = "adamw"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate both moments, parameter by parameter."""
        return [p.tape.new(p.shape, p.dtype) for p in parameters for _ in range(2)]

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Allocate the denominators."""
        roots: list[Tensor] = []
        for group in _by_dtype(parameters):
            roots = [p.tape.new(p.shape, p.dtype) for p in group]
            held_bytes = total_bytes(group)
            for passes in ADAMW_PASSES:
                group[0].tape.launch(passes * held_bytes)
        del roots


class FusedAdamW(Optimizer):
    """Two moments and a count of steps on the device, and one kernel for all of it (`fused=True`)."""

    name = "adamw-fused"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate the count and both moments, parameter by parameter."""
        state: list[Tensor] = []
        for p in parameters:
            state.append(p.tape.new((1,), FP32))
            state += [p.tape.new(p.shape, p.dtype) for _ in range(2)]
        return state

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Update in place."""
        for group in _by_dtype(parameters):
            group[0].tape.launch(7 * sum(p.bytes for p in group))


class LoopAdamW(AdamW):
    """One parameter after the other (`foreach=False`): a denominator lives until the next one is there."""

    name = "adamw-loop"

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Allocate a root and a denominator for each parameter."""
        denominator = None
        for p in parameters:
            root = p.tape.new(p.shape, p.dtype)
            denominator = p.tape.new(p.shape, p.dtype)
            del root
            p.tape.launch(sum(ADAMW_PASSES) * p.bytes)
        del denominator


class LoraFaAdamW(AdamW):
    """PEFT's own for LoRA-FA: a loop over the B matrices, each gradient times the inverse of A times A transposed.

    States peft/optimizers/lorafa.py (0.21). A is not among what trains, and counts as wide as B is high.
    """

    name = method = "lora-fa"
    #: Launches of each part, in launches of modules that record: Python's own outside of them take the host 0.6 of 1.36
    #: (benchmarks/host_shares.py), so that 3, 10 and 13 count as so many.
    before, inverting, after = 1, 4, 6

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Invert a matrix for each parameter, for which the host waits; what one leaves lives until the next one's is there."""
        gradient = root = None
        for p in parameters:
            rank, tape = p.shape[-1], p.tape
            square = [tape.new((rank, rank), FP32) for _ in range(3)]
            tape.kernels.append(Kernel(square[0].bytes + 2 * p.bytes, 1, rank, rank, p.shape[0], FP32.name))
            _launches(tape, self.before, square[0].bytes)
            tape.wait()
            tape.kernels.append(Kernel(2 * square[0].bytes, 1, rank, rank, 0, SVD))
            _launches(tape, self.inverting, 2 * square[0].bytes)
            narrow = [tape.new(p.shape, BF16) for _ in range(3)]  # the gradient, the product, the product scaled
            gradient = tape.new(p.shape, p.dtype)
            del narrow
            root = tape.new(p.shape, p.dtype)
            _launches(tape, self.after, (sum(ADAMW_PASSES) + 6) * p.bytes // self.after)
        del gradient, root


def _launches(tape: Tape, count: int, moved_bytes: int) -> None:
    for _ in range(count):
        tape.launch(moved_bytes)


class Sgd(Optimizer):
    """No momentum, no state."""

    name = "sgd"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate nothing."""
        return []

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients in place."""
        for group in _by_dtype(parameters):
            group[0].tape.launch(3 * sum(p.bytes for p in group))


class MomentumSgd(Sgd):
    """A momentum of each parameter, at first its gradient."""

    name = "sgd-momentum"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Copy the gradients."""
        return [p.tape.new(p.shape, p.dtype) for p in parameters]


class AdamW8bit(Optimizer):
    """Two moments of one byte with an fp32 scale per 256 values; small tensors keep fp32 moments."""

    name = "adamw-8bit"
    block = 256
    smallest = 4096
    #: How many moments a parameter has.
    count = 2

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate codes, scales, and a map for each moment, which all share."""
        state: list[Tensor] = []
        mapped = False
        for p in parameters:
            if p.numel < self.smallest:
                state += [p.tape.new(p.shape, FP32) for _ in range(self.count)]
                continue
            if not mapped:
                mapped, maps = True, [p.tape.new((self.block,), FP32) for _ in range(self.count)]
                state += maps
            blocks = -(-p.numel // self.block)
            state += self.moments(p)
            state += [p.tape.new((blocks,), FP32) for _ in range(self.count)]
        return state

    def moments(self, p: Tensor) -> list[Tensor]:
        """Allocate the codes of one parameter."""
        return [p.tape.new(p.shape, UINT8) for _ in range(self.count)]

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Update in place, one kernel a parameter."""
        for p in parameters:
            p.tape.launch(3 * p.bytes + 2 * self.count * p.numel)


class Lion8bit(AdamW8bit):
    """One moment of one byte."""

    name = "lion-8bit"
    count = 1


class PagedAdamW8bit(AdamW8bit):
    """The codes of large tensors live in managed memory, which PyTorch's allocator does not see."""

    name = "paged-adamw-8bit"
    paged_from = 100_000

    def moments(self, p: Tensor) -> list[Tensor]:
        """Allocate the codes of a small parameter."""
        return [] if p.numel >= self.paged_from else super().moments(p)


class PagedLion8bit(PagedAdamW8bit):
    """One moment, in managed memory where the tensor is large."""

    name = "paged-lion-8bit"
    count = 1


class PagedAdamW(AdamW):
    """AdamW of bitsandbytes in 32 bit: fp32 moments, in managed memory for large tensors."""

    name = "paged-adamw"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate the moments of small parameters."""
        small = [p for p in parameters if p.numel < PagedAdamW8bit.paged_from]
        return [p.tape.new(p.shape, FP32) for p in small for _ in range(2)]

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Update in place, one kernel a parameter."""
        for p in parameters:
            p.tape.launch(3 * p.bytes + 16 * p.numel)


class Adafactor(Optimizer):
    """Row and column averages of the squared gradient (transformers.optimization.Adafactor, 5.23)."""

    name = "adafactor"

    def start(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Allocate a row and a column of fp32 for a matrix, a whole copy for a vector."""
        state: list[Tensor] = []
        for p in parameters:
            if len(p.shape) >= 2:
                state.append(p.tape.new(p.shape[:-1], FP32))
                state.append(p.tape.new((*p.shape[:-2], p.shape[-1]), FP32))
            else:
                state.append(p.tape.new(p.shape, FP32))
        return state

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Go through the parameters one at a time; what one leaves in a variable dies where the next one sets it."""
        grad = weight = update = None
        for p in parameters:
            new = partial(p.tape.new, p.shape, FP32)
            half = p.dtype is not FP32
            grad = None  # until here that of the parameter before
            grad = new() if half else None
            weight = None
            weight = new() if half else None
            squares = new()
            update = new()
            del squares
            factor = _averaged_rows(p) if len(p.shape) >= 2 else None
            update = new()
            del factor
            new()  # minus the update
            p.tape.launch(12 * 4 * p.numel)
        del grad, weight, update


def _averaged_rows(p: Tensor) -> Tensor:
    """Average [..., R, C] over columns, then over rows; return the factor of the rows."""
    rows, columns = p.shape[-2:]
    p.tape.new(p.shape[:-1], FP32)
    average = p.tape.new((*p.shape[:-2], columns), FP32)
    p.tape.new((column_sum_bytes(rows, columns, card=p.tape.card),), UINT8)
    del average
    return p.tape.new(p.shape[:-1], FP32)


def _by_dtype(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group as foreach does, in the order of its hash map: what is met first comes last (ForeachUtils.h, torch 2.14)."""
    groups: dict[str, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.dtype.name, []).append(p)
    return list(groups.values())[::-1]


def clip(parameters: Sequence[Tensor]) -> None:
    """Clip gradients to a norm (torch/nn/utils/clip_grad.py, ForeachReduceOp.cu): a norm of each, then scaling in place."""
    norms: list[Tensor] = []
    for group in _by_dtype(parameters):
        new, chunks = group[0].tape.new, max(-(-p.numel // _NORM_CHUNK) for p in group)
        parts = new((len(group) * chunks,), FP32)
        norms += [new((1,), p.dtype) for p in group]
        del parts
        group[0].tape.launch(sum(p.bytes for p in group))
        group[0].tape.launch(2 * sum(p.bytes for p in group))
    if norms:
        norms[0].tape.new((len(norms),), FP32)


#: Elements that one block of a foreach kernel works on (MultiTensorApply.cuh, kChunkSize).
_NORM_CHUNK = 65536

_KINDS: tuple[type[Optimizer], ...] = (AdamW, FusedAdamW, LoopAdamW, Sgd, MomentumSgd, Adafactor, AdamW8bit, Lion8bit)
_KINDS += (PagedAdamW, PagedAdamW8bit, PagedLion8bit, LoraFaAdamW)
for _kind in _KINDS:
    _register(_kind())
