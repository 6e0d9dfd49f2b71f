"""What is rehearsed is kept, and not rehearsed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from whichlora.rehearse import Rehearsal, find_card, rehearse
from whichlora_profiles_db import Filters, open_store

from .conftest import tiny

pytestmark = pytest.mark.stack


def test_what_is_stored_is_not_run_again(tmp_path: Path) -> None:
    """A second run gives the same answers from the store, out of memory included; failures and other cards run."""
    store = open_store(tmp_path / "profiles.duckdb")
    small = dataclasses.replace(find_card("rtx-4090"), total_bytes=2 * 2**30)
    fits, large = tiny(id="fits"), tiny(id="large", method="full", batch_size=64, seq_len=4096)
    broken = tiny(id="broken", targets=("no_such_layer",))
    first = list(rehearse([fits, large, broken], small, jobs=1, store=store))
    assert [each.outcome for each in first] == ["ok", "oom", "failed"]
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
    list(rehearse([broken, fits], small, jobs=1, store=store, on_done=told.append))
    assert [each.workload.id for each in told] == ["fits", "broken"]
    assert store.count(Filters(outcome="failed")) == 2
