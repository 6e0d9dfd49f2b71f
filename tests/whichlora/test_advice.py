"""The policy, the frontier and the advice: their laws, on real searches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from whichlora import BadValue, PickResult, config_from_fields, pick
from whichlora.advice import RANKS, advise, gains, rank_costs, relaxation
from whichlora.pick import Row
from whichlora.pickconfig import POLICY
from whichlora.policy import ALIKE, frontier, ranked
from whichlora_estimators.errors import UnknownName
from whichlora_estimators.timeline import lay

MODELS = ["gpt2", "facebook/opt-125m", "Qwen/Qwen2.5-0.5B"]
SMALL: dict[str, Any] = {
    "gpu": "l4",
    "stage1_profile": {"model_names": MODELS, "prefill_length": 64, "tokens_to_generate": 16},
    "stage2_profile": {"batch_size": [1, 4]},
    "dataset": {"samples": 100},
    "seq_len": 128,
}

CARD: dict[str, Any] = {
    "name": "small card",
    "compute_capability": "8.9",
    "sm_count": 58,
    "total_bytes": 3 * 2**30,
    "hbm_bytes_per_s": 3e11,
    "matmul_flops_per_s": {"fp32": 3e13, "bf16": 1.2e14},
}


def search(**changes: Any) -> PickResult:
    return pick(config_from_fields({**SMALL, **changes}))


@pytest.fixture(scope="module")
def varied() -> PickResult:
    """Search over all that a config may vary."""
    return search(
        methods=["lora", "qlora"],
        ranks=[4, 8],
        targets=["all-linear", ["q_proj", "v_proj"]],
        optimizer=["adamw", "sgd"],
        attention=["sdpa", "eager"],
        checkpointing=[True, False],
        stage1_profile={**SMALL["stage1_profile"], "model_names": ["facebook/opt-125m"]},
    )


def test_all_combinations_are_tried(varied: PickResult) -> None:
    """Every combination of the alternatives has its rows, and each names what was varied."""
    setups = {(row.method, row.workload.rank, row.variant, row.workload.batch_size) for row in varied.stage2}
    axes = (["all-linear", "q_proj+v_proj"], ["sdpa", "eager"], ["adamw", "sgd"], ["checkpointing", "no checkpointing"])
    variants = [", ".join(each) for each in product(*axes)]
    assert setups == set(product(["lora", "qlora"], [4, 8], variants, [1, 4]))


def test_trainable_parameters_are_the_whole_timelines(varied: PickResult) -> None:
    """What a search counts from short timelines is what the whole one trains."""
    for row in varied.stage2[::16]:
        assert row.trainable_params == lay(row.workload).trainable_params


def test_the_frontier_is_what_nothing_beats(varied: PickResult) -> None:
    """Of any two rows of the frontier each is better in something; every other row is beaten by one of it."""
    everything = search(methods=["lora", "qlora"], ranks=[4, 64])
    for result in (varied, everything):
        best = frontier(result.stage2)
        assert best
        assert all(not _beats(a, b, 0.0) for a in best for b in best if a is not b)
        assert all(any(_beats(a, row, ALIKE) for a in best) for row in result.stage2 if not row.rejected)


def _beats(a: Row, b: Row, tolerance: float) -> bool:
    assert a.process_bytes
    assert b.process_bytes
    assert a.time_s is not None
    assert b.time_s is not None
    return (
        a.parameters >= b.parameters
        and a.process_bytes[1] <= b.process_bytes[1] * (1 + tolerance)
        and a.time_s <= b.time_s * (1 + tolerance)
    )


@pytest.mark.parametrize(
    ("policy", "least"),
    [
        (["time"], lambda row: row.time_s),
        (["weights", "time"], lambda row: (row.workload.quantization != "none", row.time_s)),
        (["rank", "batch"], lambda row: -row.workload.rank),
    ],
)
def test_a_config_may_change_the_policy(policy: list[str], least: Any) -> None:
    """The first row is the best by the first criterion of the config's policy."""
    result = search(policy=policy, methods=["qlora", "lora"], ranks=[4, 8])
    rows = ranked(result.config, result.stage2)
    assert least(rows[0]) == min(map(least, rows))


