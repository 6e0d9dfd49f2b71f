"""`whichlora estimate … --gpu cpu`: times on this machine's processor, from what `verify --on cpu` measured on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from whichlora_calibration import TimeSpan
from whichlora_estimators.errors import BadValue
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import open_store

from ..api import SCHEMA
from ..processor import Processor, processor_here
from .hours import span
from .tables import table

#: What is given in place of a card.
CPU = "cpu"


def wants_processor(gpus: Sequence[str]) -> bool:
    """Say whether the processor is asked for. Raises BadValue beside cards, whose answers have memory as well."""
    if CPU not in gpus:
        return False
    if set(gpus) != {CPU}:
        raise BadValue("the processor is asked for alone", value=", ".join(gpus), todo="Leave out the cards.")
    return True


def echo_times(asked: list[Workload], setup_text: Any, *, as_json: bool) -> None:
    """Print the times of workloads, all in one precision, on this processor."""
    processor = processor_here(open_store(None), asked[0].precision)
    times = [processor.predict(workload) for workload in asked]
    if as_json:
        answers = [_answer(workload, found, processor) for workload, found in zip(asked, times, strict=True)]
        click.echo(json.dumps({"schema": SCHEMA, "predictions": answers}, indent=1))
        return
    rows = [
        [workload.model, setup_text(workload), str(workload.batch_size), *_cells(found)]
        for workload, found in zip(asked, times, strict=True)
    ]
    click.echo(table(["model", "setup", "batch", "time", "a token"], rows, right=range(2, 5)))
    click.echo(f"the least times on this processor, from {processor.times} times of {processor.models} models here")


def _cells(found: dict[str, TimeSpan]) -> list[str]:
    first = found.get("step_s") or found.get("prefill_s")
    return [span(first), span(found.get("decode_s_per_token"))]


def _answer(workload: Workload, found: dict[str, TimeSpan], processor: Processor) -> dict[str, Any]:
    head = {"id": workload.id, "model": workload.model, "gpu": CPU, "method": workload.method}
    known = {"calibrated_on": {"models": processor.models, "times": processor.times}}
    spans = {name: each.expected_s for name, each in found.items()}
    return {**head, **spans, **{f"{name}_interval": [each.low_s, each.high_s] for name, each in found.items()}, **known}
