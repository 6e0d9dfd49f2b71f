"""Verifications on the null device and on the host; what tests of rehearsals use is used here too."""

from __future__ import annotations

from typing import Any

from whichlora_estimators.workload import Workload

from ..rehearse.conftest import TINY as TINY
from ..rehearse.conftest import _own_folders as _own_folders  # an own cache and store, and the libraries are needed
from ..rehearse.conftest import tiny

HOST = {"precision": "fp32", "seq_len": 16, "rank": 2}


def on_host(**setup: Any) -> Workload:
    """Return a workload of a model of 2 layers that the host runs in milliseconds."""
    return tiny(**{**HOST, **setup})
