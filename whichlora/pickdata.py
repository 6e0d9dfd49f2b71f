"""What a config's data set means for the search: how many samples there are, how long, and whether they are padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from whichlora_estimators.models import load_model

from .data.lengths import Lengths
from .data.measure import Measured, measure_lengths
from .data.spec import DataSpec
from .pickconfig import PickConfig

Report = Callable[[str], None]
_ROUND_TO = 8  # tokens: what batches are padded to a multiple of


def with_data(config: PickConfig, *, offline: bool = False, report: Report = lambda _: None) -> PickConfig:
    """Return the config with what its data set says, if it names one; every model's own tokenizer counts.

    Padded batches are as long as their longest sample, so that `seq_len` falls to the longest of all; packed ones are
    full, and `samples` then counts sequences. Of several tokenizers the one that needs most stands for all.
    """
    if config.data is None:
        return config
    measured = {name: _measure(config, config.data, name, offline, report) for name in config.models}
    samples = max(_samples(config, config.data, each.train) for each in measured.values())
    seq_len, padded = config.seq_len, False
    if not config.data.packing:
        longest = max(_longest(each.train) for each in measured.values())
        seq_len = min(config.seq_len, -(-longest // _ROUND_TO) * _ROUND_TO)
        padded = any(min(each.train.counts) < min(seq_len, each.train.longest) for each in measured.values())
    report(f"data: {samples} {'sequences' if config.data.packing else 'samples'} of up to {seq_len} tokens")
    return replace(config, samples=samples, seq_len=seq_len, padded=padded)


def _measure(config: PickConfig, data: DataSpec, model: str, offline: bool, report: Report) -> Measured:
    tokenizer = tokenizer_of(config, model)
    shape = load_model(model, offline=offline)
    found = measure_lengths(data, tokenizer, config=shape.config, offline=offline, report=report)
    cut, _ = found.train.cut(config.seq_len)
    if cut and not data.packing:
        report(f"{model}: {cut} of {found.train.samples} samples are longer than seq_len {config.seq_len} and cut off")
    return found


def _longest(lengths: Lengths) -> int:
    """Return the tokens of the longest sample; as many as it may have, where they are estimated."""
    return ceil(lengths.longest * (1 + lengths.error[1]))


def _samples(config: PickConfig, data: DataSpec, lengths: Lengths) -> int:
    return lengths.blocks(config.seq_len) if data.packing else lengths.samples


def tokenizer_of(config: PickConfig, model: str) -> str:
    """Return the tokenizer that the config names for a model, or the model's own."""
    return dict(zip(config.models, config.tokenizers, strict=True))[model] if config.tokenizers else model
