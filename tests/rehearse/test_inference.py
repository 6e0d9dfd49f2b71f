"""Inference that is no causal generation, rehearsed: encoder-decoders, and what reads a text in one pass."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from whichlora.rehearse import rehearse
from whichlora_estimators.workload import workload_from_json

from ..estimators.golden import golden_lines

pytestmark = pytest.mark.stack

#: The versions that the cases were made with, and the cases.
STACK = {"torch": "2.14.1", "transformers": "5.23.0", "bitsandbytes": "0.50.2"}
CASES = Path(__file__).parents[1] / "estimators" / "families" / "golden_inference.jsonl"


def test_known_inference_takes_the_bytes_that_it_took() -> None:
    """Every case runs to its end, phase by phase, and takes what it took when it was made."""
    installed = {name: metadata.version(name).partition("+")[0] for name in STACK}
    if installed != STACK:
        pytest.skip(f"the lines were made with {STACK}, installed are {installed}")
    lines = golden_lines(CASES)
    found = list(rehearse([workload_from_json(line) for line in lines], "unlimited", jobs=1, fresh=True))
    for each, line in zip(found, lines, strict=True):
        assert each.outcome == "ok", each.error
        assert list(each.phases) == ["load", "prefill", *(["decode"] if each.workload.decoded else [])]
        assert each.weights_bytes == line["truth"]["weights_bytes"], line["id"]
        assert each.allocated_peak_bytes == pytest.approx(line["truth"]["allocated_peak_bytes"], rel=1e-3), line["id"]
