"""The workload record and its JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.workload import workload_from_json

REHEARSED = Path(__file__).parents[2] / "benchmarks" / "rehearsed.jsonl"
LINE: dict[str, Any] = {"model": "tiny", "config": {"model_type": "gpt2"}}


def test_every_rehearsed_line_is_a_workload() -> None:
    """The format of the file is the format that is read; what a line says is what the record holds."""
    for text in REHEARSED.read_text().splitlines():
        fields = json.loads(text)
        workload = workload_from_json(fields)
        for key, value in fields.items():
            if key in ("truth", "targets") or value is None:
                continue
            assert getattr(workload, key) == value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ...}, "model"),
        ({"config": ...}, "config"),
        ({"config": 3}, "config"),
        ({"sequence": 5}, "sequence"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": "4"}, "batch_size"),
        ({"seq_len": True}, "seq_len"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1}, "dropout"),
        ({"targets": []}, "targets"),
        ({"targets": "q_proj"}, "targets"),
        ({"padded": "yes"}, "padded"),
        ({"phase": "rest"}, "rest"),
        ({"precision": "fp8"}, "fp8"),
        ({"attention": "flash9"}, "flash9"),
    ],
)
def test_wrong_lines_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    """What is missing, unknown or out of range is named, with what to do."""
    fields = {key: value for key, value in {**LINE, **changes}.items() if value is not ...}
    with pytest.raises(WhichloraError) as caught:
        workload_from_json(fields)
    assert named in str(caught.value)
    assert caught.value.todo
