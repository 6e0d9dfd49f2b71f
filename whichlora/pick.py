"""The two-stage search: which models serve within the limits, and the largest of them that can be fine-tuned so.

All combinations of the config are judged by formula, except those that a monotone bound settles: weights that alone
exceed the memory, and ranks above one that does not fit at any batch size. `policy.py` says which of them is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from whichlora_calibration import Prediction, Verdict, expected_times, judge, predict
from whichlora_calibration.prediction import reserved_range
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.estimate import Estimate, Times, estimate
from whichlora_estimators.gpus import context_bytes
from whichlora_estimators.methods import find_method
from whichlora_estimators.models import ModelShape, load_model
from whichlora_estimators.ranks import check_rank
from whichlora_estimators.scaled import NotAffine, Scaled
from whichlora_estimators.timeline import count_parameters
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_estimators.workload import Workload

from .pickconfig import CHECKPOINTING_ABOVE, MethodChoice, PickConfig
from .pickdata import with_data
from .policy import by_policy

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration that was tried: what it takes, and why it was dropped (nothing: it satisfies every limit).

    `process_bytes` is a range: live bytes and context if the allocator is lucky, and with its usual slack. `time_s` is
    the time of a generated token (stage 1) or of the whole fine-tuning (stage 2; None without a data set). `variant`
    says what else was varied: optimizer, checkpointing, attention, targets, where the config names several.
    """

    model: str
    parameters: int
    workload: Workload
    variant: str = ""
    trainable_params: int | None = None
    allocated_peak_bytes: int | None = None
    process_bytes: tuple[int, int] | None = None
    step_s: float | None = None
    time_s: float | None = None
    verdict: Verdict = Verdict.DOES_NOT_FIT
    rejected: tuple[str, ...] = ()
    evidence: str = "formula"

    @property
    def undecided(self) -> bool:
        """Whether nothing but a straddled memory limit speaks against it."""
        return self.verdict is Verdict.TIGHT and len(self.rejected) == 1

    @property
    def method(self) -> str:
        """The method's usual name (`qlora`), or `inference`."""
        if self.workload.phase == "generate":
            return "inference"
        return MethodChoice(method=self.workload.method, quantization=self.workload.quantization).label


@dataclass(frozen=True, slots=True, kw_only=True)
class PickResult:
    """Both stages: all rows in the order tried, the models that stage 1 kept, the choice with its full prediction."""

    config: PickConfig
    stage1: tuple[Row, ...]
    kept: tuple[str, ...]
    stage2: tuple[Row, ...]
    choice: Row | None
    prediction: Prediction | None


def pick(config: PickConfig, *, offline: bool = False, report: Report = lambda _: None) -> PickResult:
    """Search both stages by formula; `report` is told of progress. Raises WhichloraError for an unknown model.

    A data set that the config names is measured first: it says how many samples there are and how long.
    """
    config = with_data(config, offline=offline, report=report)
    shapes = sorted((load_model(name, offline=offline) for name in config.models), key=size_of)
    stage1: list[Row] = []
    kept: list[ModelShape] = []
    for shape in shapes:
        report(f"stage 1: {shape.name}" + (f" ({shape.caveat})" if shape.caveat else ""))
        rows = list(stage1_rows(config, shape))
        if _serves(config, rows):
            kept.append(shape)
        stage1 += rows
    stage2: list[Row] = []
    for shape in kept:
        report(f"stage 2: {shape.name}")
        stage2 += stage2_rows(config, shape)
    choice, prediction = choose(config, stage2)
    return PickResult(
        config=config,
        stage1=tuple(stage1),
        kept=tuple(shape.name for shape in kept),
        stage2=tuple(stage2),
        choice=choice,
        prediction=prediction,
    )


def size_of(shape: ModelShape) -> int:
    """Return the number of parameters of a model."""
    return shape.parameters if shape.parameters is not None else count_parameters(shape.config)


def _serves(config: PickConfig, rows: list[Row]) -> bool:
    """Say whether a model satisfies stage 1; rows that straddle the limit are settled where the answer hangs on them."""
    enough = any if config.stage1.satisfy == "any" else all
    if enough(not row.rejected for row in rows):
        return True
    for index, row in enumerate(rows):
        if row.undecided:
            rows[index] = settled(config, row)[0]
            if config.stage1.satisfy == "any" and not rows[index].rejected:
                return True
    return enough(not row.rejected for row in rows)


def stage1_rows(config: PickConfig, shape: ModelShape) -> Iterator[Row]:
    """Judge a model's inference over the whole grid."""
    grid = product(config.stage1.prefill_lengths, config.stage1.tokens_to_generate)
    for prefill_len, decode_len in grid:
        workload = Workload(
            model=shape.name,
            config=shape.config,
            phase="generate",
            precision=config.precision,
            quantization=config.stage1.quantization,
            attention=config.attentions[0],
            prefill_len=prefill_len,
            decode_len=decode_len,
        )
        yield from _rows(config, shape, workload, config.stage1.batch_sizes)


