"""What a config's data set means for the search: how its samples become batches under each model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

from whichlora_estimators.lengths import Epoch
from whichlora_estimators.models import load_model

from .data.lengths import Lengths, advise_seq_len
from .data.measure import Measured, measure_lengths
from .data.spec import DataSpec
from .pickconfig import PickConfig

Report = Callable[[str], None]
#: Lengths at which steps are timed; between them times are straight lines.
_WIDTHS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """The batches of a training on one model: as long as `lengths`, cut at `asked_seq_len`, and `collation` make them.

    `seq_len` tokens has the longest of them, which decides memory; `padded` says that some are padded.
    """

    lengths: Lengths
    collation: str
    asked_seq_len: int
    _epochs: dict[int, Epoch] = field(default_factory=dict, compare=False, repr=False)

    @property
    def seq_len(self) -> int:
        """Tokens a sample of the longest batch."""
        if self.collation == "pack":
            return min(self.asked_seq_len, self.lengths.tokens)
        return self.lengths.widest(self.asked_seq_len)

    @property
    def sequences(self) -> int:
        """What an epoch's batches are made of: samples, or what they are packed into."""
        return self.lengths.blocks(self.asked_seq_len) if self.collation == "pack" else self.lengths.samples

    @property
    def padded(self) -> bool:
        """Whether a batch may hold padding, so that a mask is passed."""
        return self.collation != "pack" and any(length < self.seq_len for length in self.lengths.counts)

    @property
    def widths(self) -> list[int]:
        """The lengths at which steps are to be timed, the longest one last: closer to each other where most batches are."""
        shortest = min(width for width, _ in self.epoch(1).widths)
        between = ((place / (_WIDTHS - 1)) ** 2 for place in range(_WIDTHS))
        return sorted({shortest + round((self.seq_len - shortest) * share) for share in between})

    def epoch(self, batch_size: int) -> Epoch:
        """One pass over the data in micro-batches of this size."""
        if batch_size not in self._epochs:
            found = self.lengths.epoch(batch_size, collation=self.collation, seq_len=self.asked_seq_len)
            self._epochs[batch_size] = found
        return self._epochs[batch_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a training consists of: `passes` micro-batches an epoch, `steps` of the optimizer, and tokens an epoch.

    Batches are made of `sequences`: the samples, or what they are packed into. `computed_tokens` count padding too;
    `longest_tokens` are those of a sample of the longest batch.
    """

    epochs: int
    samples: int
    sequences: int
    passes: int
    steps: int
    real_tokens: int
    computed_tokens: int
    longest_tokens: int

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer in all epochs."""
        return self.epochs * self.steps

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that is padding."""
        return max(0.0, 1 - self.real_tokens / self.computed_tokens)


def schedule(config: PickConfig, batches: Batches, batch_size: int, accumulation: int) -> Schedule:
    """Count the steps and tokens of a training in micro-batches of this size, so many to a step."""
    epoch = batches.epoch(batch_size)
    return Schedule(
        epochs=config.epochs,
        samples=batches.lengths.samples,
        sequences=batches.sequences,
        passes=epoch.steps,
        steps=ceil(epoch.steps / accumulation),
        real_tokens=round(epoch.real_tokens),
        computed_tokens=round(epoch.computed_tokens),
        longest_tokens=epoch.longest_tokens,
    )


def batches_of(config: PickConfig, model: str) -> Batches | None:
    """Return the batches that a model trains on: of its tokenizer's lengths, or all of `seq_len`; None without a data set."""
    if config.samples is None:
        return None
    known = config.lengths.get(model)
    if known is None:
        known = Lengths(counts={config.seq_len: config.samples}, learnt=config.samples * config.seq_len)
    collation = "pad" if config.data is None else config.data.collation
    return Batches(lengths=known, collation=collation, asked_seq_len=config.seq_len)


def with_data(config: PickConfig, *, offline: bool = False, report: Report = lambda _: None) -> PickConfig:
    """Return the config with the lengths of its data set, if it names one, by every model's own tokenizer.

    Models of which they are known already are not measured again.
    """
    if config.data is None:
        return config
    lengths = dict(config.lengths)
    for name in config.models:
        if name not in lengths:
            lengths[name] = _measure(config, config.data, name, offline, report).train
    config = replace(config, lengths=lengths, samples=max(lengths[name].samples for name in config.models))
    for name in config.models:
        report(f"data: {described(config, name)}")
    return config


def _measure(config: PickConfig, data: DataSpec, model: str, offline: bool, report: Report) -> Measured:
    shape = load_model(model, offline=offline)
    return measure_lengths(data, tokenizer_of(config, model), config=shape.config, offline=offline, report=report)


def described(config: PickConfig, model: str) -> str:
    """Say how long the samples are under a model's tokenizer, and what is cut off."""
    found = config.lengths[model]
    ordered = sorted(found.counts)
    basis = "" if found.evidence == "tokenizer" else ", estimated from characters"
    text = f"{model}: {found.samples:,} samples of {ordered[0]} to {ordered[-1]} tokens{basis}"
    cut, lost = found.cut(config.seq_len)
    packed = config.data is not None and config.data.packing
    return f"{text}; seq_len {config.seq_len} cuts {cut:,} of them off, {lost:,} tokens" if cut and not packed else text


def seq_len_advice(config: PickConfig, model: str, *, limit: int | None) -> str:
    """Advise on `seq_len` where another one would do better than the config's; empty where it is fine or nothing is known."""
    found = config.lengths.get(model)
    if found is None or config.data is None:
        return ""
    packing = config.data.packing
    advised, why = advise_seq_len(found, limit=limit, packing=packing)
    if limit is not None and config.seq_len > limit and found.longest > limit:
        return f"seq_len {config.seq_len} is more than the {limit} positions of the model; advised: {advised} ({why})"
    cut, lost = found.cut(config.seq_len)
    if not packing and cut > found.cut(advised)[0]:
        text = f"seq_len {config.seq_len} cuts off {cut:,} of {found.samples:,} samples, {lost:,} tokens in all"
        return f"{text}; advised: {advised} ({why})"
    if not packing and found.widest(config.seq_len) > advised:
        return f"seq_len {advised} would shorten the longest batch of {found.widest(config.seq_len)} tokens ({why})"
    return ""


def tokenizer_of(config: PickConfig, model: str) -> str:
    """Return the tokenizer that the config names for a model, or the model's own."""
    return dict(zip(config.models, config.tokenizers, strict=True))[model] if config.tokenizers else model
