"""Rehearsals that the store remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora.rehearse.records import Rehearsal
from whichlora.rehearse.stored import environment_here, measurement, remembered
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import PhasePeak, open_store

CARD = find_gpu("l4")
PAGED = Workload(model="m", config={"model_type": "llama"}, optimizer="paged-adamw-8bit")


@pytest.mark.parametrize(("managed", "known"), [(3 << 20, True), (0, True), (None, False)])
def test_a_paged_optimizer_is_remembered_with_its_managed_bytes(
    tmp_path: Path, managed: int | None, known: bool
) -> None:
    """What was stored comes back, managed bytes included; where these were not stored, it is rehearsed again."""
    here = environment_here(CARD, cuda_version="13.0")
    seen = Rehearsal(
        workload=PAGED,
        gpu=CARD,
        outcome="ok",
        trainable_params=1000,
        managed_peak_bytes=managed,
        phases={"forward": PhasePeak(allocated_peak_bytes=5000, reserved_peak_bytes=6000)},
        environment=here,
    )
    store = open_store(tmp_path / "store.duckdb")
    store.add([measurement(seen)])
    found = remembered(store, [PAGED], CARD, here)
    assert found == ({0: seen} if known else {})
