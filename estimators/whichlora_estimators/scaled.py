"""Any batch size of one setup from four short timelines, for searches over thousands of configurations.

The same setup with another batch size makes the same events in the same order; only sizes differ, and each is affine in
the batch. So timelines at two batches give every storage's size, and with it the bytes live at every place of the step.
With one more layer, all places within a section of the step (a layer's forward, a layer's backward, the loss …) shift
by the same number of bytes, so two shallow depths give the deep one. Both steps are exact, except that short cuts which
small batches take (a 4-bit product that needs no dequantized copy, say) are not seen, a little too high there, and that
the workspaces of reductions are no straight line. Times of the deep model are those of the section's launches in a row,
the added layers' as often as they come; they are computed at powers of two and are straight lines between.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .estimate import Times, times_by, times_of
from .families import find_family
from .gpus import Gpu
from .methods.targets import tells_layers_apart
from .replayed import BLOCK_BYTES
from .roofline import Roofline, launch_seconds
from .stack import NEWEST_STACK, Stack
from .stretches import Stretch, deep_seconds, stretch
from .tape import Kernel
from .tensor import WAITS
from .timeline import Segment, Timeline, lay
from .workload import Workload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

#: The batches that timelines are laid out for.
BATCHES = (16, 24)
#: How many fields of a kernel are counts; the rest says what kind it is.
_COUNTS = Kernel._fields.index("dtype")


class NotAffine(Exception):
    """A setup that does not scale: too few layers, or other events at another batch. Lay such a one out itself."""


@dataclass(frozen=True, slots=True)
class _Affine:
    """Integers as functions of the batch."""

    base: Ints
    rise: Ints

    def at(self, batch: int) -> Ints:
        return self.base + (batch - BATCHES[0]) * self.rise // (BATCHES[1] - BATCHES[0])


def _affine(low: Sequence[int], high: Sequence[int]) -> _Affine:
    """Fit integers seen at the two batches."""
    import numpy as np

    base = np.array(low, dtype=np.int64)
    return _Affine(base, np.array(high, dtype=np.int64) - base)


def _counts(kernels: Iterable[Kernel]) -> list[int]:
    return [int(count) for kernel in kernels for count in kernel[:_COUNTS]]


class _Depth:
    """A setup at one number of layers."""

    def __init__(self, workload: Workload, layers: int, key: str, gpu: Gpu | None, stack: Stack) -> None:
        config = {**workload.config, key: layers}
        import numpy as np

        card: dict[str, Any] = {"stack": stack}
        if gpu is not None:
            card |= {"compute_capability": gpu.compute_capability, "multiprocessors": gpu.sm_count}
        low, high = (lay(workload.with_(batch_size=batch), config, **card) for batch in BATCHES)
        if low.tape.events != high.tape.events or len(low.tape.kernels) != len(high.tape.kernels):
            raise NotAffine
        self.timeline, self.layers = low, layers
        self.events = np.array(low.events(), dtype=np.int64)
        self.sizes = _affine(low.tape.sizes, high.tape.sizes)
        pairs = list(zip(low.tape.kernels, high.tape.kernels, strict=True))
        distinct = dict.fromkeys(pairs)  # the same launches come again and again
        self.counts = _affine(*map(_counts, zip(*distinct, strict=True)))
        self.kinds = [kernel[_COUNTS:] for kernel, _ in distinct]
        numbers = {pair: number for number, pair in enumerate(distinct)}
        self.numbers = [numbers[pair] for pair in pairs]
        self.starts, self.sections = _sections(self.timeline, layers)

    def section_peaks(self, batch: int) -> dict[tuple[str, str], int]:
        """Return the highest live bytes within each section."""
        import numpy as np

        sizes = -(-self.sizes.at(batch) // BLOCK_BYTES) * BLOCK_BYTES
        frees = self.events < 0
        live = np.cumsum(np.where(frees, -sizes[~self.events], sizes[self.events]))
        highest = np.maximum.reduceat(live, self.starts)
        peaks: dict[tuple[str, str], int] = {}
        for section, peak in zip(self.sections, highest.tolist(), strict=True):
            if section[0] != self.timeline.setup.label:
                peaks[section] = max(peak, peaks.get(section, 0))
        return peaks

    def kernels(self, batch: int) -> list[Kernel]:
        """Return the launches at a batch size."""
        rows = self.counts.at(batch).reshape(-1, _COUNTS).tolist()
        distinct = [Kernel._make((*row, *kind)) for row, kind in zip(rows, self.kinds, strict=True)]
        return [distinct[number] for number in self.numbers]

    def stretches(self, places: Sequence[int], lane: Sequence[float], launch_s: float) -> dict[Hashable, Stretch]:
        """Return the launches of some segments by section, in their order; `lane` holds the device seconds of each."""
        found: dict[Hashable, Stretch] = {}
        for number, place in enumerate(places):
            segment = self.timeline.order[place]
            first, last = segment.first, segment.last
            marks = [mark for mark in self.timeline.tape.marks if first.event <= mark.event < last.event]
            names = ["", *(_from_nearer_end(mark.label, self.layers) for mark in marks)]
            cuts = [first.kernel, *(mark.kernel for mark in marks), last.kernel]
            for index, (name, (start, stop)) in enumerate(zip(names, pairwise(cuts), strict=True)):
                key = number, name, names[:index].count(name)
                found[key] = stretch(lane[start:stop], launch_s)
        return found


def _sections(timeline: Timeline, layers: int) -> tuple[Ints, list[tuple[str, str]]]:
    """Cut all events at segments and marks; layers are named from whichever end is nearer, so that depths compare."""
    import numpy as np

    starts: list[int] = []
    names: list[tuple[str, str]] = []
    position = 0
    for segment in (timeline.setup, *timeline.order):
        for start, label in _cuts(timeline, segment):
            starts.append(position + start - segment.first.event)
            names.append((segment.label, _from_nearer_end(label, layers)))
        position += segment.last.event - segment.first.event
    kept = [i for i in range(len(starts)) if starts[i] < (starts[i + 1] if i + 1 < len(starts) else position)]
    return np.array([starts[i] for i in kept], dtype=np.int64), [names[i] for i in kept]


def _cuts(timeline: Timeline, segment: Segment) -> list[tuple[int, str]]:
    first, last = segment.first.event, segment.last.event
    inside = [(mark.event, mark.label) for mark in timeline.tape.marks if first <= mark.event < last]
    return [(first, ""), *inside]


def _from_nearer_end(label: str, layers: int) -> str:
    words = label.split()
    if len(words) > 1 and words[0] == "layer" and 2 * int(words[1]) >= layers:
        words[1] = str(int(words[1]) - layers)
    return " ".join(words)


class Scaled:
    """One setup — model, method, lengths, precision … — at any batch size, on a card (an A100 unless told).

    Raises NotAffine where the setup does not scale, and what `lay` raises.
    """

    def __init__(self, workload: Workload, gpu: Gpu | None = None, *, stack: Stack = NEWEST_STACK) -> None:
        family = find_family(str(workload.config.get("model_type")))
        config = family.read(workload.config)
        self.layers, period = config.count(family.layers_key), family.period(config)
        shallow = 2 * period + self.layers % period  # so that the last layers are those of the deep model
        deeper = shallow + period
        if self.layers < deeper or tells_layers_apart(workload):
            raise NotAffine
        self.depths = [_Depth(workload, layers, family.layers_key, gpu, stack) for layers in (shallow, deeper)]
        self.steps = (self.layers - shallow) // period
        self.known_times: dict[tuple[int, str], Times] = {}

    @cached_property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        shallow, deeper = (depth.timeline.trainable_params for depth in self.depths)
        return int(shallow + self.steps * (deeper - shallow))

    def allocated_peak_bytes(self, batch_size: int) -> int:
        """Return the peak of allocated bytes at this batch size."""
        shallow, deeper = (depth.section_peaks(batch_size) for depth in self.depths)
        return max(int(peak + self.steps * (deeper[section] - peak)) for section, peak in shallow.items())

    def times(self, batch_size: int, gpu: Gpu) -> Times:
        """Return the times at this batch size: between powers of two, on the line through the nearest ones."""
        below = 1 << batch_size.bit_length() - 1
        times = self._times(below, gpu)
        if below == batch_size:
            return times
        return times.extended(self._times(2 * below, gpu), (batch_size - below) / below)

    def _times(self, batch_size: int, gpu: Gpu) -> Times:
        key = (batch_size, gpu.slug)
        if key not in self.known_times:
            self.known_times[key] = self._deep_times(batch_size, gpu)
        return self.known_times[key]

    def _deep_times(self, batch_size: int, gpu: Gpu) -> Times:
        """Lay the launches of both depths out on the card, and those of the added layers as often as the model has them."""
        launched = [depth.kernels(batch_size) for depth in self.depths]
        timelines = [depth.timeline for depth in self.depths]
        if any(kernel.dtype == WAITS for kernel in launched[1]):  # the lanes are level at each: times add up
            shallow, deeper = (times_of(each, kernels, gpu) for each, kernels in zip(timelines, launched, strict=True))
            return shallow.extended(deeper, self.steps)
        roofline = Roofline(gpu)
        known = {kernel: roofline.kernel_s(kernel) for kernels in launched for kernel in set(kernels)}
        lanes = [list(map(known.__getitem__, kernels)) for kernels in launched]
        order = {id(segment): place for place, segment in reversed(list(enumerate(timelines[1].order)))}

        def seconds(segments: Sequence[Segment], recording: bool) -> float:
            launch_s = launch_seconds(gpu, recording=recording)
            places = [order[id(segment)] for segment in segments]
            shallow, deeper = (
                depth.stretches(places, lane, launch_s) for depth, lane in zip(self.depths, lanes, strict=True)
            )
            return deep_seconds(shallow, deeper, self.steps, launch_s)

        return times_by(timelines[1], seconds)
