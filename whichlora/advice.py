"""What a search's answer hangs on: what the next larger model lacks, what moved limits would buy, what a rank costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from whichlora_estimators.gpus import Gpu, all_gpus
from whichlora_estimators.methods import find_method
from whichlora_estimators.models import ModelShape, load_model, shape_from_config
from whichlora_estimators.units import format_bytes, format_seconds

from .pick import PickResult, Row, memory_limit, pick, settled, stage1_rows, stage2_rows
from .pickconfig import MethodChoice, PickConfig, Soft

#: Ranks that the source reports compare.
RANKS = (4, 8, 16, 32, 64, 128)
#: More than any card has: what a search is given that shall not be limited by memory.
_ENDLESS_BYTES = 1 << 50
#: Larger cards that are tried for the next larger model, the smallest first.
_CARDS_TRIED = 8

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A limit that holds a model off: what it is now and what it would have to be, in bytes or seconds.

    `of_card` says that it is all of the card's memory, which only another card moves.
    """

    limit: str
    now: float
    needed: float
    unit: str
    of_card: bool = False

    @property
    def ratio(self) -> float:
        """By how many times the limit is overstepped."""
        return self.needed / self.now

    def __str__(self) -> str:
        show = format_bytes if self.unit == "bytes" else format_seconds
        return f"{self.limit}: {show(self.needed)} in place of {show(self.now)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """The least that would admit the next larger model: the limits to move, all of them, and the setup that then runs.

    `gpu` is the smallest card of our data on which the model satisfies every other limit; None where memory of the card
    is not what it lacks, or no card has enough.
    """

    model: str
    parameters: int
    row: Row
    moves: tuple[Move, ...]
    gpu: Gpu | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a soft limit would buy if it were moved: the choice then, None if there still is none."""

    change: str
    choice: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCost:
    """The chosen setup at another rank. `adapter_bytes` is the saved adapter, in the dtype that it trains in."""

    rank: int
    trainable_params: int
    adapter_bytes: int
    process_bytes: tuple[int, int]
    time_s: float | None
    step_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """All of it for one search; parts that do not apply are None or empty."""

    relaxation: Relaxation | None
    gains: tuple[Gain, ...]
    ranks: tuple[RankCost, ...]


def advise(result: PickResult, *, offline: bool = False, report: Report = lambda _: None) -> Advice:
    """Work out all advice on a search. Takes about as long as the search does for one model and each soft limit."""
    report("advice: what the next larger model lacks")
    return Advice(
        relaxation=relaxation(result, offline=offline),
        gains=tuple(gains(result, offline=offline)),
        ranks=tuple(rank_costs(result)),
    )


# --- the next larger model ---


def relaxation(result: PickResult, *, offline: bool = False) -> Relaxation | None:
    """Find the least that would admit the next model above the choice; None where none of the config's is larger."""
    config, choice = result.config, result.choice
    tried = {row.model: row.parameters for row in result.stage1}
    for name, parameters in sorted(tried.items(), key=lambda each: each[1]):
        if choice is not None and parameters <= choice.parameters:
            continue
        found = _least_moves(config, load_model(name, offline=offline))
        if found is not None:
            row, moves = found
            card = _smallest_card(config, name, moves, offline=offline)
            return Relaxation(model=name, parameters=parameters, row=row, moves=moves, gpu=card)
    return None


def _least_moves(config: PickConfig, shape: ModelShape) -> tuple[Row, tuple[Move, ...]] | None:
    """Return the setup of a model that oversteps the limits least, and by what; None if none can be predicted."""
    free = _without_limits(config)
    serving = [row for row in stage1_rows(free, shape) if row.process_bytes]
    tuning = [row for row in stage2_rows(free, shape) if row.process_bytes]
    if not serving or not tuning:
        return None
    best = min(tuning, key=lambda row: _overstep(_moves(config, row)))
    best, _ = settled(free, best)
    if config.stage1.satisfy == "any":
        serving = [min(serving, key=lambda row: _overstep(_moves(config, row)))]
    rows = [best, *(settled(free, row)[0] for row in serving if _moves(config, row))]
    return best, tuple(_joined(move for row in rows for move in _moves(config, row)))


def _without_limits(config: PickConfig) -> PickConfig:
    return replace(
        config,
        gpu=replace(config.gpu, total_bytes=_ENDLESS_BYTES),
        stage1=replace(config.stage1, peak_memory_bytes=None, time_per_token_s=None),
        stage2=replace(config.stage2, peak_memory_bytes=None, total_time_s=None),
    )


def _moves(config: PickConfig, row: Row) -> list[Move]:
    """Return the limits that a row oversteps."""
    assert row.process_bytes is not None
    training = row.workload.phase == "train"
    limit_bytes = memory_limit(config, row.workload.phase)
    of_card = limit_bytes == config.gpu.total_bytes
    memory = f"{'the card' if of_card else 'peak memory'} when {'fine-tuning' if training else 'serving'}"
    limit_s = config.stage2.total_time_s if training else config.stage1.time_per_token_s
    found = [Move(limit=memory, now=limit_bytes, needed=row.process_bytes[1], unit="bytes", of_card=of_card)]
    if limit_s is not None and row.time_s is not None:
        time = "total time" if training else "time per token"
        found.append(Move(limit=time, now=limit_s, needed=row.time_s, unit="seconds"))
    return [move for move in found if move.ratio > 1]


