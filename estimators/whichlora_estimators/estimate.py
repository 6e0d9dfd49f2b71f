"""From a workload and a card to bytes and seconds: the timeline, replayed on the allocator and on the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .allocator import BLOCK_BYTES, AllocatorConfig
from .gpus import Gpu, context_bytes
from .replayed import Moment, highest, replay
from .roofline import RooflineConstants, lane_times
from .stack import NEWEST_STACK, Stack
from .tape import Kernel
from .timeline import DECODE_STEPS, Segment, Timeline, lay, no_collector
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The moment of most live bytes: in which phase, and what was live, by component."""

    live_bytes: int
    phase: str
    components: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a workload takes on a card, by formula.

    `allocated_peak_bytes` and `reserved_peak_bytes` are what PyTorch's counters of the same names would say (a block that
    the allocator does not split counts whole); `process_bytes` is what nvidia-smi shows: reserved bytes and the context.
    """

    workload: Workload
    gpu: Gpu
    trainable_params: int
    peak: Peak
    allocated_peak_bytes: int
    reserved_peak_bytes: int
    context_bytes: int
    times: Times

    @property
    def process_bytes(self) -> int:
        """Reserved bytes and the CUDA context."""
        return self.reserved_peak_bytes + self.context_bytes

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained, or generated while decoding, in a second (padding counts)."""
        if self.times.step_s is not None:
            tokens = self.workload.accumulation * self.workload.batch_size * self.workload.seq_len
            return tokens / self.times.step_s
        if self.times.decode_s_per_token is not None:
            return self.workload.batch_size / self.times.decode_s_per_token
        return None

    @property
    def breakdown(self) -> dict[str, int]:
        """Process bytes by component: what is live at the peak, then fragmentation and context.

        Fragmentation is what the allocator reserves beyond the peak's live bytes.
        """
        fragmentation = self.reserved_peak_bytes - self.peak.live_bytes
        return {**self.peak.components, "fragmentation": fragmentation, "CUDA context": self.context_bytes}


def estimate(
    workload: Workload, gpu: Gpu, *, allocator: AllocatorConfig | None = None, stack: Stack = NEWEST_STACK
) -> Estimate:
    """Estimate a workload on a card under some library versions.

    Raises UnknownName, BadValue or Unsupported for what has no formula.
    """
    with no_collector():
        timeline = lay(workload, compute_capability=gpu.compute_capability, multiprocessors=gpu.sm_count, stack=stack)
        state, moment = replay(timeline, allocator)
        return Estimate(
            workload=workload,
            gpu=gpu,
            trainable_params=timeline.trainable_params if workload.phase == "train" else 0,
            peak=find_peak(timeline, moment),
            allocated_peak_bytes=state.allocated_peak_bytes,
            reserved_peak_bytes=state.reserved_peak_bytes,
            context_bytes=context_bytes(gpu),
            times=times_of(timeline, timeline.tape.kernels, gpu),
        )


def step_times(workload: Workload, gpu: Gpu, widths: Iterable[int]) -> dict[int, float]:
    """Return seconds of a training step at each of some lengths. Raises as `estimate` does."""
    found = {}
    for width in widths:
        shorter = workload.with_(seq_len=width)
        timeline = lay(shorter, compute_capability=gpu.compute_capability, multiprocessors=gpu.sm_count)
        step_s = times_of(timeline, timeline.tape.kernels, gpu).step_s
        assert step_s is not None
        found[width] = step_s
    return found


def find_peak(timeline: Timeline, moment: Moment | None = None) -> Peak:
    """Tell what is live at a timeline's highest moment, and when that is."""
    moment = moment or highest(timeline)
    components = _components(timeline, moment.live)
    return Peak(live_bytes=sum(components.values()), phase=_phase(timeline, moment.event), components=components)


def _phase(timeline: Timeline, position: int) -> str:
    """Name the segment that holds an event, told finer by the tape's marks: `backward: layer 3`, `forward: loss`."""
    for segment in (timeline.setup, *timeline.order):
        count = segment.last.event - segment.first.event
        if position < count:
            event = segment.first.event + position
            sections = [m.label for m in timeline.tape.marks if segment.first.event <= m.event <= event]
            return f"{segment.label}: {sections[-1].removesuffix(' backward')}" if sections else segment.label
        position -= count
    raise AssertionError(position)


def _components(timeline: Timeline, live: Iterable[int]) -> dict[str, int]:
    """Sum what is live by component, in the order in which components first come up."""
    tags, sizes = timeline.tape.tags, timeline.tape.sizes
    sums = dict.fromkeys(tags, 0)
    for storage in live:
        sums[tags[storage]] += -(-sizes[storage] // BLOCK_BYTES) * BLOCK_BYTES
    return {tag: size for tag, size in sums.items() if size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of a training step, or of prefill and of a decoded token (None: there is no such phase)."""

    step_s: float | None = None
    prefill_s: float | None = None
    decode_s_per_token: float | None = None

    def extended(self, deeper: Times, steps: float) -> Times:
        """Continue the line from this depth through a deeper one for `steps` of their difference."""

        def line(here: float | None, there: float | None) -> float | None:
            return None if here is None or there is None else here + steps * (there - here)

        return Times(
            step_s=line(self.step_s, deeper.step_s),
            prefill_s=line(self.prefill_s, deeper.prefill_s),
            decode_s_per_token=line(self.decode_s_per_token, deeper.decode_s_per_token),
        )


def times_of(
    timeline: Timeline, kernels: Sequence[Kernel], gpu: Gpu, *, constants: RooflineConstants | None = None
) -> Times:
    """Return the times of a timeline on a card, with these launches in place of its own.

    Give other `constants` for what the roofline would say had it been fitted otherwise.
    """

    def seconds(segments: Sequence[Segment], recording: bool) -> float:
        launched = [kernel for s in segments for kernel in kernels[s.first.kernel : s.last.kernel]]
        return lane_times(launched, gpu, constants=constants, recording=recording).total_s

    return times_by(timeline, seconds)


def times_by(timeline: Timeline, seconds: Callable[[Sequence[Segment], bool], float]) -> Times:
    """Return the times of a timeline, given what tells the seconds of segments in a row and whether they are recorded."""
    by_label = {segment.label: segment for segment in timeline.order}
    if "prefill" not in by_label:
        return Times(step_s=seconds(_first_step(timeline.order), True))
    steps = sorted(
        (label for label in by_label if label.startswith("decode ")), key=lambda label: int(label.split()[1])
    )
    times = [seconds([by_label[label]], False) for label in steps]
    decode = _mean_step(times, timeline.skipped_decode_steps) if steps else None
    return Times(prefill_s=seconds([by_label["prefill"]], False), decode_s_per_token=decode)


def _first_step(order: Sequence[Segment]) -> list[Segment]:
    """Return what happens up to the first update of the parameters, less the making of the optimizer's state."""
    last = next(place for place, segment in enumerate(order) if segment.label == "optimizer step")
    return [segment for segment in order[: last + 1] if segment.label != "optimizer state"]


def _mean_step(times: list[float], skipped: int) -> float:
    """Average decode steps; skipped ones count as their neighbours' mean, since time grows evenly with the cache."""
    if not skipped:
        return sum(times) / len(times)
    between = (times[DECODE_STEPS - 2] + times[DECODE_STEPS - 1]) / 2
    return (sum(times) + skipped * between) / (len(times) + skipped)
