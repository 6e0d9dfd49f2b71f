"""What tests of the real libraries share: folders that are nobody's own, and a word where a library is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def needs(*packages: str) -> None:
    """Skip unless the packages are installed, without importing them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (the gpu extra)")


@contextmanager
def own_folders(factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Store nothing in the user's store, and compile into a cache that all processes of these tests share."""
    base = factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHICHLORA_CACHE_DIR", str(session / "cache"))
        patch.setenv("WHICHLORA_DB", str(factory.mktemp("store") / "profiles.duckdb"))
        yield patch
