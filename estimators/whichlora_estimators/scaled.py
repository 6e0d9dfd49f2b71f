"""Any batch size and rank of one setup from a few short timelines, for searches over thousands of configurations.

The same setup with another batch size makes the same events in the same order; only sizes differ, and each is affine in
the batch. So timelines at two batches give every storage's size, and with it the bytes live at every place of the step.
With the rank it is the same, so that where a search has several, timelines at the lowest and the highest give all between;
one of those is laid out to see that it is so.
With one more layer, all places within a section of the step (a layer's forward, a layer's backward, the loss …) shift
by the same number of bytes, so two shallow depths give the deep one. Both steps are exact, except that short cuts which
small batches take (a 4-bit product that needs no dequantized copy, say) are not seen, a little too high there, and that
the workspaces of reductions are no straight line. Times of the deep model are those of the section's launches in a row,
the added layers' as often as they come; they are computed at powers of two and are straight lines between.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .allocator import BLOCK_BYTES
from .estimate import Times, times_by, times_of
from .families import find_family
from .gpus import Gpu
from .methods.targets import tells_layers_apart
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
#: By which share of all bytes a rank in between may be off: partial norms of gradients are counted in chunks.
RANK_TOLERANCE = 1e-5
#: How many fields of a kernel are counts; the rest says what kind it is.
_COUNTS = Kernel._fields.index("dtype")


class NotAffine(Exception):
    """A setup that does not scale: too few layers, or other events at another batch. Lay such a one out itself."""


@dataclass(frozen=True, slots=True)
class _Affine:
    """Integers as functions of the batch, and of the rank from the lowest to the highest."""

    lowest: tuple[Ints, Ints]  # at the lowest rank, at both batches
    highest: tuple[Ints, Ints]
    ranks: tuple[int, int]

    def at(self, batch: int, rank: int) -> Ints:
        low = _between(*self.lowest, BATCHES, batch)
        if self.ranks[0] == self.ranks[1]:
            return low
        return _between(low, _between(*self.highest, BATCHES, batch), self.ranks, rank)


def _between(low: Ints, high: Ints, places: tuple[int, int], place: int) -> Ints:
    """Return what lies on the line through two places."""
    return low + (place - places[0]) * (high - low) // (places[1] - places[0])


def _affine(corners: Sequence[Sequence[int]], ranks: tuple[int, int]) -> _Affine:
    """Fit integers seen at the two batches, for one rank or for two."""
    import numpy as np

    seen = [np.array(corner, dtype=np.int64) for corner in corners]
    return _Affine((seen[0], seen[1]), (seen[-2], seen[-1]), ranks)


def _counts(kernels: Iterable[Kernel]) -> list[int]:
    return [int(count) for kernel in kernels for count in kernel[:_COUNTS]]


class _Depth:
    """A setup at one number of layers, for the ranks from one to another."""

    def __init__(
        self, workload: Workload, layers: int, key: str, card: Mapping[str, Any], ranks: tuple[int, int]
    ) -> None:
        import numpy as np

        self.config = {**workload.config, key: layers}
        corners = [workload.with_(rank=rank, batch_size=batch) for rank in sorted({*ranks}) for batch in BATCHES]
        laid = [lay(corner, self.config, **card) for corner in corners]
        low, tapes = laid[0], [timeline.tape for timeline in laid]
        for tape in tapes[1:]:
            if low.tape.events != tape.events or len(low.tape.kernels) != len(tape.kernels):
                raise NotAffine
        self.timeline, self.layers, self.ranks = low, layers, ranks
        self.params = laid[0].trainable_params, laid[-1].trainable_params
        self.events = np.array(low.events(), dtype=np.int64)
        self.sizes = _affine([tape.sizes for tape in tapes], ranks)
        launches = list(zip(*(tape.kernels for tape in tapes), strict=True))
        distinct = dict.fromkeys(launches)  # the same launches come again and again
        self.counts = _affine([_counts(kernels) for kernels in zip(*distinct, strict=True)], ranks)
        self.kinds = [kernels[0][_COUNTS:] for kernels in distinct]
        numbers = {kernels: number for number, kernels in enumerate(distinct)}
        self.numbers = [numbers[kernels] for kernels in launches]
        self.starts, self.sections = _sections(self.timeline, layers)

    def check(self, workload: Workload, card: Mapping[str, Any]) -> None:
        """Compare with a timeline at a rank in between, where clipping's few bytes may be others. Raises NotAffine."""
        tape, rank = lay(workload.with_(batch_size=BATCHES[0]), self.config, **card).tape, workload.rank
        if tape.events != self.timeline.tape.events or tape.kernels != self.kernels(BATCHES[0], rank):
            raise NotAffine
        off = sum(
            abs(size - expected) for size, expected in zip(tape.sizes, self.sizes.at(BATCHES[0], rank), strict=True)
        )
        if off > RANK_TOLERANCE * sum(tape.sizes):
            raise NotAffine

    def trainable_params(self, rank: int) -> int:
        """Count the elements that train."""
        low, high = self.params
        return low if low == high else low + (rank - self.ranks[0]) * (high - low) // (self.ranks[1] - self.ranks[0])

    def section_peaks(self, batch: int, rank: int) -> dict[tuple[str, str], int]:
        """Return the highest live bytes within each section."""
        import numpy as np

        sizes = -(-self.sizes.at(batch, rank) // BLOCK_BYTES) * BLOCK_BYTES
        frees = self.events < 0
        live = np.cumsum(np.where(frees, -sizes[~self.events], sizes[self.events]))
        highest = np.maximum.reduceat(live, self.starts)
        peaks: dict[tuple[str, str], int] = {}
        for section, peak in zip(self.sections, highest.tolist(), strict=True):
            if section[0] != self.timeline.setup.label:
                peaks[section] = max(peak, peaks.get(section, 0))
        return peaks

    def kernels(self, batch: int, rank: int) -> list[Kernel]:
        """Return the launches at a batch size and rank."""
        rows = self.counts.at(batch, rank).reshape(-1, _COUNTS).tolist()
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
    """One setup — model, method, rank, lengths, precision … — at any batch size, on a card (an A100 unless told).

    Given several `ranks`, ascending, `at_rank` tells of the same setup at others of them. Raises NotAffine where the setup
    does not scale, and what `lay` raises.
    """

    def __init__(
        self, workload: Workload, gpu: Gpu | None = None, *, stack: Stack = NEWEST_STACK, ranks: Sequence[int] = ()
    ) -> None:
        family = find_family(str(workload.config.get("model_type")))
        config = family.read(workload.config)
        self.layers, period = config.count(family.layers_key), family.period(config)
        shallow = 2 * period + self.layers % period  # so that the last layers are those of the deep model
        deeper = shallow + period
        if self.layers < deeper or tells_layers_apart(workload):
            raise NotAffine
        card: dict[str, Any] = {"stack": stack}
        if gpu is not None:
            card |= {"compute_capability": gpu.compute_capability, "multiprocessors": gpu.sm_count}
        self.rank, known = workload.rank, ranks or [workload.rank]
        ends = known[0], known[-1]
        self.ranks = ends
        self.depths = [_Depth(workload, layers, family.layers_key, card, ends) for layers in (shallow, deeper)]
        if len(known) > len(ends):
            self.depths[0].check(workload.with_(rank=known[len(known) // 2]), card)
        self.steps = (self.layers - shallow) // period
        self.known_times: dict[tuple[int, str], Times] = {}

    def at_rank(self, rank: int) -> Scaled:
        """Return the same setup at another of its ranks."""
        other = copy(self)
        other.rank, other.known_times = rank, {}
        return other

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        shallow, deeper = (depth.trainable_params(self.rank) for depth in self.depths)
        return shallow + self.steps * (deeper - shallow)

    def allocated_peak_bytes(self, batch_size: int) -> int:
        """Return the peak of allocated bytes at this batch size."""
        shallow, deeper = (depth.section_peaks(batch_size, self.rank) for depth in self.depths)
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
        launched = [depth.kernels(batch_size, self.rank) for depth in self.depths]
        timelines = [depth.timeline for depth in self.depths]
        if any(WAITS in kind for kind in self.depths[1].kinds):  # the lanes are level at each: times add up
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