def stage2_rows(config: PickConfig, shape: ModelShape) -> Iterator[Row]:
    """Judge a model's fine-tuning with every method, rank, setup and batch size."""
    setups = product(config.methods, config.targets, config.attentions, config.optimizers, config.checkpointing)
    for choice, targets, attention, optimizer, checkpointing in setups:
        workload = Workload(
            model=shape.name,
            config=shape.config,
            method=choice.method,
            quantization=choice.quantization,
            targets=targets,
            dropout=config.dropout,
            precision=config.precision,
            attention=attention,
            optimizer=optimizer,
            checkpointing=_checkpoints(shape, choice, checkpointing),
            seq_len=config.seq_len,
            padded=config.padded,
        )
        yield from _ranks(config, shape, workload)


def _checkpoints(shape: ModelShape, choice: MethodChoice, asked: bool | None) -> bool:
    by_default = size_of(shape) > CHECKPOINTING_ABOVE and find_method(choice.method).allows_checkpointing
    return by_default if asked is None else asked


def _ranks(config: PickConfig, shape: ModelShape, workload: Workload) -> Iterator[Row]:
    """Try a setup at every rank, upwards; a method without rank is tried once, and so is what no higher rank can mend."""
    ranks = config.ranks if find_method(workload.method).has_rank else config.ranks[:1]
    for place, rank in enumerate(ranks):
        rows = _rows(config, shape, workload.with_(rank=rank), config.stage2.batch_sizes)
        yield from rows
        if all(row.process_bytes is not None and row.verdict is Verdict.DOES_NOT_FIT for row in rows):
            why = f"{Verdict.DOES_NOT_FIT.value}: rank {rank} already does not, at any batch size"
            for higher in ranks[place + 1 :]:
                yield _blank(config, shape, workload.with_(rank=higher), why)
            return


def _blank(config: PickConfig, shape: ModelShape, workload: Workload, *rejected: str) -> Row:
    variant = "" if workload.phase == "generate" else _variant(config, workload)
    return Row(
        model=shape.name, parameters=size_of(shape), workload=workload, variant=variant, rejected=tuple(rejected)
    )


def _variant(config: PickConfig, workload: Workload) -> str:
    """Name what the config varies besides method, rank and batch size, as this workload has it."""
    targets = workload.targets if isinstance(workload.targets, str) else "+".join(workload.targets or ())
    checkpointing = "checkpointing" if workload.checkpointing else "no checkpointing"
    axes = (
        (config.targets, targets),
        (config.attentions, workload.attention),
        (config.optimizers, workload.optimizer),
        (config.checkpointing, checkpointing),
    )
    return ", ".join(name for alternatives, name in axes if len(alternatives) > 1)


def _rows(config: PickConfig, shape: ModelShape, workload: Workload, batch_sizes: tuple[int, ...]) -> list[Row]:
    """Try a setup at every batch size; what cannot be predicted is one row that says why."""
    limit_bytes = memory_limit(config, workload.phase)
    floor_bytes = weight_floor_bytes(shape, workload) + context_bytes(config.gpu)
    blank = _blank(config, shape, workload)
    if floor_bytes > limit_bytes:
        why = f"weights alone take {format_bytes(floor_bytes)} of {format_bytes(limit_bytes)}"
        return [replace(blank, rejected=(why,))]
    try:
        check_rank(workload, config.stack)
        setup = _Setup(config, workload)
        return [_judged(config, blank, setup, batch) for batch in batch_sizes]
    except WhichloraError as error:
        return [replace(blank, rejected=(str(error),))]


class _Setup:
    """Peaks and times of a setup by batch size: from short timelines where they scale, laid out whole elsewhere."""

    def __init__(self, config: PickConfig, workload: Workload) -> None:
        self.workload, self.gpu, self.stack = workload, config.gpu, config.stack
        self.estimates: dict[int, Estimate] = {}
        try:
            self.scaled: Scaled | None = Scaled(workload, config.gpu, stack=config.stack)
        except NotAffine:
            self.scaled = None

    @property
    def trainable_params(self) -> int:
        return self._whole(1).trainable_params if self.scaled is None else self.scaled.trainable_params

    def peak_bytes(self, batch: int) -> int:
        return (
            self._whole(batch).allocated_peak_bytes if self.scaled is None else self.scaled.allocated_peak_bytes(batch)
        )

    def times(self, batch: int) -> Times:
        return self._whole(batch).times if self.scaled is None else self.scaled.times(batch, self.gpu)

    def _whole(self, batch: int) -> Estimate:
        if batch not in self.estimates:
            workload = self.workload.with_(batch_size=batch)
            self.estimates[batch] = estimate(workload, self.gpu, stack=self.stack)
        return self.estimates[batch]


