"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from .browsing import chromium

# How long an example takes depends on what else the machine does: no law of ours.
settings.register_profile("whichlora", deadline=None)
settings.load_profile("whichlora")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found
