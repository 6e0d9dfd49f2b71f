"""What a card decides of memory, against rehearsals on cards of six compute capabilities.

Source of golden_cards.jsonl: the null device with the `compute_capability` and `multiprocessors` of each line, torch 2.14.1,
transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2; cuDNN's attention off, which the null device cannot run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.allocator import CachingAllocator
from whichlora_estimators.tape import Tape
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import workload_from_json

from .golden import golden_lines

CASES = golden_lines(Path(__file__).with_name("golden_cards.jsonl"))
_CARD = ("compute_capability", "multiprocessors")


@pytest.mark.parametrize("line", CASES, ids=lambda line: str(line["id"]))
def test_a_card_is_met(line: dict[str, Any]) -> None:
    """Allocated peaks are within 0.1% of the rehearsal on that card, reserved ones within 1%."""
    workload = workload_from_json({key: value for key, value in line.items() if key not in _CARD})
    major, minor = line["compute_capability"]
    timeline = lay(workload, compute_capability=(major, minor), multiprocessors=line["multiprocessors"])
    state = timeline.replay(CachingAllocator())
    assert state.allocated_peak_bytes == pytest.approx(line["truth"]["allocated_peak_bytes"], rel=0.001)
    assert state.reserved_peak_bytes == pytest.approx(line["truth"]["reserved_peak_bytes"], rel=0.01)


def test_workspaces_grow_from_9_0_on() -> None:
    """CuBLAS gets 32 MiB from Hopper on, before that the 8 MiB and a little of its default setting."""
    assert Tape((8, 9)).workspace_bytes < 9 * 2**20 < Tape((9, 0)).workspace_bytes == Tape((12, 0)).workspace_bytes
