"""Samples as what a model trains on: token ids and labels, one sample each or packed; batches of them, and their order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from whichlora_estimators.errors import BadValue
from whichlora_estimators.lengths import GROUPED_BATCHES

from ..data.formats import Sample
from ..data.lengths import padded
from ..data.rows import Subsets
from ..data.spec import DataSpec
from ..data.tokens import IGNORED_LABEL, CharacterRatio, encode

Example = dict[str, list[int]]  # input_ids and labels, of one length


def make_examples(samples: Sequence[Sample], spec: DataSpec, tokenizer: Any, seq_len: int) -> list[Example]:
    """Tokenize samples and cut them off at `seq_len`; with packing, join them end to end into full sequences.

    A sample of which nothing is left to learn is left out.
    """
    encoded = (encode(sample, tokenizer) for sample in samples)
    pairs = [(list(each.ids), each.labels(completion_only=spec.completion_only)) for each in encoded]
    return _packed(pairs, seq_len) if spec.packing else _cut(pairs, seq_len)


def stand_in_examples(samples: Sequence[Sample], spec: DataSpec, ratio: CharacterRatio, seq_len: int) -> list[Example]:
    """Make examples as long as samples probably are, of a token that says nothing: for a device that computes nothing."""
    pairs = [([1] * (count := ratio.tokens(sample.text)), [1] * count) for sample in samples]
    return _packed(pairs, seq_len) if spec.packing else _cut(pairs, seq_len)


def _cut(pairs: list[tuple[list[int], list[int]]], seq_len: int) -> list[Example]:
    examples = [{"input_ids": ids[:seq_len], "labels": labels[:seq_len]} for ids, labels in pairs]
    return [each for each in examples if any(label != IGNORED_LABEL for label in each["labels"][1:])]


def _packed(pairs: list[tuple[list[int], list[int]]], seq_len: int) -> list[Example]:
    """Join samples; what does not fill a last sequence is left out, unless it is all there is."""
    ids = [token for each, _ in pairs for token in each]
    labels = [label for _, each in pairs for label in each]
    count = len(ids) // seq_len
    if not count:
        return _cut([(ids, labels)], seq_len)
    starts = range(0, count * seq_len, seq_len)
    return [{"input_ids": ids[s : s + seq_len], "labels": labels[s : s + seq_len]} for s in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a batch of examples, padded to the longest; a mask is there only if something is padded."""

    pad_id: int
    seq_len: int

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return tensors: input_ids, labels and perhaps attention_mask, [B, T]."""
        import torch

        longest = max(len(each["input_ids"]) for each in examples)
        width = min(padded(longest), max(self.seq_len, longest))
        batch = {
            "input_ids": [self._padded(each["input_ids"], width, self.pad_id) for each in examples],
            "labels": [self._padded(each["labels"], width, IGNORED_LABEL) for each in examples],
        }
        if any(len(each["input_ids"]) < width for each in examples):
            batch["attention_mask"] = [self._padded([1] * len(each["input_ids"]), width, 0) for each in examples]
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    @staticmethod
    def _padded(row: list[int], width: int, value: int) -> list[int]:
        return row + [value] * (width - len(row))


class LongestFirst:
    """The order of examples: shuffled anew each epoch, but for the first batch of all, which holds the longest ones.

    So a run that is going to run out of memory does so at once. With `grouped`, so many batches at a time are sorted by
    length, so that a batch holds samples of like lengths.
    """

    def __init__(self, lengths: Sequence[int], *, first: int, seed: int, grouped: bool = False) -> None:
        self._lengths, self._first, self._seed, self._epoch = lengths, first, seed, 0
        self._together = GROUPED_BATCHES * first if grouped else 1

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self._lengths)))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        if self._together > 1:
            starts = range(0, len(order), self._together)
            order = [index for start in starts for index in self._sorted(order[start : start + self._together])]
        if self._epoch == 0:
            longest = self._sorted(order)[: self._first]
            chosen = set(longest)
            order = [*longest, *(index for index in order if index not in chosen)]
        return iter(order)

    def _sorted(self, some: list[int]) -> list[int]:
        return sorted(some, key=lambda index: -self._lengths[index])


def make_subsets(
    samples: Subsets[Sample], spec: DataSpec, tokenizer: Any, ratio: CharacterRatio, seq_len: int
) -> tuple[list[Example], list[Example]]:
    """Return examples to train on and to validate on. Raises BadValue where nothing is left to learn."""

    def make(subset: Sequence[Sample]) -> list[Example]:
        if tokenizer is None:
            return stand_in_examples(subset, spec, ratio, seq_len)
        return make_examples(subset, spec, tokenizer, seq_len)

    train = make(samples.train)
    if not train:
        todo = "Raise seq_len, or learn prompts too (dataset.completion_only: false)."
        raise BadValue("every sample is cut off before its completion", value=seq_len, todo=todo)
    return train, make(samples.validation)