def _overstep(moves: list[Move]) -> tuple[int, float]:
    return len(moves), max((move.ratio for move in moves), default=0.0)


def _joined(moves: Iterable[Move]) -> list[Move]:
    """Keep, of several moves of one limit, the farthest."""
    farthest: dict[str, Move] = {}
    for move in moves:
        known = farthest.get(move.limit)
        if known is None or known.needed < move.needed:
            farthest[move.limit] = move
    return list(farthest.values())


def _smallest_card(config: PickConfig, model: str, moves: tuple[Move, ...], *, offline: bool) -> Gpu | None:
    """Return the card with least memory on which the model satisfies every limit that is not the card's own."""
    needed_bytes = max((move.needed for move in moves if move.of_card), default=0)
    if not needed_bytes:
        return None
    enough = sorted((card for card in all_gpus() if card.total_bytes >= needed_bytes), key=lambda c: c.total_bytes)
    for card in enough[:_CARDS_TRIED]:
        if pick(replace(config, gpu=card, models=(model,), tokenizers=()), offline=offline).choice is not None:
            return card
    return None


# --- soft limits ---


def gains(result: PickResult, *, offline: bool = False) -> Iterator[Gain]:
    """Search once more for each soft limit, moved by itself: among the chosen model and the larger ones."""
    least = 0 if result.choice is None else result.choice.parameters
    models = tuple({row.model: None for row in result.stage1 if row.parameters >= least})
    for change, config in _softened(result.config):
        config = replace(config, models=models, tokenizers=())
        yield Gain(change=change, choice=pick(config, offline=offline).choice)


def _softened(config: PickConfig) -> Iterator[tuple[str, PickConfig]]:
    soft, stage1, stage2 = config.soft, config.stage1, config.stage2
    if soft.memory_bytes is not None:
        yield f"{format_bytes(soft.memory_bytes)} more memory", _with_memory(config, soft.memory_bytes)
    if soft.total_time_s is not None and stage2.total_time_s is not None:
        longer = replace(stage2, total_time_s=stage2.total_time_s + soft.total_time_s)
        yield f"{format_seconds(soft.total_time_s)} more time", replace(config, stage2=longer)
    if soft.time_per_token_s is not None and stage1.time_per_token_s is not None:
        slower = replace(stage1, time_per_token_s=stage1.time_per_token_s + soft.time_per_token_s)
        yield f"{format_seconds(soft.time_per_token_s)} more per token", replace(config, stage1=slower)


def _with_memory(config: PickConfig, more_bytes: int) -> PickConfig:
    """Move every memory limit, the card's own included."""

    def moved(limit_bytes: int | None) -> int | None:
        return None if limit_bytes is None else limit_bytes + more_bytes

    return replace(
        config,
        soft=Soft(),
        gpu=replace(config.gpu, total_bytes=config.gpu.total_bytes + more_bytes),
        stage1=replace(config.stage1, peak_memory_bytes=moved(config.stage1.peak_memory_bytes)),
        stage2=replace(config.stage2, peak_memory_bytes=moved(config.stage2.peak_memory_bytes)),
    )


# --- ranks ---


def rank_costs(result: PickResult) -> Iterator[RankCost]:
    """Yield the choice's setup at every rank of the source reports that its layers are wide enough for."""
    choice, config = result.choice, result.config
    if choice is None or not find_method(choice.workload.method).has_rank:
        return
    workload = choice.workload
    free = replace(
        _without_limits(config),
        methods=(MethodChoice(method=workload.method, quantization=workload.quantization),),
        ranks=tuple(sorted({*RANKS, workload.rank})),
        targets=(workload.targets or "all-linear",),
        attentions=(workload.attention,),
        optimizers=(workload.optimizer,),
        checkpointing=(workload.checkpointing,),
        stage2=replace(
            config.stage2,
            batch_sizes=(workload.batch_size,),
            accumulations=(workload.accumulation,),
            total_time_s=None,
            peak_memory_bytes=None,
        ),
    )
    shape = replace(shape_from_config(workload.config, name=workload.model), parameters=choice.parameters)
    for row in stage2_rows(free, shape):
        if row.process_bytes is not None and row.trainable_params is not None:
            yield RankCost(
                rank=row.workload.rank,
                trainable_params=row.trainable_params,
                adapter_bytes=row.trainable_params * _ADAPTER_BYTES,
                process_bytes=row.process_bytes,
                time_s=row.time_s,
                step_s=row.step_s,
            )


#: PEFT trains, and saves, adapters in fp32 unless told otherwise (autocast_adapter_dtype).
_ADAPTER_BYTES = 4
