"""A prediction: an estimate, the interval that it is trusted to, its evidence, and the verdict for a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from whichlora_estimators.caveats import caveats
from whichlora_estimators.estimate import Estimate, Times, estimate
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_estimators.roofline import TimeSpan, time_span
from whichlora_estimators.stack import NEWEST_STACK, Stack
from whichlora_estimators.workload import Workload

from .cases import stack_label
from .correction import Correction, TargetCorrection
from .current import current_correction
from .forecasts import features_of, time_features
from .formula_ranges import rehearsed_coverage, rehearsed_range, with_context


class Verdict(str, Enum):
    """Whether a workload runs on a card: `tight` where the interval straddles the limit."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does-not-fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bytes that are expected, and where the measured value lies with probability `coverage`."""

    expected_bytes: int
    low_bytes: int
    high_bytes: int
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is expected of a workload on a card: bytes and seconds with their intervals, the verdict, the evidence.

    `estimate` is the formula's part, itemised; the rest is corrected by what was measured, where that is better.
    `evidence` is that of the bytes. `times` has `step`, or `prefill` and `decode` (of a token). `caveats` are sentences
    about what one would not expect of the workload.
    """

    estimate: Estimate
    allocated: Interval
    reserved: Interval
    process: Interval
    times: Mapping[str, TimeSpan]
    verdict: Verdict
    evidence: str = "formula"
    caveats: tuple[str, ...] = ()

    @property
    def expected(self) -> Times:
        """The times that are expected."""
        return _expected(self.times)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained, or generated while decoding, in a second (padding counts), as it is expected."""
        span = self.times.get("step") or self.times.get("decode")
        formula_s = self.estimate.times.step_s or self.estimate.times.decode_s_per_token
        rate = self.estimate.tokens_per_s
        return None if span is None or rate is None or formula_s is None else rate * formula_s / span.expected_s


class _Current(Enum):
    """Stands for the correction in use."""

    CURRENT = "current"


CURRENT = _Current.CURRENT
#: A correction, none, or the one in use.
Choice = Correction | None | _Current


def predict(workload: Workload, gpu: Gpu, *, stack: Stack = NEWEST_STACK, correction: Choice = CURRENT) -> Prediction:
    """Predict a workload on a card under some library versions, by the formula and the correction in use.

    Give None for the formula alone. Raises UnknownName, BadValue or Unsupported for what has no formula.
    """
    used = current_correction() if correction is CURRENT else correction
    found = estimate(workload, gpu, stack=stack)
    corrector = _Corrector(used, found, gpu, stack)
    allocated = corrector.interval("allocated", found.allocated_peak_bytes)
    reserved = corrector.interval("reserved", found.reserved_peak_bytes)
    process = corrector.process(reserved)
    return Prediction(
        estimate=found,
        allocated=allocated,
        reserved=reserved,
        process=process,
        times=corrected_times(found.times, workload, gpu, stack=stack, correction=used),
        verdict=judge(allocated.low_bytes + found.context_bytes, process.high_bytes, gpu.total_bytes),
        evidence=corrector.evidence,
        caveats=caveats(workload, stack),
    )


class _Corrector:
    """Applies a correction to the bytes of an estimate; what it says nothing of has the formula's own interval."""

    def __init__(self, correction: Correction | None, found: Estimate, gpu: Gpu, stack: Stack) -> None:
        self.correction, self.found, self.gpu = correction, found, gpu
        self.stack = stack_label(dict(stack.versions))
        self.evidence = "formula"

    def interval(self, target: str, predicted_bytes: int) -> Interval:
        """Return the interval of a counter: as learnt, or else as rehearsals show it."""
        return self._learnt(target, predicted_bytes, self._own(target, predicted_bytes))

    def process(self, reserved: Interval) -> Interval:
        """Return the interval of process bytes: as learnt, or else reserved bytes and the context."""
        if self._part("process") is not None:
            reserved = self._own("reserved", self.found.reserved_peak_bytes)
        low, high = with_context((reserved.low_bytes, reserved.high_bytes), self.found.context_bytes)
        own = Interval(
            expected_bytes=reserved.expected_bytes + self.found.context_bytes,
            low_bytes=low,
            high_bytes=high,
            coverage=reserved.coverage,
        )
        return self._learnt("process", self.found.process_bytes, own)

    def _own(self, counter: str, predicted_bytes: int) -> Interval:
        """Return the formula's own interval."""
        low, high = rehearsed_range(counter, self.found.workload.phase)
        return Interval(
            expected_bytes=predicted_bytes,
            low_bytes=int(predicted_bytes * low),
            high_bytes=int(predicted_bytes * high),
            coverage=rehearsed_coverage(),
        )

    def _part(self, target: str) -> TargetCorrection | None:
        return None if self.correction is None else self.correction.targets.get(target)

    def _learnt(self, target: str, predicted_bytes: int, own: Interval) -> Interval:
        part = self._part(target)
        if part is None or self.correction is None:
            return own
        phase, gpu = self.found.workload.phase, self.gpu.slug
        mode = part.mode(phase, gpu)
        expected = predicted_bytes * part.ratio(features_of(self.found), phase, gpu, self.stack)
        low, high = int(expected * mode.low), int(expected * mode.high)
        if mode.applied:
            self.evidence = "corrected"
        return Interval(
            expected_bytes=int(expected),
            low_bytes=min(low, own.low_bytes) if mode.joined else low,
            high_bytes=max(high, own.high_bytes) if mode.joined else high,
            coverage=self.correction.coverage,
        )


