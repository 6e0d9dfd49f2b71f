"""The two-stage search: which models serve within the limits, and the largest of them that can be fine-tuned so.

All combinations of the config are judged by formula, except those that a monotone bound settles: weights that alone
exceed the memory, and ranks above one that does not fit at any batch size. `policy.py` says which of them is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from whichlora_calibration import Prediction, TimeSpan, Verdict, corrected_times, judge, predict
from whichlora_calibration.prediction import process_range
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import context_bytes
from whichlora_estimators.methods import find_method
from whichlora_estimators.models import ModelShape, load_model
from whichlora_estimators.ranks import check_rank
from whichlora_estimators.stack import Stack
from whichlora_estimators.timeline import count_parameters
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_estimators.workload import Workload

from .notes import notes
from .pickconfig import CHECKPOINTING_ABOVE, MethodChoice, PickConfig
from .pickdata import Batches, Schedule, batches_of, schedule, with_data
from .policy import by_policy
from .setups import Setup, Setups, Widths

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration that was tried: what it takes, and why it was dropped (nothing: it satisfies every limit).

    `process_bytes` is a range: live bytes and context if the allocator is lucky, and with its usual slack. `step` is the
    optimizer's step on the longest batch; `time` is that of a generated token (stage 1) or of the whole fine-tuning
    (stage 2; None without a data set), which `schedule` counts. `variant` says what else was varied: optimizer,
    checkpointing, attention, targets, where the config names several.
    """

    model: str
    parameters: int
    workload: Workload
    variant: str = ""
    trainable_params: int | None = None
    allocated_peak_bytes: int | None = None
    process_bytes: tuple[int, int] | None = None
    step: TimeSpan | None = None
    time: TimeSpan | None = None
    schedule: Schedule | None = None
    verdict: Verdict = Verdict.DOES_NOT_FIT
    rejected: tuple[str, ...] = ()
    evidence: str = "formula"

    @property
    def step_s(self) -> float | None:
        """Seconds that a step is expected to take."""
        return None if self.step is None else self.step.expected_s

    @property
    def time_s(self) -> float | None:
        """Seconds that a token, or the whole fine-tuning, is expected to take."""
        return None if self.time is None else self.time.expected_s

    @property
    def effective_batch(self) -> int:
        """Samples that a step learns from."""
        return self.workload.batch_size * self.workload.accumulation

    @property
    def undecided(self) -> bool:
        """Whether nothing but a straddled memory limit speaks against it."""
        return self.verdict is Verdict.TIGHT and len(self.rejected) == 1

    @property
    def seen(self) -> bool:
        """Whether its bytes were rehearsed or measured."""
        return self.evidence in ("rehearsed", "measured")

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


def serving_rows(result: PickResult, model: str) -> list[Row]:
    """Return the inference of a kept model that is to be run: what may satisfy the limits, the quickest first."""
    rows = [row for row in result.stage1 if row.model == model and (not row.rejected or row.undecided)]
    return sorted(rows, key=lambda row: (bool(row.rejected), row.time_s or 0.0))


def row_notes(rows: Iterable[Row], stack: Stack) -> dict[str, list[str]]:
    """Return what one would not expect of the configurations that have numbers, each sentence with its models."""
    return notes((row.workload for row in rows if row.process_bytes is not None), stack)


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
        setups = Setups(config.gpu, config.stack, Widths(None))
        yield from _rows(config, shape, workload, [(batch, 1) for batch in config.stage1.batch_sizes], setups)


def stage2_rows(config: PickConfig, shape: ModelShape) -> Iterator[Row]:
    """Judge a model's fine-tuning with every method, rank, setup, batch size and accumulation, as `finetune` runs it."""
    batches = batches_of(config, shape.name)
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
            seq_len=config.seq_len if batches is None else batches.seq_len,
            padded=batches is not None and batches.padded,
            clip_grad_norm=config.training.clip_grad_norm,
            output_kept=False,  # Trainer takes the loss and lets the rest go
        )
        yield from _ranks(config, shape, workload, batches)


def _checkpoints(shape: ModelShape, choice: MethodChoice, asked: bool | None) -> bool:
    by_default = size_of(shape) > CHECKPOINTING_ABOVE and find_method(choice.method).allows_checkpointing
    return by_default if asked is None else asked


def _ranks(config: PickConfig, shape: ModelShape, workload: Workload, batches: Batches | None) -> Iterator[Row]:
    """Try a setup at every rank, upwards; a method without rank is tried once, and so is what no higher rank can mend."""
    ranks = config.ranks if find_method(workload.method).has_rank else config.ranks[:1]
    sizes = list(product(config.stage2.batch_sizes, config.stage2.accumulations))
    setups = Setups(config.gpu, config.stack, Widths(batches), sorted(ranks))
    for place, rank in enumerate(ranks):
        rows = _rows(config, shape, workload.with_(rank=rank), sizes, setups)
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
    """Name what the config varies besides method, rank and batches, as this workload has it."""
    targets = workload.targets if isinstance(workload.targets, str) else "+".join(workload.targets or ())
    checkpointing = "checkpointing" if workload.checkpointing else "no checkpointing"
    axes = (
        (config.targets, targets),
        (config.attentions, workload.attention),
        (config.optimizers, workload.optimizer),
        (config.checkpointing, checkpointing),
    )
    return ", ".join(name for alternatives, name in axes if len(alternatives) > 1)


