"""Plans that are verified: in their order, until one keeps the limits."""

from __future__ import annotations

import dataclasses

import pytest

from whichlora.pick import pick
from whichlora.pickconfig import config_from_fields
from whichlora.plan import Candidate, Plan, read_plan, write_outputs
from whichlora.verify import Options, verify_plan
from whichlora_estimators.errors import Unsupported

from ..rehearse.conftest import TINY, tiny

pytestmark = pytest.mark.stack

FIELDS = {
    "gpu": "l4",
    "stage1_profile": {"model_names": ["gpt2"]},
    "stage2_profile": {"batch_size": [1], "total_time_mins": 60},
    "dataset": {"samples": 100},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan as `pick` writes it."""
    folder = tmp_path_factory.mktemp("plan")
    write_outputs(pick(config_from_fields(FIELDS), offline=True), folder)
    return read_plan(folder)


def altered(plan: Plan, *workloads: object, peak_memory_bytes: int | None = None) -> Plan:
    """Return the plan with other survivors, and another limit."""
    first = plan.survivors[0]
    candidates: tuple[Candidate, ...] = tuple(dataclasses.replace(first, workload=each) for each in workloads)
    limits = dataclasses.replace(plan.stage2, peak_memory_bytes=peak_memory_bytes)
    return dataclasses.replace(plan, choice=candidates[0], survivors=candidates, stage2=limits, models={"tiny": TINY})


def test_the_first_survivor_that_keeps_the_limits_is_the_best(plan: Plan) -> None:
    """What runs out of memory or oversteps the limit is told and passed over; what comes after is spared."""
    small = dataclasses.replace(plan.gpu, total_bytes=2 * 2**30)
    tried = altered(
        plan,
        tiny(id="large", method="full", batch_size=64, seq_len=4096),
        tiny(id="over", batch_size=16, seq_len=1024),
        tiny(id="fits"),
        tiny(id="spared"),
        tiny(id="spared too"),
        peak_memory_bytes=600 * 10**6,
    )
    found = verify_plan(tried, on="null", gpu=small, options=Options(steps=1, warmup=0))
    assert [each.verification.workload.id for each in found.checked] == ["large", "over", "fits"]
    reasons = [each.rejected[0] if each.rejected else "" for each in found.checked]
    assert reasons[0].startswith("rehearsed: out of memory in ")
    assert "limit" in reasons[1]
    assert found.best is found.checked[-1]
    assert found.spared == 2
    assert [each.time_s for each in found.checked] == [None] * 3
    assert found.unchecked == ("time (that of a card)",)


def test_times_are_those_of_all_steps(plan: Plan) -> None:
    """The whole fine-tuning takes as much longer than the plan's as the median step does: here so many steps in all."""
    tried = altered(plan, tiny(precision="fp32", seq_len=16))
    found = verify_plan(tried, on="cpu", options=Options(steps=2, warmup=0))
    assert found.best
    step = found.best.verification.measurement.step
    assert step
    assert found.best.time_s == pytest.approx((step.median_s or 0) * 100)


def test_what_cannot_run_there_is_refused_before_anything_runs(plan: Plan) -> None:
    """A plan for quantised weights is not verified on the host."""
    with pytest.raises(Unsupported, match="nf4"):
        verify_plan(altered(plan, tiny(precision="fp32"), tiny(quantization="nf4")), on="cpu")


def test_a_model_has_to_serve_before_it_is_tuned(plan: Plan) -> None:
    """Inference of the choice is run first; beyond the limit of stage 1, none of the model's training is run."""
    assert [each.workload.phase for each in plan.serving] == ["generate"]
    small = dataclasses.replace(
        plan.serving[0], workload=tiny(id="serve", phase="generate", prefill_len=8, decode_len=2)
    )
    tried = dataclasses.replace(altered(plan, tiny(id="train")), serving=(small,))
    found = verify_plan(tried, on="null", options=Options(steps=1, warmup=0))
    assert [each.candidate.workload.id for each in found.checked] == ["serve", "train"]
    assert found.best is found.checked[-1]
    strict = dataclasses.replace(tried, stage1=dataclasses.replace(tried.stage1, peak_memory_bytes=1))
    found = verify_plan(strict, on="null", options=Options(steps=1, warmup=0))
    assert [each.candidate.workload.id for each in found.checked] == ["serve"]
    assert (found.best, found.spared) == (None, 1)
