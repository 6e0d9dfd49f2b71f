"""What every part of the report shares: one stage seen through the limits that hold in it, and words for its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from whichlora_calibration import TimeSpan, Verdict
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.methods import find_method
from whichlora_estimators.units import GB, format_bytes, format_seconds

from .pick import PickResult, Row, memory_limit
from .pickconfig import MethodChoice

#: How the field spells methods; any other keeps its name.
METHOD_NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "lora-fa": "LoRA-FA",
    "qlora-fa": "QLoRA-FA",
}


#: What became of a row that nothing speaks against.
WITHIN = "within every limit"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its rows in the order tried, its limits, what its times are times of, and the choice if it made one.

    `setups` and `batches` are the axes of its grid: `setup_name` says what tells setups apart, besides the batch size.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    setup_name: str
    time_name: str
    time_limit_s: float | None
    memory_limit_bytes: int
    choice: Row | None = None

    @cached_property
    def accumulations(self) -> tuple[int, ...]:
        """All numbers of micro-batches to a step, ascending."""
        return tuple(sorted({row.workload.accumulation for row in self.rows if batch_of(row) is not None}))

    def at_one_accumulation(self) -> Stage:
        """Return the stage with one number of micro-batches to a step: that of the choice, or the smallest."""
        if len(self.accumulations) < 2:
            return self
        shown = self.accumulations[0] if self.choice is None else self.choice.workload.accumulation
        kept = (row for row in self.rows if batch_of(row) is None or row.workload.accumulation == shown)
        return replace(self, rows=tuple(kept))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """All models, in the order tried: smallest first."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    @cached_property
    def setups(self) -> tuple[str, ...]:
        """All setups, in the order tried."""
        return tuple(dict.fromkeys(setup_of(row) for row in self.rows))

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """All batch sizes, ascending."""
        return tuple(sorted({batch for row in self.rows if (batch := batch_of(row)) is not None}))


def stages_of(result: PickResult) -> tuple[Stage, Stage]:
    """View both stages of a search."""
    config = result.config
    inference = Stage(
        key="stage1",
        title="Stage 1: inference",
        rows=result.stage1,
        setup_name="prompt+answer",
        time_name="time per token",
        time_limit_s=config.stage1.time_per_token_s,
        memory_limit_bytes=memory_limit(config, "generate"),
    )
    training = Stage(
        key="stage2",
        title="Stage 2: fine-tuning",
        rows=result.stage2,
        setup_name="method",
        time_name="step time" if config.samples is None else "total time",
        time_limit_s=config.stage2.total_time_s,
        memory_limit_bytes=memory_limit(config, "train"),
        choice=result.choice,
    )
    return inference, training


def seconds_of(row: Row) -> float | None:
    """Return the time that the stage is judged by; of a step where fine-tuning has no data set."""
    return row.step_s if row.time_s is None else row.time_s


def batch_of(row: Row) -> int | None:
    """Return the batch size; None for a row that stands for every batch size of its setup."""
    return None if row.process_bytes is None else row.workload.batch_size


def setup_of(row: Row) -> str:
    """Say what a row tries besides its batch size: `QLoRA r16`, or `512+128` tokens of prompt and answer."""
    workload = row.workload
    if workload.phase == "generate":
        return f"{workload.prefill_len}+{workload.decode_len}"
    name = method_name(workload.method, workload.quantization)
    ranked = f"{name} r{workload.rank}" if find_method(workload.method).has_rank else name
    return f"{ranked}, {row.variant}" if row.variant else ranked


def method_name(method: str, quantization: str) -> str:
    """Spell a method as papers do: `QLoRA`, `LoRA + int8`."""
    label = MethodChoice(method=method, quantization=quantization).label
    plain = METHOD_NAMES.get(method, method)
    return METHOD_NAMES.get(label, plain if quantization == "none" else f"{plain} + {quantization}")


def describe(row: Row) -> str:
    """Name a row's setup and batch size: `QLoRA r16, batch 4`, `prompt+answer 512+128, batch 4`."""
    kind = "prompt+answer " if row.workload.phase == "generate" else ""
    return f"{kind}{setup_of(row)}, {'any batch' if batch_of(row) is None else f'batch {short_batch(row)}'}"


def short_batch(row: Row) -> str:
    """Print the batch size and, where there are several, the micro-batches of a step: `8`, `8x4`; `any` for them all."""
    size, times = batch_of(row), row.workload.accumulation
    return "any" if size is None else f"{size}x{times}" if times > 1 else f"{size}"


def most_bytes(row: Row) -> int | None:
    """Return the process bytes that a row is judged by: the upper end of their range."""
    return None if row.process_bytes is None else row.process_bytes[1]


def outcome_of(row: Row) -> str:
    """Say in a word or two what became of a row."""
    if not row.rejected:
        return WITHIN
    if row.process_bytes is None:
        return "not predicted"
    return {Verdict.FITS: "too slow", Verdict.TIGHT: "tight", Verdict.DOES_NOT_FIT: "does not fit"}[row.verdict]


def format_limit(limit_bytes: int, card_bytes: int) -> str:
    """Print a memory limit in the unit that it was given in, and in the binary one of every other number."""
    if limit_bytes >= card_bytes:
        return f"{format_bytes(limit_bytes)}, all of the card"
    return f"{limit_bytes / GB:g} GB = {format_bytes(limit_bytes)}"


def card_memory(gpu: Gpu) -> str:
    """Print the memory of a card and how it is known."""
    basis = {"reported": "as PyTorch reports it", "rule": "by the share that similar cards report", "given": "as given"}
    return f"{format_bytes(gpu.total_bytes)}, {basis.get(gpu.memory_basis, gpu.memory_basis)}"


def format_count(count: int) -> str:
    """Shorten a count of parameters: `3.82 B`, `25.2 M`."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def format_time(duration_s: float | None) -> str:
    """Print a duration, or a dash for none."""
    return "-" if duration_s is None else format_seconds(duration_s)


def evidence_of(row: Row) -> str:
    """Name the evidence of a row's bytes, and that of its time where it is another one."""
    span = span_of(row)
    if span is None or span.evidence == row.evidence:
        return row.evidence
    return f"{row.evidence}; time {span.evidence}"


def span_of(row: Row) -> TimeSpan | None:
    """Return the time that the stage is judged by, with its interval."""
    return row.step if row.time is None else row.time


def format_range(span: TimeSpan | None) -> str:
    """Print between what a duration lies."""
    return "-" if span is None else f"{format_seconds(span.low_s)} to {format_seconds(span.high_s)}"


def format_span(span: TimeSpan | None) -> str:
    """Print a duration and between what it lies: `3.2 h (2.5 h to 4.3 h)`."""
    return "-" if span is None else f"{format_seconds(span.expected_s)} ({format_range(span)})"


def batch_text(row: Row) -> str:
    """Say what a step learns from: `batch size 8`, or `batch size 8, accumulated 4 times (32 samples a step)`."""
    size, times = row.workload.batch_size, row.workload.accumulation
    text = f"batch size {size}"
    return text if times == 1 else f"{text}, accumulated {times} times ({size * times} samples a step)"


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Name models without their organisation or folder wherever that leaves them distinct."""
    names = list(models)
    tails = [name.rstrip("/").rsplit("/", 1)[-1] or name for name in names]
    return {name: tail if tails.count(tail) == 1 else name for name, tail in zip(names, tails, strict=True)}