def corrected_times(
    times: Times, workload: Workload, gpu: Gpu, *, stack: Stack = NEWEST_STACK, correction: Choice = CURRENT
) -> dict[str, TimeSpan]:
    """Return the formula's times as they are expected, each with its interval."""
    used = current_correction() if correction is CURRENT else correction
    known = {"step": times.step_s, "prefill": times.prefill_s, "decode": times.decode_s_per_token}
    label = stack_label(dict(stack.versions))
    return {name: _span(name, s, workload, gpu, label, used) for name, s in known.items() if s is not None}


def expected_times(
    times: Times, workload: Workload, gpu: Gpu, *, stack: Stack = NEWEST_STACK, correction: Choice = CURRENT
) -> Times:
    """Return the formula's times, corrected where that is better."""
    return _expected(corrected_times(times, workload, gpu, stack=stack, correction=correction))


def _expected(spans: Mapping[str, TimeSpan]) -> Times:
    expected = {name: span.expected_s for name, span in spans.items()}
    return Times(
        step_s=expected.get("step"), prefill_s=expected.get("prefill"), decode_s_per_token=expected.get("decode")
    )


def _span(
    target: str, predicted_s: float, workload: Workload, gpu: Gpu, stack: str, correction: Correction | None
) -> TimeSpan:
    part = None if correction is None else correction.targets.get(target)
    bound = time_span(predicted_s, "train" if target == "step" else target)
    if part is None or correction is None or predicted_s <= 0:
        return bound
    mode = part.mode(workload.phase, gpu.slug)
    expected_s = predicted_s * part.ratio(time_features(workload, predicted_s), workload.phase, gpu.slug, stack)
    low_s, high_s = expected_s * mode.low, expected_s * mode.high
    return TimeSpan(
        expected_s=expected_s,
        low_s=min(low_s, bound.low_s) if mode.joined else low_s,
        high_s=max(high_s, bound.high_s) if mode.joined else high_s,
        coverage=correction.coverage,
        evidence="corrected" if mode.applied else "formula",
    )


def judge(least_bytes: int, most_bytes: int, limit_bytes: int) -> Verdict:
    """Compare what a workload needs with a limit: `least_bytes` if all goes well, `most_bytes` at the worst.

    The least is live bytes and context: PyTorch gives cached blocks back before it gives up.
    """
    if most_bytes <= limit_bytes:
        return Verdict.FITS
    return Verdict.TIGHT if least_bytes <= limit_bytes else Verdict.DOES_NOT_FIT


def process_range(
    workload: Workload, gpu: Gpu, allocated_peak_bytes: int, *, correction: Choice = CURRENT
) -> tuple[int, int]:
    """Bound process bytes for an allocated peak: live bytes at least, the allocator's usual slack at most, and the context.

    For searches that replay no allocator. Its upper end is no lower than what `predict` says, of a correction that only bounds.
    """
    phase, context = workload.phase, context_bytes(gpu)
    (low, _), (_, high) = rehearsed_range("allocated", phase), rehearsed_range("reserved_over_allocated", phase)
    least, most = int(allocated_peak_bytes * low), int(allocated_peak_bytes * high)
    own = with_context((least, most), context)
    used = current_correction() if correction is CURRENT else correction
    part = None if used is None else used.targets.get("process")
    if part is None:
        return own
    mode = part.mode(phase, gpu.slug)
    return own[0], max(own[1], int((most + context) * mode.high))