def test_a_policy_names_known_criteria_once() -> None:
    """Unknown and repeated criteria are refused; the default is the documented one."""
    assert config_from_fields(SMALL).policy == POLICY
    with pytest.raises(UnknownName, match="policy"):
        config_from_fields({**SMALL, "policy": ["beauty"]})
    with pytest.raises(BadValue, match="twice"):
        config_from_fields({**SMALL, "policy": ["time", "time"]})


def test_ranks_above_one_that_does_not_fit_are_not_predicted() -> None:
    """They say so, and are no better than the rank that was tried."""
    limited = search(ranks=[4, 8, 16], stage2_profile={"batch_size": [64], "peak_memory_gb": 2.5})
    rows = [row for row in limited.stage2 if row.model == "Qwen/Qwen2.5-0.5B" and row.method == "lora"]
    assert [row.process_bytes is None for row in rows] == [False, True, True]
    assert all("rank 4" in row.rejected[0] for row in rows[1:])


def test_the_relaxation_admits_the_next_larger_model() -> None:
    """With the limits moved as told, the search chooses that model; with any one of them not, it does not."""
    limits = {"stage2_profile": {"batch_size": [1, 4], "peak_memory_gb": 1.6, "total_time_mins": 60}}
    result = search(**limits)
    found = relaxation(result)
    assert found is not None
    assert result.choice is None or found.parameters > result.choice.parameters
    (move,) = found.moves
    assert move.limit == "peak memory when fine-tuning"
    assert not move.of_card
    moved = replace(result.config, stage2=replace(result.config.stage2, peak_memory_bytes=int(move.needed)))
    choice = pick(moved).choice
    assert choice is not None
    assert choice.model == found.model
    short = replace(moved, stage2=replace(moved.stage2, peak_memory_bytes=int(move.needed * 0.97)))
    fallback = pick(short).choice
    assert fallback is None or fallback.parameters < found.parameters


def test_the_smallest_card_is_one_that_suffices() -> None:
    """Where the card's memory holds a model off, the card told runs it, and is larger than the present one."""
    result = search(
        gpu=CARD,
        stage1_profile={**SMALL["stage1_profile"], "model_names": ["gpt2", "Qwen/Qwen2.5-1.5B"]},
    )
    found = relaxation(result)
    assert found is not None
    assert found.gpu is not None
    assert any(move.of_card for move in found.moves)
    assert found.gpu.total_bytes > result.config.gpu.total_bytes
    assert pick(replace(result.config, gpu=found.gpu, models=(found.model,))).choice is not None


def test_nothing_is_larger_than_the_largest() -> None:
    """Where the largest model of the config is chosen, there is nothing to relax."""
    result = search()
    assert result.choice is not None
    assert result.choice.model == "Qwen/Qwen2.5-0.5B"
    assert relaxation(result) is None


def test_soft_limits_are_moved_one_by_one() -> None:
    """Each soft limit tells a choice that is at least as large, and none is told that was not asked for."""
    limits = {"stage2_profile": {"batch_size": [1], "peak_memory_gb": 1.5, "total_time_mins": 60}}
    result = search(**limits, soft={"memory_gb": 4, "total_time_mins": 5})
    least = 0 if result.choice is None else result.choice.parameters
    told = list(gains(result))
    assert len(told) == 2
    assert [gain.choice is not None and gain.choice.parameters >= least for gain in told[:1]] == [True]
    assert told[0].choice is not None
    assert told[0].choice.parameters > least
    assert list(gains(search())) == []


def test_rank_costs_grow_with_the_rank() -> None:
    """Trainable parameters are linear in LoRA's rank, and no rank takes less memory than a lower one."""
    costs = list(rank_costs(search(ranks=[8])))
    assert [cost.rank for cost in costs] == list(RANKS)
    assert all(cost.trainable_params * 8 == costs[1].trainable_params * cost.rank for cost in costs)
    memory = [cost.process_bytes for cost in costs]
    assert memory == sorted(memory)
    assert list(rank_costs(search(methods=["full"]))) == []


def test_advice_holds_all_parts() -> None:
    """One call gives what the parts give."""
    result = search(ranks=[8], soft={"memory_gb": 1})
    advice = advise(result)
    assert advice.relaxation == relaxation(result)
    assert advice.gains == tuple(gains(result))
    assert advice.ranks == tuple(rank_costs(result))