def _rows(
    config: PickConfig, shape: ModelShape, workload: Workload, sizes: list[tuple[int, int]], setups: Setups
) -> list[Row]:
    """Try a setup at every batch size and accumulation; what cannot be predicted is one row that says why."""
    limit_bytes = memory_limit(config, workload.phase)
    floor_bytes = weight_floor_bytes(shape, workload) + context_bytes(config.gpu)
    blank = _blank(config, shape, workload)
    if floor_bytes > limit_bytes:
        why = f"weights alone take {format_bytes(floor_bytes)} of {format_bytes(limit_bytes)}"
        return [replace(blank, rejected=(why,))]
    try:
        check_rank(workload, config.stack)
        setup = setups.at(workload)
        return [_judged(config, blank, setup, *size) for size in sizes]
    except WhichloraError as error:
        return [replace(blank, rejected=(str(error),))]


def _judged(config: PickConfig, blank: Row, setup: Setup, batch: int, accumulation: int) -> Row:
    workload = setup.workload.with_(batch_size=batch, accumulation=accumulation)
    peak_bytes = setup.peak_bytes(batch, accumulation)
    batches = setup.widths.batches
    least, most = process_range(workload, config.gpu, peak_bytes, correction=config.correction)
    limit_bytes = memory_limit(config, workload.phase)
    verdict, reasons = _verdict(least, most, limit_bytes)
    row = replace(
        blank,
        workload=workload,
        trainable_params=setup.trainable_params,
        allocated_peak_bytes=peak_bytes,
        process_bytes=(least, most),
        schedule=None if batches is None else schedule(config, batches, batch, accumulation),
        verdict=verdict,
    )
    if verdict is Verdict.DOES_NOT_FIT:
        return replace(row, rejected=tuple(reasons))
    return _timed(config, row, setup, reasons)


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
    # at the least what is live, and the context, as in the verdict of a prediction
    least_bytes = prediction.allocated.low_bytes + prediction.estimate.context_bytes
    verdict, reasons = _verdict(least_bytes, process.high_bytes, memory_limit(config, row.workload.phase))
    found = replace(
        with_times(row, prediction.times),
        allocated_peak_bytes=prediction.estimate.allocated_peak_bytes,
        process_bytes=(process.low_bytes, process.high_bytes),
        verdict=verdict,
    )
    return replace(found, rejected=(*reasons, *too_slow(config, found))), prediction


def with_times(row: Row, spans: Mapping[str, TimeSpan]) -> Row:
    """Put other times of a step (or of prefill and decode) into a row; the whole training changes as its step does."""
    step = spans.get("step")
    if step is None:
        return replace(row, time=per_token(row.workload, spans) or row.time)
    time = None if row.time is None or not row.step_s else step.times(row.time.expected_s / row.step_s)
    return replace(row, step=step, time=time)


def _timed(config: PickConfig, row: Row, setup: Setup, reasons: list[str]) -> Row:
    """Add a row's times, corrected where that is better, and the reason if they are too long."""
    batch, accumulation = row.workload.batch_size, row.workload.accumulation
    formula = setup.times(batch, accumulation)
    spans = corrected_times(formula, row.workload, config.gpu, stack=config.stack, correction=config.correction)
    step = spans.get("step")
    if step is None:
        time = per_token(row.workload, spans)
    else:
        epoch_s = setup.epoch_s(batch, accumulation)
        assert formula.step_s
        time = None if epoch_s is None else step.times(config.epochs * epoch_s / formula.step_s)
    row = replace(row, step=step, time=time)
    return replace(row, rejected=(*reasons, *too_slow(config, row)))


def too_slow(config: PickConfig, row: Row) -> list[str]:
    """Say whether a row's expected time is beyond its limit, and by what."""
    generates = row.workload.phase == "generate"
    limit_s = config.stage1.time_per_token_s if generates else config.stage2.total_time_s
    if row.time_s is None or limit_s is None or row.time_s <= limit_s:
        return []
    what = "a token takes" if generates else "takes"
    return [f"too slow: {what} {format_seconds(row.time_s)}, limit {format_seconds(limit_s)}"]


def per_token(workload: Workload, spans: Mapping[str, TimeSpan]) -> TimeSpan | None:
    """Prefill and decode over all tokens generated, so that more of them amortise the prefill."""
    if "prefill" not in spans:
        return None
    tokens = workload.batch_size * workload.decode_len
    share = spans["prefill"].times(1 / tokens)
    decode = spans.get("decode")
    return share if decode is None else share.plus(decode.times((workload.decode_len - 1) / tokens))


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
