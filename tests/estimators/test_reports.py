"""The page that explains earlier reports: current, and its formulas as good as it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reports() -> ModuleType:
    """Load docs/reports.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("reports", DOCS / "reports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_its_figures_are_current(reports: ModuleType) -> None:
    """`python docs/reports.py` would write what is there."""
    for path, text in reports.page().items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/reports.py: {path.name}"


def test_formulas_meet_the_rehearsals_of_the_page(reports: ModuleType) -> None:
    """Every allocated peak of the page is within 0.1% of its rehearsal, trainable parameters equal."""
    rehearsed: dict[str, Any] = reports.read(reports.REHEARSED)
    workloads = {workload.id: workload for workload in reports.workloads()}
    assert workloads.keys() == rehearsed.keys()
    for name, workload in workloads.items():
        timeline = reports.lay(workload)
        peak_bytes = timeline.replay(reports.CachingAllocator()).allocated_peak_bytes
        assert peak_bytes == pytest.approx(rehearsed[name]["allocated_peak_bytes"], rel=0.001), name
        assert workload.phase == "generate" or timeline.trainable_params == rehearsed[name]["trainable_params"]


def test_the_chunk_is_the_prompts_logits(reports: ModuleType) -> None:
    """What a rehearsal counts on the output layer's line is batch x prompt x vocabulary x 2 bytes, 62.5 MiB at batch 1."""
    rehearsed = reports.read(reports.REHEARSED)
    for batch in (1, 32):
        (line, size), *others = rehearsed[reports.generation(batch, last_only=False).id]["lines"]
        assert not others
        assert "modeling_gemma" in line
        assert size == batch * reports.PREFILL * 256_000 * 2 == batch * 62.5 * 2**20
