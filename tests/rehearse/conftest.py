"""Rehearsals of small workloads, and of lines whose bytes are known."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.workload import Workload

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
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile into a cache of this session's own, and store nothing in the user's store."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (the gpu extra)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHICHLORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WHICHLORA_DB", str(tmp_path_factory.mktemp("store") / "profiles.duckdb"))
        yield
