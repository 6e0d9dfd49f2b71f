"""Which of several configurations that satisfy every limit is the best, and which of them are worth a look.

The policy is a list of criteria, each looked at only where the ones before it leave a tie. By default: the largest base
model; the least lossy storage of its weights (none, int8, then 4 bit); the method named first in the config; the higher
rank; the largest useful batch; the least time. A batch is what the optimizer's step learns from, accumulated or not; it is
of use if it is no larger than the config and the data set allow, and no smaller one is clearly quicker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .pickconfig import MethodChoice, PickConfig

if TYPE_CHECKING:
    from .pick import Row

#: A batch is useful while no smaller one of the same setup saves more than this share of the time.
TIME_TOLERANCE = 0.05
#: Memory and times that differ by less are alike: no prediction tells them apart.
ALIKE = 0.01
LOSSINESS = ("none", "int8", "nf4", "fp4")

#: A criterion: smaller is better. It sees the config, the row, and the rows that differ from it in their batches only.
Criterion = Callable[[PickConfig, "Row", Sequence["Row"]], tuple[float, ...]]

CRITERIA: Mapping[str, Criterion] = {
    "model": lambda config, row, batches: (-row.parameters,),
    "weights": lambda config, row, batches: (LOSSINESS.index(row.workload.quantization),),
    "method": lambda config, row, batches: (config.methods.index(_method(row)),),
    "rank": lambda config, row, batches: (-row.workload.rank,),
    "batch": lambda config, row, batches: _by_batch(config, row, batches),
    "time": lambda config, row, batches: (cost_s(row) or 0.0,),
}


def ranked(config: PickConfig, rows: Iterable[Row]) -> list[Row]:
    """Return the rows of stage 2 that satisfy every limit, best first by the policy."""
    return by_policy(config, [row for row in rows if not row.rejected])


def by_policy(config: PickConfig, rows: Sequence[Row]) -> list[Row]:
    """Return rows best first; what no criterion tells apart stays in the order tried."""
    setups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        setups.setdefault(_setup(row), []).append(row)

    def preference(row: Row) -> list[tuple[float, ...]]:
        return [CRITERIA[name](config, row, setups[_setup(row)]) for name in config.policy]

    return sorted(rows, key=preference)


def _by_batch(config: PickConfig, row: Row, batches: Sequence[Row]) -> tuple[float, ...]:
    """Prefer useful batches, the largest first; of those that are too large, the smallest."""
    beyond = max(0, row.effective_batch - most_useful(config, row))
    return slower_than_needed(row, batches), beyond, -row.effective_batch


def most_useful(config: PickConfig, row: Row) -> int:
    """Return the samples that a step may learn from usefully: as many as the config says, and no more than there are."""
    bounds = (config.stage2.useful_batch, None if row.schedule is None else row.schedule.sequences)
    return min((bound for bound in bounds if bound is not None), default=sys.maxsize)


def slower_than_needed(row: Row, batches: Iterable[Row]) -> bool:
    """Say whether a smaller batch of the same setup takes clearly less time: then this one is of no use."""
    time_s = cost_s(row)
    if time_s is None:
        return False
    smaller = (cost_s(other) for other in batches if other.effective_batch < row.effective_batch)
    return any(other_s is not None and other_s * (1 + TIME_TOLERANCE) < time_s for other_s in smaller)


def cost_s(row: Row) -> float | None:
    """Return the seconds of the whole fine-tuning; without a data set, those of a step for each of its samples."""
    if row.time_s is not None or row.step_s is None:
        return row.time_s
    return row.step_s / row.effective_batch


def frontier(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that no other one beats in size, memory and time (Pareto), largest model first, fastest first.

    Of rows that satisfy every limit. Memory is the upper end of the process bytes; where there is no data set, time is
    that of a step for one sample. What differs by less than ALIKE in memory and time counts as equal, and one is kept.
    """
    kept: list[Row] = []
    for row in sorted((row for row in rows if not row.rejected), key=_costs):
        if not any(_beats(other, row) for other in kept):
            kept.append(row)
    return kept


def _costs(row: Row) -> tuple[float, float, float]:
    assert row.process_bytes is not None
    return -row.parameters, cost_s(row) or 0.0, row.process_bytes[1]


def _beats(other: Row, row: Row) -> bool:
    (size, *theirs), (least, *ours) = _costs(other), _costs(row)
    return size <= least and all(their <= our * (1 + ALIKE) for their, our in zip(theirs, ours, strict=True))


def _method(row: Row) -> MethodChoice:
    return MethodChoice(method=row.workload.method, quantization=row.workload.quantization)


def _setup(row: Row) -> tuple[object, ...]:
    """Tell a setup by what varies within one search, besides batch size and accumulation."""
    workload = row.workload
    varied = (workload.targets, workload.attention, workload.optimizer, workload.checkpointing)
    return row.model, _method(row), workload.rank, *varied
