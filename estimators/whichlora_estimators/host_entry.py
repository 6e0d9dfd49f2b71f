"""A processor's roofline from a few timed workloads on it: no constants ship, since every machine is its own.

A product's multiplications and the reading (and packing) of its operands come one after the other; so do all operators,
since there is no second lane: every time is a sum of work over rates.

# m x n result, k summed over
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from .errors import BadValue
from .estimate import Times, times_by
from .stack import NEWEST_STACK, Stack
from .tape import Kernel
from .timeline import Segment, lay
from .workload import Workload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

#: As many timed workloads at least: one more than there are rates.
FEWEST = 6
#: How often the weights of the fit are renewed, and the relative error below which all weigh alike.
ROUNDS, ALIKE = 20, 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a sequence of operators does: FLOPs and operands' bytes of products, bytes of products with one row, of others.

    A product of one row reads its weight once, as it lies in memory; one of several rows packs it for the caches first.
    """

    flops: float
    operand_bytes: float
    row_bytes: float
    other_bytes: float
    launches: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """What a processor takes for each part of `Work`, in the same order: seconds a FLOP, a byte, an operator as such."""

    s_per_flop: float
    s_per_operand_byte: float
    s_per_row_byte: float
    s_per_other_byte: float
    s_per_launch: float

    def seconds(self, done: Work) -> float:
        """Return the time of some work."""
        return float(sum(rate * count for rate, count in zip(astuple(self), astuple(done), strict=True)))

    def times(self, workload: Workload, *, stack: Stack = NEWEST_STACK) -> Times:
        """Return the times of a workload here. Raises as `estimate` does."""
        return Times(**{name: self.seconds(done) for name, done in work_of(workload, stack=stack).items()})


def work(kernels: Iterable[Kernel]) -> Work:
    """Sum up operators."""
    flops = operands = rows = others = launches = 0.0
    for kernel in kernels:
        launches += 1
        if kernel.m > 1:
            flops += 2.0 * kernel.batch * kernel.m * kernel.n * kernel.k
            operands += kernel.moved_bytes
        elif kernel.m:
            rows += kernel.moved_bytes
        else:
            others += kernel.moved_bytes
    return Work(flops=flops, operand_bytes=operands, row_bytes=rows, other_bytes=others, launches=launches)


def work_of(workload: Workload, *, stack: Stack = NEWEST_STACK) -> dict[str, Work]:
    """Return the work behind each of a workload's times, by the names of `Times`. Raises as `estimate` does."""
    timeline = lay(workload, stack=stack)
    kernels, fields = timeline.tape.kernels, Work.__dataclass_fields__

    def counted(part: int) -> Times:
        def count(segments: Sequence[Segment], _: bool) -> float:
            return float(sum(astuple(work(kernels[s.first.kernel : s.last.kernel]))[part] for s in segments))

        return times_by(timeline, count)

    parts = {field: counted(part) for part, field in enumerate(fields)}
    names = [name for name in Times.__dataclass_fields__ if getattr(parts["launches"], name) is not None]
    return {name: Work(**{field: getattr(part, name) for field, part in parts.items()}) for name in names}


def fit_host(measured: Sequence[tuple[Work, float]]) -> HostEntry:
    """Fit the rates to (work, seconds): least absolute relative errors, so that a disturbed time pulls no harder.

    Raises BadValue for fewer timed workloads than six, or a time that is none.
    """
    if len(measured) < FEWEST or any(not seconds > 0 for _, seconds in measured):
        todo = f"Time at least {FEWEST} workloads of different sizes (verify --on cpu)."
        raise BadValue("too few times to fit a processor", value=len(measured), todo=todo)
    import numpy as np

    rows = np.array([astuple(done) for done, _ in measured]) / np.array([[seconds] for _, seconds in measured])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1
    rows, weights, rates = rows / scale, np.ones(len(rows)), np.zeros(rows.shape[1])
    for _ in range(ROUNDS):  # iteratively reweighted least squares
        rates = _non_negative(rows * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(rows @ rates - 1), ALIKE))
    return HostEntry(**dict(zip(HostEntry.__dataclass_fields__, map(float, rates / scale), strict=True)))


def _non_negative(rows: Array, wanted: Array) -> Array:
    """Solve least squares with no coefficient below zero: the best of all choices of those above it."""
    import numpy as np

    count = rows.shape[1]
    best, lowest = np.zeros(count), float("inf")
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            found = np.zeros(count)
            found[chosen] = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)[0]
            loss = float(((rows @ found - wanted) ** 2).sum())
            if (found >= 0).all() and loss < lowest:
                best, lowest = found, loss
    return best
