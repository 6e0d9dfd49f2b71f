"""What a setup of the search takes: peaks and times by batch size and accumulation, and a whole training over real lengths.

A second and any further pass of an accumulated step are alike, so that one and two passes give all. How long steps on
shorter batches take, as a share of those on the longest one, is worked out once for all ranks: it hardly hangs on them.
"""

from __future__ import annotations

from math import ceil

from whichlora_estimators.estimate import Estimate, Times, estimate
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.scaled import NotAffine, Scaled
from whichlora_estimators.schedule import epoch_seconds
from whichlora_estimators.stack import Stack
from whichlora_estimators.workload import Workload

from .pickdata import Batches


class Curve:
    """A workload by its batch size alone: from short timelines where they scale, laid out whole elsewhere."""

    def __init__(self, workload: Workload, gpu: Gpu, stack: Stack) -> None:
        self.workload, self.gpu, self.stack = workload, gpu, stack
        self.estimates: dict[int, Estimate] = {}
        try:
            self.scaled: Scaled | None = Scaled(workload, gpu, stack=stack)
        except NotAffine:
            self.scaled = None

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

    def __init__(self, workload: Workload, gpu: Gpu, stack: Stack, widths: Widths) -> None:
        self.workload, self.widths = workload, widths
        self.once = Curve(workload, gpu, stack)
        self._twice: Curve | None = None

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        return self.once.trainable_params

    @property
    def twice(self) -> Curve:
        """The same with two passes to a step: from the second one on gradients are there already."""
        if self._twice is None:
            self._twice = self.once.with_(accumulation=2)
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
