"""The chosen training in words and numbers: its data, padding, steps, time of an epoch and in all, advice on `seq_len`."""

from __future__ import annotations

from collections.abc import Iterator

from whichlora_estimators.lengths import COLLATIONS
from whichlora_estimators.units import format_bytes

from .data.lengths import positions_of
from .pick import PickResult, Row
from .pickconfig import PickConfig
from .pickdata import Schedule, described, seq_len_advice
from .report_view import batch_text, format_span

#: How samples become batches, as the names of `whichlora_estimators.lengths` are said.
_COLLATED = dict(
    zip(
        COLLATIONS,
        ("padded to the longest of each batch", "grouped by length, then padded", "packed end to end"),
        strict=True,
    )
)


def training_facts(result: PickResult) -> Iterator[tuple[str, str]]:
    """Yield names and texts of what the choice's training consists of; without a data set only what was seen of it."""
    choice, config = result.choice, result.config
    if choice is not None and choice.seen:
        yield choice.evidence, _seen(choice)
    if choice is None or choice.schedule is None:
        return
    found = choice.schedule
    if choice.model in config.lengths:
        yield "data", described(config, choice.model)
    yield "tokens", _tokens(config, found)
    yield "steps", _steps(choice, found)
    if choice.time is not None:
        share = f"with {choice.time.coverage:.0%} probability" if choice.time.coverage < 1 else "as timed"
        if found.epochs > 1:
            yield "an epoch", format_span(choice.time.times(1 / found.epochs))
        limit_s = config.stage2.total_time_s
        beyond = limit_s is not None and choice.time.high_s > limit_s
        note = "; the limit lies within this range" if beyond else ""
        yield "in all", f"{format_span(choice.time)} {share}, by {choice.time.evidence}{note}"
    limit = positions_of(choice.workload.config)
    if advice := seq_len_advice(config, choice.model, limit=limit):
        yield "seq_len", advice


def _seen(choice: Row) -> str:
    parts = {
        "process bytes": choice.process_bytes and choice.process_bytes[1],
        "allocated": choice.allocated_peak_bytes,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def _tokens(config: PickConfig, found: Schedule) -> str:
    how = f"all of {config.seq_len} tokens" if config.data is None else _COLLATED[config.data.collation]
    text = f"{found.real_tokens:,} an epoch"
    if found.computed_tokens > found.real_tokens:
        text += f", {found.computed_tokens:,} with padding ({found.padding_share:.1%} waste)"
    return f"{text}; {how}, {found.longest_tokens} in the longest batch"


def _steps(choice: Row, found: Schedule) -> str:
    epochs = "1 epoch" if found.epochs == 1 else f"{found.epochs} epochs"
    return f"{found.total_steps:,} in {epochs}, {batch_text(choice)}"
