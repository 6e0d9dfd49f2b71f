"""What is rehearsed is kept, and not rehearsed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from whichlora.rehearse import Rehearsal, find_card, rehearse
from whichlora_estimators.gpus import context_bytes
from whichlora_profiles_db import Filters, open_store

from .conftest import tiny

pytestmark = pytest.mark.stack


def test_what_is_stored_is_not_run_again(tmp_path: Path) -> None:
    """A second run gives the same answers from the store, out of memory included; what failed is run again."""
    store = open_store(tmp_path / "profiles.duckdb")
    small = dataclasses.replace(find_card("rtx-4090"), total_bytes=2 * 2**30)
    fits, large = tiny(id="fits"), tiny(id="large", method="full", batch_size=64, seq_len=4096)
    broken = tiny(id="broken", targets=("no_such_layer",))
    first = list(rehearse([fits, large, broken], small, jobs=1, store=store))
    assert [each.outcome for each in first] == ["ok", "oom", "failed"]
    assert first[1].phase in ("forward", "backward")
    assert "out of memory" in first[1].error
    assert first[0].reserved_peak_bytes == (first[0].process_bytes or 0) - context_bytes(small)
    kept = store.query()
    assert {each.outcome for each in kept} == {"ok", "oom", "failed"}
    assert all(each.device == "null" and each.environment.gpu == small.slug for each in kept)

    again = list(rehearse([large.with_(id="renamed"), fits], small, jobs=1, timeout_s=1e-3, store=store))
    assert [each.workload.id for each in again] == ["renamed", "fits"]
    for before, after in zip((first[1], first[0]), again, strict=True):
        for name in ("outcome", "error", "phase", "phases", "trainable_params", "weights_bytes", "versions"):
            assert getattr(after, name) == getattr(before, name)
        assert list(after.phases) == list(before.phases)
    assert store.count() == 3

    told: list[Rehearsal] = []
    found = rehearse([broken, fits], small, jobs=1, timeout_s=1e-3, store=store, on_done=told.append)
    assert [each.outcome for each in found] == ["failed", "ok"]
    assert "no answer within" in told[1].error  # it was given to a worker again
    assert [each.workload.id for each in told] == ["fits", "broken"]
    assert store.count(Filters(outcome="failed")) == 2
