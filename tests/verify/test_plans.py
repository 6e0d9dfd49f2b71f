"""Plans that are verified: in their order, until one keeps the limits."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from whichlora.plan import Plan
from whichlora.verify import Options, find_place, verify_plan
from whichlora_estimators.errors import Unsupported
from whichlora_profiles_db import open_store

from ..rehearse.conftest import tiny
from .conftest import altered

pytestmark = pytest.mark.stack


def test_the_first_survivor_that_keeps_the_limits_of_a_model_that_serves_is_the_best(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference is run first; what runs out of memory or oversteps the limit is passed over; what comes after is spared."""
    assert [each.workload.phase for each in plan.serving] == ["generate"]
    serves = tiny(id="serves", phase="generate", prefill_len=8, decode_len=2)
    tried = altered(
        plan,
        tiny(id="large", method="full", batch_size=64, seq_len=4096),
        tiny(id="over", batch_size=16, seq_len=1024),
        tiny(id="fits"),
        tiny(id="spared"),
        tiny(id="spared too"),
        peak_memory_bytes=600 * 10**6,
    )
    tried = dataclasses.replace(tried, serving=(dataclasses.replace(plan.serving[0], workload=serves),))
    here = find_place("null", dataclasses.replace(plan.gpu, total_bytes=2 * 2**30))
    options = Options(steps=1, warmup=0, store=open_store(tmp_path / "profiles.duckdb"))
    found = verify_plan(tried, on=here, options=options)
    assert [each.verification.workload.id for each in found.checked] == ["serves", "large", "over", "fits"]
    reasons = [each.rejected[0] if each.rejected else "" for each in found.checked]
    assert reasons[0] == reasons[3] == ""
    assert reasons[1].startswith("rehearsed: out of memory in ")
    assert "limit" in reasons[2]
    assert found.best is found.checked[-1]
    assert found.spared == 2
    assert [each.time_s for each in found.checked] == [None] * 4
    assert found.unchecked == ("time (that of a card)",)

    monkeypatch.setattr(sys, "executable", "/bin/false")  # what was run is in the store: no worker is wanted
    strict = dataclasses.replace(tried, stage1=dataclasses.replace(tried.stage1, peak_memory_bytes=1))
    found = verify_plan(strict, on=here, options=options)
    assert [each.candidate.workload.id for each in found.checked] == ["serves"]
    assert (found.best, found.spared) == (None, 5)


def test_what_cannot_run_there_is_refused_before_anything_runs(plan: Plan) -> None:
    """A plan for quantised weights is not verified on the host."""
    with pytest.raises(Unsupported, match="nf4"):
        verify_plan(altered(plan, tiny(precision="fp32"), tiny(quantization="nf4")), on="cpu")
