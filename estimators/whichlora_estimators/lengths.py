"""How long the samples of a data set are, and what batches of them look like once collated.

Pure arithmetic on a histogram of token counts. Collations as Transformers and TRL do them: `pad` draws samples at random
and pads each batch to its longest; `group` sorts within 50 batches first (transformers.trainer_pt_utils,
get_length_grouped_indices, 5.23); `pack` lays samples end to end and cuts (trl's packing strategy "wrapped").

# B samples a batch, F share of samples up to a length
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, exp, isfinite, log, sqrt
from statistics import NormalDist

from .errors import BadValue, UnknownName

COLLATIONS = ("pad", "group", "pack")
#: Batches that Transformers sorts together where it groups by length.
GROUPED_BATCHES = 50
#: Into how many equally likely lengths a described distribution is cut.
_POINTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Samples by their number of tokens: (tokens, samples) in ascending order, both positive."""

    histogram: tuple[tuple[int, float], ...]

    @property
    def samples(self) -> float:
        """Count the samples."""
        return sum(count for _, count in self.histogram)

    @property
    def tokens(self) -> float:
        """Count the tokens of all samples."""
        return sum(length * count for length, count in self.histogram)

    @property
    def mean_tokens(self) -> float:
        """Average tokens a sample."""
        return self.tokens / self.samples

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sample."""
        return self.histogram[-1][0]

    def quantile(self, share: float) -> int:
        """Return the smallest length up to which `share` of the samples lies."""
        wanted = share * self.samples * (1 - 1e-12)
        sums = accumulate(count for _, count in self.histogram)
        return next(length for (length, _), total in zip(self.histogram, sums, strict=True) if total >= wanted)

    def truncated(self, longest_tokens: int) -> Lengths:
        """Cut samples at a length, as tokenizers with `max_length` do."""
        cut = Counter[int]()
        for length, count in self.histogram:
            cut[min(length, longest_tokens)] += count  # type: ignore[assignment]  # counts may be fractions
        return Lengths(histogram=tuple(sorted(cut.items())))

    def scaled(self, samples: float) -> Lengths:
        """Return the same shape with so many samples."""
        factor = samples / self.samples
        return Lengths(histogram=tuple((length, count * factor) for length, count in self.histogram))


def lengths_of(tokens: Iterable[int]) -> Lengths:
    """Count samples by their lengths. Raises BadValue for none, or for one that is no positive whole number."""
    counts = Counter(tokens)
    for length in counts:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise BadValue(
                "a length must be a positive whole number of tokens", value=length, todo="Give token counts."
            )
    return _checked({length: float(count) for length, count in counts.items()})


def lengths_from_histogram(histogram: Mapping[int, float]) -> Lengths:
    """Take {tokens: samples} as it is. Raises BadValue where a number is not positive."""
    return _checked(dict(histogram))


def _checked(histogram: dict[int, float]) -> Lengths:
    if not histogram:
        raise BadValue("no lengths are given", value=histogram, todo="Give the tokens of at least one sample.")
    for length, count in histogram.items():
        if length < 1 or not isfinite(count) or not count > 0:
            raise BadValue(
                "lengths and their counts must be positive", value=(length, count), todo="Correct the counts."
            )
    return Lengths(histogram=tuple(sorted(histogram.items())))


def lengths_from_percentiles(percentiles: Mapping[float, float], samples: float) -> Lengths:
    """Draw straight lines between percentiles (50 for the median; 0 and 100 default to the nearest given one).

    Raises BadValue for none, for one outside 0 to 100, and where lengths fall as percentiles rise.
    """
    points = sorted(percentiles.items())
    lengths = [length for _, length in points]
    if not points or points[0][0] < 0 or points[-1][0] > 100 or lengths != sorted(lengths) or lengths[0] < 1:
        todo = "Give percentiles from 0 to 100 whose lengths rise, such as p50=210 p95=430 p100=768."
        raise BadValue("these percentiles are no distribution", value=dict(points), todo=todo)
    drawn = [_between(points, 100 * (index + 0.5) / _POINTS) for index in range(_POINTS)]
    return _equally_likely([*drawn[1:], lengths[-1]], samples)


def _between(points: Sequence[tuple[float, float]], percentile: float) -> float:
    for (low, a), (high, b) in pairwise(points):
        if low <= percentile <= high:
            return a + (b - a) * (percentile - low) / (high - low)
    return points[0][1] if percentile < points[0][0] else points[-1][1]


def lengths_from_mean(
    mean_tokens: float, samples: float, *, percentile: float = 95, at_percentile_tokens: float
) -> Lengths:
    """Take the log-normal distribution with this mean and this percentile: lengths of texts are skewed to the right.

    Raises BadValue where no such distribution has that mean, as where the percentile lies far above it.
    """
    z = NormalDist().inv_cdf(percentile / 100) if 0 < percentile < 100 else 0.0
    spread = z * z - 2 * log(at_percentile_tokens / mean_tokens) if mean_tokens > 0 < at_percentile_tokens else -1.0
    if z <= 0 or spread < 0 or at_percentile_tokens < mean_tokens:
        todo = (
            "Give a percentile above 50 with a length above the mean, such as mean=210 p95=430; or percentiles alone."
        )
        raise BadValue("no distribution has this mean and percentile", value=mean_tokens, todo=todo)
    sigma = z - sqrt(spread)
    normal = NormalDist(log(mean_tokens) - sigma * sigma / 2, max(sigma, 1e-9))
    return _equally_likely([exp(normal.inv_cdf((i + 0.5) / _POINTS)) for i in range(_POINTS)], samples)


def _equally_likely(lengths: Sequence[float], samples: float) -> Lengths:
    counts: dict[int, float] = {}
    for length in lengths:
        whole = max(1, round(length))
        counts[whole] = counts.get(whole, 0.0) + samples / len(lengths)
    return _checked(counts)


# Collated --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over a data set in batches of `batch_size`.

    `widths` says how long batches are: (tokens a sample, share of the steps), ascending; `real_tokens` are those of the
    samples, `computed_tokens` with the padding. `longest_tokens` is the width of the batch that decides memory.
    """

    batch_size: int
    steps: int
    real_tokens: float
    computed_tokens: float
    longest_tokens: int
    widths: tuple[tuple[int, float], ...]

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that is padding."""
        return max(0.0, 1 - self.real_tokens / self.computed_tokens)


def epoch_of(lengths: Lengths, batch_size: int, *, collation: str, seq_len: int) -> Epoch:
    """Collate a data set whose samples are cut at `seq_len` (for `pack`, laid end to end and cut there).

    The last batch counts as a whole one. Raises UnknownName for a collation, BadValue for sizes.
    """
    if collation not in COLLATIONS:
        raise UnknownName("collation", collation, COLLATIONS, todo=f"Collations: {', '.join(COLLATIONS)}.")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise BadValue(f"{name} must be a positive whole number", value=value, todo="Give 1 or more.")
    if collation == "pack":
        return _packed(lengths, batch_size, seq_len)
    cut = lengths.truncated(seq_len)
    widths = _grouped_widths(cut, batch_size) if collation == "group" else _random_widths(cut, batch_size)
    steps = ceil(cut.samples / batch_size)
    computed = cut.samples * sum(width * share for width, share in widths)
    return Epoch(
        batch_size=batch_size,
        steps=steps,
        real_tokens=cut.tokens,
        computed_tokens=max(computed, cut.tokens),
        longest_tokens=cut.longest_tokens,
        widths=widths,
    )


def _packed(lengths: Lengths, batch_size: int, seq_len: int) -> Epoch:
    rows = ceil(lengths.tokens / seq_len)
    return Epoch(
        batch_size=batch_size,
        steps=ceil(rows / batch_size),
        real_tokens=lengths.tokens,
        computed_tokens=float(rows * seq_len),
        longest_tokens=seq_len,
        widths=((seq_len, 1.0),),
    )


def _random_widths(lengths: Lengths, batch_size: int) -> tuple[tuple[int, float], ...]:
    """Return the longest of B random samples: it is at most a length with probability F^B."""
    sums = list(accumulate(count for _, count in lengths.histogram))
    below = [0.0, *((total / lengths.samples) ** batch_size for total in sums)]
    return tuple((length, below[i + 1] - below[i]) for i, (length, _) in enumerate(lengths.histogram))


def _grouped_widths(lengths: Lengths, batch_size: int) -> tuple[tuple[int, float], ...]:
    """Return the longest of each batch where 50 batches are sorted: order statistics of 50 B samples, at their means."""
    batches = max(1, min(GROUPED_BATCHES, ceil(lengths.samples / batch_size)))
    together = batches * batch_size
    shares: dict[int, float] = {}
    for index in range(batches):
        width = lengths.quantile((together - index * batch_size) / (together + 1))
        shares[width] = shares.get(width, 0.0) + 1 / batches
    return tuple(sorted(shares.items()))
