"""What tests of several folders share, and a place of their own for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browsing import chromium

_PLACE = pytest.StashKey[Path]()
_CHOSEN = ("WHICHLORA_CORRECTION", "WHICHLORA_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_ENDPOINT")


def pytest_configure(config: pytest.Config) -> None:
    """Show tests nothing that this user has downloaded, stored, calibrated or chosen, and keep theirs from the user.

    Before any test is imported: the Hub's client reads its variables once. Workers share what their controller has made.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        config.stash[_PLACE] = place = Path(tempfile.mkdtemp(prefix="whichlora-tests-"))
        os.environ |= {"WHICHLORA_CACHE_DIR": str(place / "cache"), "HF_HOME": str(place / "huggingface")}
        for name in _CHOSEN:
            os.environ.pop(name, None)
    place = Path(os.environ["WHICHLORA_CACHE_DIR"]).parent
    os.environ["WHICHLORA_DB"] = str(place / (worker or "alone") / "profiles.duckdb")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the run has made."""
    if place := config.stash.get(_PLACE, None):
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found
