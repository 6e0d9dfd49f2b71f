"""A choice that was rehearsed: real rehearsals replace predictions, and a row that they refute is passed over."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whichlora import PickResult, config_from_fields, pick
from whichlora.checked import check
from whichlora.rehearse.pool import Pool
from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import open_store

CONFIG = {
    "gpu": "l4",
    "stage1_profile": {"model_names": ["facebook/opt-125m"], "prefill_length": 64, "tokens_to_generate": 16},
    "stage2_profile": {"batch_size": [1, 8]},
    "methods": ["lora"],
    "seq_len": 64,
    "dataset": {"samples": 100},
}


@pytest.fixture(scope="module")
def searched() -> PickResult:
    return pick(config_from_fields(CONFIG))


@pytest.mark.stack
def test_the_choice_is_rehearsed_and_a_refuted_one_passed_over(searched: PickResult, tmp_path: Path) -> None:
    """What was seen stands in the row with its evidence and in the store; a limit that it breaks moves the choice on."""
    store = open_store(tmp_path / "seen.duckdb")
    found = check(searched, store=store)
    assert searched.choice is not None
    assert found.choice is not None
    assert found.choice.workload == searched.choice.workload
    assert found.choice.evidence == "rehearsed"
    assert found.choice in found.stage2
    assert found.choice.allocated_peak_bytes == pytest.approx(searched.choice.allocated_peak_bytes, rel=0.01)
    assert [row.evidence for row in found.stage1] == ["rehearsed"]
    assert store.count() == 2
    seen = found.choice.process_bytes
    assert seen is not None
    # the search believed in this limit, the rehearsal does not
    tighter = replace(searched.config, stage2=replace(searched.config.stage2, peak_memory_bytes=seen[1] - 1))
    moved = check(replace(searched, config=tighter), store=store)
    assert moved.choice is not None
    assert moved.choice.workload.batch_size < found.choice.workload.batch_size
    refuted = next(row for row in moved.stage2 if row.workload == found.choice.workload)
    assert refuted.evidence == "rehearsed"
    assert refuted.rejected
    assert store.count() == 3
    # a model that turns out not to serve is not tuned
    served = found.stage1[0].process_bytes
    assert served is not None
    barred = replace(searched.config, stage1=replace(searched.config.stage1, peak_memory_bytes=served[1] - 1))
    nothing = check(replace(searched, config=barred), store=store)
    assert (nothing.kept, nothing.stage2, nothing.choice) == ((), (), None)
    assert "rehearsed: takes" in nothing.stage1[0].rejected[0]
    assert store.count() == 3


@pytest.mark.stack
def test_one_worker_runs_them_all(searched: PickResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """The serving and the trainings of a search are run one after the other by a process that stays, here or in `verify`."""
    started: list[str] = []
    start = Pool._start

    def noted(pool: Pool) -> Any:
        started.append(pool._module)
        return start(pool)

    monkeypatch.setattr(Pool, "_start", noted)
    limit = replace(searched.config.stage2, peak_memory_bytes=1)
    for on, module in ((None, "whichlora.rehearse.worker"), ("null", "whichlora.verify.worker")):
        started.clear()
        told: list[str] = []
        found = check(replace(searched, config=replace(searched.config, stage2=limit)), on=on, report=told.append)
        assert started == [module]
        assert [row.evidence for row in (*found.stage1, *found.stage2)] == ["rehearsed"] * 3
        assert found.choice is None
        assert sum("to be" in text for text in told) == 3


@pytest.mark.stack
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a card is here")
def test_a_card_is_looked_for_where_this_runs(searched: PickResult) -> None:
    """Asked for a card, what is missing is the card, whichever one the search was for."""
    with pytest.raises(WhichloraError, match="sees no CUDA card"):
        check(searched, on="cuda")
