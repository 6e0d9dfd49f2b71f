"""Stores by the dozen, made quickly, and what is in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from whichlora_profiles_db import Measurement, Store, measurement_to_json, open_store
from whichlora_profiles_db.session import writing

from .records import ENVIRONMENT, numbered


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store's file without a row, for tests that need many stores and not to see them made."""
    path = tmp_path_factory.mktemp("blank") / "store.duckdb"
    with writing(path, wait_s=5):
        return path


@pytest.fixture
def make(tmp_path: Path, blank: Path) -> Callable[[], Store]:
    """Return what makes new stores."""
    count = iter(range(10**6))
    return lambda: open_store(Path(shutil.copy(blank, tmp_path / f"{next(count)}.duckdb")))


def content(store: Store) -> list[str]:
    """Return everything in a store, in an order of its own."""
    everything = [one for batch in store.iterate() for one in batch]
    return sorted(json.dumps(measurement_to_json(one), sort_keys=True) for one in everything)


def versions_of(count: int) -> list[Measurement]:
    """Return so many measurements, each as it is, without names and with other names."""
    renamed = dataclasses.replace(ENVIRONMENT, host_name="elsewhere", user_name=None)
    whole = [numbered(number, environment=ENVIRONMENT) for number in range(count)]
    return [one for full in whole for one in (full, full.without_names(), full.with_(environment=renamed))]
