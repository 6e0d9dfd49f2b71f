"""What a setup of the search takes: peaks and times by batch size and accumulation, and a whole training over real lengths.

A second and any further pass of an accumulated step are alike, so that one and two passes give all. How long steps on
shorter batches take, as a share of those on the longest one, is worked out once for all ranks: it hardly hangs on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import ceil

from whichlora_estimators.estimate import Estimate, Times, estimate
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.scaled import NotAffine, Scaled
from whichlora_estimators.schedule import epoch_seconds
from whichlora_estimators.stack import Stack
from whichlora_estimators.workload import Workload

from .pickdata import Batches


class Curve:
    """A workload by its batch size alone: from short timelines where they scale, laid out whole elsewhere.

    Given several `ranks`, ascending, timelines are laid out for all of them at once.
    """

    def __init__(self, workload: Workload, gpu: Gpu, stack: Stack, ranks: Sequence[int] = ()) -> None:
        self.workload, self.gpu, self.stack, self.ranks = workload, gpu, stack, ranks
        self.estimates: dict[int, Estimate] = {}
        self.scaled = self._scaled()

    def _scaled(self) -> Scaled | None:
        for ranks in dict.fromkeys(
            (tuple(self.ranks), ())
        ):  # of what does not grow evenly with the rank, this one's alone
            try:
                return Scaled(self.workload, self.gpu, stack=self.stack, ranks=ranks)
            except NotAffine:
                continue
        return None

    def at_rank(self, rank: int) -> Curve:
        """Return the curve at another rank: from the same timelines, if they were laid out for it."""
        workload = self.workload.with_(rank=rank)
        if self.scaled is None or not self.scaled.ranks[0] <= rank <= self.scaled.ranks[1]:
            return Curve(workload, self.gpu, self.stack)
        other = copy(self)
        other.workload, other.estimates, other.scaled = workload, {}, self.scaled.at_rank(rank)
        return other

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        return self._whole(1).trainable_params if self.scaled is None else self.scaled.trainable_params

    def peak_bytes(self, batch: int) -> int:
        """Return the peak of allocated bytes."""
        return (
            self._whole(batch).allocated_peak_bytes if self.scaled is None else self.scaled.allocated_peak_bytes(batch)
        )

    def times(self, batch: int) -> Times:
        """Return the times of a step, or of prefill and decode."""
        return self._whole(batch).times if self.scaled is None else self.scaled.times(batch, self.gpu)

    def step_s(self, batch: int) -> float:
        """Return the seconds of a training step."""
        step_s = self.times(batch).step_s
        assert step_s is not None
        return step_s

    def with_(self, **changes: object) -> Curve:
        """Return the curve of another workload on the same card."""
        return Curve(self.workload.with_(**changes), self.gpu, self.stack)

    def _whole(self, batch: int) -> Estimate:
        if batch not in self.estimates:
            workload = self.workload.with_(batch_size=batch)
            self.estimates[batch] = estimate(workload, self.gpu, stack=self.stack)
        return self.estimates[batch]


class Widths:
    """How long the steps of an epoch take on average, as a share of the step on the longest batch."""

    def __init__(self, batches: Batches | None) -> None:
        self.batches = batches
        self.curves: dict[int, Curve] = {}

    def mean_share(self, longest: Curve, batch: int) -> float:
        """Return the share for a batch size; curves of shorter batches are those of the first setup that asks."""
        if self.batches is None or len(widths := self.batches.widths) == 1:
            return 1.0
        if not self.curves:
            shorter = {width: longest.with_(seq_len=width) for width in widths[:-1]}
            self.curves = {**shorter, self.batches.seq_len: longest}
        times = {width: curve.step_s(batch) for width, curve in self.curves.items()}
        epoch = self.batches.epoch(batch)
        return epoch_seconds(epoch, times) / epoch.steps / times[self.batches.seq_len]


class Setup:
    """A setup of the search: peaks, times of the step on the longest batch, seconds of an epoch."""

    def __init__(self, once: Curve, widths: Widths) -> None:
        self.once, self.widths = once, widths
        self._twice: Curve | None = None

    @property
    def workload(self) -> Workload:
        """The workload, at some batch size."""
        return self.once.workload

    def at_rank(self, rank: int) -> Setup:
        """Return the setup at another rank."""
        other = Setup(self.once.at_rank(rank), self.widths)
        other._twice = self._twice and self._twice.at_rank(rank)
        return other

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        return self.once.trainable_params

    @property
    def twice(self) -> Curve:
        """The same with two passes to a step: from the second one on gradients are there already."""
        if self._twice is None:
            once = self.once
            self._twice = Curve(once.workload.with_(accumulation=2), once.gpu, once.stack, once.ranks)
        return self._twice

    def peak_bytes(self, batch: int, accumulation: int) -> int:
        """Return the peak of allocated bytes."""
        return (self.once if accumulation == 1 else self.twice).peak_bytes(batch)

    def times(self, batch: int, accumulation: int) -> Times:
        """Return the times of a step of so many passes, or of prefill and decode."""
        once = self.once.times(batch)
        return once if accumulation == 1 else once.extended(self.twice.times(batch), accumulation - 1)

    def epoch_s(self, batch: int, accumulation: int) -> float | None:
        """Return the seconds of a pass over the data set; None without one. The last step counts as a whole one."""
        if self.widths.batches is None:
            return None
        passes = self.widths.batches.epoch(batch).steps
        steps = ceil(passes / accumulation)
        longest_s = self.once.step_s(batch)
        shorter_s = longest_s * (1 - self.widths.mean_share(self.once, batch))
        further_s = self.twice.step_s(batch) - longest_s if passes > steps else 0.0
        return steps * longest_s + (passes - steps) * further_s - passes * shorter_s


class Setups:
    """The setups of a search that differ in rank alone: from the timelines of the first that is asked for."""

    def __init__(self, gpu: Gpu, stack: Stack, widths: Widths, ranks: Sequence[int] = ()) -> None:
        self.gpu, self.stack, self.widths, self.ranks = gpu, stack, widths, ranks
        self._first: Setup | None = None

    def at(self, workload: Workload) -> Setup:
        """Return the setup of a workload. Raises WhichloraError for what has no formula."""
        if self._first is None:
            self._first = Setup(Curve(workload, self.gpu, self.stack, self.ranks), self.widths)
            return self._first
        return self._first.at_rank(workload.rank)
