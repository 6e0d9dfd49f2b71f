"""What tests of the real libraries share: a store of their own, and a word where a library is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def needs(*packages: str) -> None:
    """Skip unless the packages are installed, without importing them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (the gpu extra)")


@contextmanager
def own_store(factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Begin with an empty store, which knows nothing of what other tests ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHICHLORA_DB", str(factory.mktemp("store") / "profiles.duckdb"))
        yield patch