def _judged(config: PickConfig, blank: Row, setup: _Setup, batch: int) -> Row:
    workload = setup.workload.with_(batch_size=batch)
    peak_bytes = setup.peak_bytes(batch)
    least, most = (size + context_bytes(config.gpu) for size in reserved_range(workload, peak_bytes))
    limit_bytes = memory_limit(config, workload.phase)
    verdict, reasons = _verdict(least, most, limit_bytes)
    row = replace(
        blank,
        workload=workload,
        trainable_params=setup.trainable_params,
        allocated_peak_bytes=peak_bytes,
        process_bytes=(least, most),
        verdict=verdict,
    )
    if verdict is Verdict.DOES_NOT_FIT:
        return replace(row, rejected=tuple(reasons))
    return _timed(config, row, setup.times(batch), reasons)


def _verdict(least_bytes: int, most_bytes: int, limit_bytes: int) -> tuple[Verdict, list[str]]:
    """Judge a range of process bytes, with the reason where it does not fit."""
    verdict = judge(least_bytes, most_bytes, limit_bytes)
    if verdict is Verdict.FITS:
        return verdict, []
    certain = verdict is Verdict.DOES_NOT_FIT
    needed = f"at least {format_bytes(least_bytes)}" if certain else f"up to {format_bytes(most_bytes)}"
    return verdict, [f"{verdict.value}: {needed} of {format_bytes(limit_bytes)}"]


def settled(config: PickConfig, row: Row) -> tuple[Row, Prediction]:
    """Predict a row in full, allocator replayed, which narrows its range."""
    prediction = predict(row.workload, config.gpu, stack=config.stack, correction=config.correction)
    process = prediction.process
    verdict, reasons = _verdict(process.low_bytes, process.high_bytes, memory_limit(config, row.workload.phase))
    others = row.rejected[1:] if row.verdict is Verdict.TIGHT else row.rejected
    found = replace(
        row,
        allocated_peak_bytes=prediction.estimate.allocated_peak_bytes,
        process_bytes=(process.low_bytes, process.high_bytes),
        verdict=verdict,
        rejected=(*reasons, *others),
    )
    return found, prediction


def _timed(config: PickConfig, row: Row, formula: Times, reasons: list[str]) -> Row:
    times = expected_times(formula, row.workload, config.gpu, stack=config.stack, correction=config.correction)
    if row.workload.phase == "generate":
        time_s, limit_s, what = _seconds_per_token(row.workload, times), config.stage1.time_per_token_s, "a token takes"
    else:
        time_s, limit_s, what = total_s(config, row.workload, times.step_s), config.stage2.total_time_s, "takes"
    if time_s is not None and limit_s is not None and time_s > limit_s:
        reasons.append(f"too slow: {what} {format_seconds(time_s)}, limit {format_seconds(limit_s)}")
    return replace(row, step_s=times.step_s, time_s=time_s, rejected=tuple(reasons))


def _seconds_per_token(workload: Workload, times: Times) -> float | None:
    """Prefill and decode over all tokens generated, so that more of them amortise the prefill."""
    if times.prefill_s is None:
        return None
    decode_s = (times.decode_s_per_token or 0.0) * (workload.decode_len - 1)
    return (times.prefill_s + decode_s) / (workload.batch_size * workload.decode_len)


def total_s(config: PickConfig, workload: Workload, step_s: float | None) -> float | None:
    """Return the seconds of all epochs; None without a data set or a time."""
    if config.samples is None or step_s is None:
        return None
    return config.epochs * ceil(config.samples / workload.batch_size) * step_s


def memory_limit(config: PickConfig, phase: str) -> int:
    """Return the process bytes that a phase may take: what the config allows, and no more than the card has."""
    asked = (config.stage1 if phase == "generate" else config.stage2).peak_memory_bytes
    return config.gpu.total_bytes if asked is None else min(asked, config.gpu.total_bytes)


def weight_floor_bytes(shape: ModelShape, workload: Workload) -> int:
    """Bytes below which no configuration of a model goes: its parameters at the width they are stored in.

    A quantized model keeps embeddings and head wide; counted as if they were narrow too, the floor stays a floor.
    """
    bits = {"none": 32 if workload.precision.endswith("mixed") or workload.precision == "fp32" else 16, "int8": 8}
    return size_of(shape) * bits.get(workload.quantization, 4) // 8


def choose(config: PickConfig, rows: list[Row]) -> tuple[Row | None, Prediction | None]:
    """Take the best row by the policy whose full prediction keeps the limits; `rows` take what such predictions found."""
    places = {id(row): index for index, row in enumerate(rows)}
    for row in by_policy(config, [row for row in rows if not row.rejected or row.undecided]):
        found, prediction = settled(config, row)
        rows[places[id(row)]] = found
        if not found.rejected:
            return found, prediction
    return None, None
