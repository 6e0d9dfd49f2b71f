"""The published pack that ships with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import find_gpu
from whichlora_profiles_db import Filters, open_store, published, published_facts, read_manifest
from whichlora_profiles_db.publications import PATH, PublishedFacts, notes_of

from .records import numbered


def test_every_measurement_cites_its_source_and_says_how_far_to_trust_it() -> None:
    """All are published, of a known card, cited, of class A or B, and trusted for something."""
    found = list(published())
    assert len(found) == read_manifest(PATH).rows == len({one.id for one in found})
    for one in found:
        known = published_facts(one)
        assert one.evidence == "published"
        assert one.source
        assert known.completeness in ("A", "B")
        assert known.trusted_for
        assert known.cell
        assert one.environment.gpu is not None
        find_gpu(one.environment.gpu)


def test_filters_choose_as_in_a_store(tmp_path: Path) -> None:
    """What filters let through of the pack is what they let through of a store that holds the pack."""
    store = open_store(tmp_path / "store.duckdb")
    assert store.add(published()) == len(list(published()))
    for filters in (Filters(gpu="l40s"), Filters(model="mistralai/*", outcome="oom"), Filters(method="dora")):
        ids = [one.id for one in published(filters)]
        assert ids
        assert ids == [one.id for one in store.query(filters)]


def test_a_run_without_metrics_is_out_of_memory_and_has_no_bytes() -> None:
    """What is presumed is said to be."""
    for one in published(Filters(outcome="oom")):
        assert "presumed" in one.error
        assert one.allocated_peak_bytes is None


def test_facts_are_found_again_in_notes() -> None:
    """Notes and facts are each other's inverse, and other measurements have none."""
    known = PublishedFacts(completeness="B", trusted_for=("memory", "time"), cell="a|b; cell c")
    assert published_facts(next(published()).with_(notes=notes_of(known, "said; twice"))) == known
    with pytest.raises(BadValue):
        published_facts(numbered(1))
