"""Verifications on the null device and on the host; what tests of rehearsals use is used here too."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from whichlora.pick import pick
from whichlora.pickconfig import config_from_fields
from whichlora.plan import Candidate, Plan, read_plan, write_outputs
from whichlora_estimators.workload import Workload

from ..rehearse.conftest import TINY as TINY
from ..rehearse.conftest import _own_store as _own_store  # an empty store, and the libraries are needed
from ..rehearse.conftest import tiny

PLAN = {
    "gpu": "l4",
    "stage1_profile": {"model_names": ["gpt2"]},
    "stage2_profile": {"batch_size": [1], "total_time_mins": 60},
    "dataset": {"samples": 100},
}
HOST = {"precision": "fp32", "seq_len": 16, "rank": 2}


def on_host(**setup: Any) -> Workload:
    """Return a workload of a model of 2 layers that the host runs in milliseconds."""
    return tiny(**{**HOST, **setup})


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan as `pick` writes it."""
    folder = tmp_path_factory.mktemp("plan")
    write_outputs(pick(config_from_fields(PLAN), offline=True), folder)
    return read_plan(folder)


def altered(plan: Plan, *workloads: Workload, peak_memory_bytes: int | None = None) -> Plan:
    """Return the plan with other survivors, and another limit."""
    first = plan.survivors[0]
    candidates: tuple[Candidate, ...] = tuple(dataclasses.replace(first, workload=each) for each in workloads)
    limits = dataclasses.replace(plan.stage2, peak_memory_bytes=peak_memory_bytes)
    return dataclasses.replace(plan, choice=candidates[0], survivors=candidates, stage2=limits, models={"tiny": TINY})
