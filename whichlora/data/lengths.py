"""How long samples are in tokens, and what follows: padding, packing, what a sequence length cuts off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from typing import Any

from whichlora_estimators.errors import BadValue
from whichlora_estimators.lengths import Epoch, epoch_of, lengths_from_histogram

#: Sequence lengths are advised in steps of this many tokens: tensor cores like whole tiles.
_ROUND_TO = 64
#: Batches are padded to a multiple of this many tokens: matrix units like whole tiles.
PADDED_TO = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of every sample, by length: {tokens: samples}. `learnt` counts the tokens that are trained on.

    `evidence` is "tokenizer", or "characters" where they were guessed from these; `error` is then the share by which nine
    in ten texts are missed at most, to either side.
    """

    counts: Mapping[int, int]
    learnt: int
    evidence: str = "tokenizer"
    error: tuple[float, float] = (0.0, 0.0)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(self.counts.values())

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(length * count for length, count in self.counts.items())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample: with padding, it decides the peak of memory."""
        return max(self.counts)

    @property
    def mean(self) -> float:
        """Mean tokens of a sample."""
        return self.tokens / self.samples

    def quantile(self, share: float) -> int:
        """Return the length that this share of the samples does not exceed."""
        wanted, ordered = share * self.samples, sorted(self.counts)
        reached = accumulate(self.counts[length] for length in ordered)
        return next(length for length, count in zip(ordered, reached, strict=True) if count >= wanted)

    def each(self) -> Iterator[int]:
        """Yield every sample's length, shortest first."""
        for length in sorted(self.counts):
            yield from [length] * self.counts[length]

    def cut(self, seq_len: int) -> tuple[int, int]:
        """Return how many samples a sequence length cuts off, and how many tokens are lost."""
        longer = {length: count for length, count in self.counts.items() if length > seq_len}
        return sum(longer.values()), sum((length - seq_len) * count for length, count in longer.items())

    def truncated(self, seq_len: int) -> Lengths:
        """Return the lengths after cutting off at a sequence length (learnt tokens are kept in proportion)."""
        counts: Counter[int] = Counter()
        for length, count in self.counts.items():
            counts[min(length, seq_len)] += count
        lost = self.cut(seq_len)[1]
        learnt = round(self.learnt * (1 - lost / self.tokens)) if self.tokens else 0
        return Lengths(counts=counts, learnt=learnt, evidence=self.evidence, error=self.error)

    def blocks(self, seq_len: int) -> int:
        """Return how many full sequences the samples fill when they are joined end to end (at least one)."""
        return max(1, self.tokens // seq_len)

    def widest(self, seq_len: int) -> int:
        """Return the tokens of the longest batch once padded: as many as a sample may have, where they are estimated."""
        return min(seq_len, padded(ceil(self.longest * (1 + self.error[1]))))

    def epoch(self, batch_size: int, *, collation: str, seq_len: int) -> Epoch:
        """Collate as a fine-tuning does: cut at `seq_len` and padded to whole tiles, or packed, the rest left out.

        Raises UnknownName for a collation, BadValue for sizes.
        """
        if collation == "pack":
            width = min(seq_len, self.tokens)
            whole = lengths_from_histogram({width: self.blocks(seq_len)})
            return epoch_of(whole, batch_size, collation=collation, seq_len=width)
        tiles: Counter[int] = Counter()
        for length, count in self.counts.items():
            tiles[min(padded(length), seq_len)] += count
        found = epoch_of(lengths_from_histogram(tiles), batch_size, collation=collation, seq_len=seq_len)
        return replace(found, real_tokens=float(self.truncated(seq_len).tokens))


def padded(tokens: int) -> int:
    """Return the width that a batch whose longest sample has so many tokens is padded to."""
    return -(-tokens // PADDED_TO) * PADDED_TO


def from_lengths(lengths: Iterable[int], *, learnt: int, **more: object) -> Lengths:
    """Count lengths. Raises BadValue where there are none."""
    counts = Counter(lengths)
    if not counts:
        raise BadValue("no samples to measure", todo="Give a data set with rows to train on.")
    return Lengths(counts=dict(counts), learnt=learnt, **more)  # type: ignore[arg-type]


def advise_seq_len(lengths: Lengths, *, limit: int | None = None, packing: bool = False) -> tuple[int, str]:
    """Advise a sequence length, and say why; `limit` is the most positions that the model has.

    Padded samples need no more than the longest; where one in a hundred is more than twice as long as all others, cutting
    them off there is cheaper. Packed ones fill whatever there is.
    """
    longest, most = lengths.longest, lengths.quantile(0.99)
    wanted = longest if longest <= 2 * most else most
    if packing:
        wanted = max(wanted, 4 * round(lengths.mean))
    advised = ceil(wanted / _ROUND_TO) * _ROUND_TO
    if limit is not None and advised > limit:
        cut, lost = lengths.cut(limit)
        return (
            limit,
            f"the model has {limit} positions: {cut} of {lengths.samples} samples are cut off, {lost} tokens lost",
        )
    cut, lost = lengths.cut(advised)
    if cut:
        return advised, f"{cut} of {lengths.samples} samples are longer and cut off, {lost} tokens lost"
    return advised, "no sample is longer"


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return the most positions that a model has, by its config.json; None where that does not say."""
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return next((value for value in found if isinstance(value, int)), None)
