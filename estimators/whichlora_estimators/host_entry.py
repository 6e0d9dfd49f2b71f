"""A processor's roofline from a few timed workloads on it: no constants ship, since every machine is its own.

# seconds = FLOPs * a + bytes * b + launches * c, none of the three below zero
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import BadValue
from .tape import Kernel

#: Three rates are fitted: as many timed workloads at least.
FEWEST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """What a processor takes for a FLOP of a matrix product, a byte moved by anything else, and an operator as such."""

    s_per_flop: float
    s_per_byte: float
    s_per_launch: float

    def seconds(self, kernels: Iterable[Kernel]) -> float:
        """Return the time of a sequence of operators, one after the other: there is no second lane."""
        rates = (self.s_per_flop, self.s_per_byte, self.s_per_launch)
        return sum(rate * count for rate, count in zip(rates, work(kernels), strict=True))


def work(kernels: Iterable[Kernel]) -> tuple[float, float, float]:
    """Return FLOPs, bytes of what is no product of several rows, and operators.

    A product with one row reads its weight once and is bound by that, so its bytes count.
    """
    flops = moved = launches = 0.0
    for kernel in kernels:
        flops += 2.0 * kernel.batch * kernel.m * kernel.n * kernel.k
        moved += kernel.moved_bytes if kernel.m <= 1 else 0
        launches += 1
    return flops, moved, launches


def fit_host(measured: Sequence[tuple[Sequence[Kernel], float]]) -> HostEntry:
    """Fit the three rates to (operators, seconds): least squares of relative errors, rates that would be negative at 0.

    Raises BadValue for fewer than three timed workloads, or a time that is none.
    """
    if len(measured) < FEWEST or any(not seconds > 0 for _, seconds in measured):
        todo = f"Time at least {FEWEST} workloads of different sizes."
        raise BadValue("too few times to fit a processor", value=len(measured), todo=todo)
    import numpy as np

    rows = np.array([[count / seconds for count in work(kernels)] for kernels, seconds in measured])
    best, rates = float("inf"), np.zeros(3)
    for chosen in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):
        found = np.zeros(3)
        scale = np.abs(rows[:, chosen]).max(axis=0)
        scale[scale == 0] = 1
        found[list(chosen)] = np.linalg.lstsq(rows[:, chosen] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        loss = float(((rows @ found - 1) ** 2).sum())
        if (found >= 0).all() and loss < best:
            best, rates = loss, found
    return HostEntry(s_per_flop=float(rates[0]), s_per_byte=float(rates[1]), s_per_launch=float(rates[2]))
