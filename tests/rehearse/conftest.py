"""Rehearsals of small workloads, and of lines whose bytes are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.workload import Workload

from ..stack import needs, own_store

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "benchmarks" / "rehearsed.jsonl"
TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}


def tiny(**setup: Any) -> Workload:
    """Return a workload of a model of 2 layers."""
    return Workload(model="tiny", config=TINY, **{"rank": 4, "seq_len": 64, **setup})


def golden_lines(*ids: str) -> list[dict[str, Any]]:
    """Return lines of the rehearsed workloads, their `truth` included, in the order of `ids`."""
    lines = {line["id"]: line for line in map(json.loads, GOLDEN.read_text(encoding="utf-8").splitlines())}
    return [lines[name] for name in ids]


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begin with an empty store."""
    needs("torch", "transformers", "peft", "bitsandbytes")
    with own_store(tmp_path_factory):
        yield
