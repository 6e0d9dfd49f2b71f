"""`whichlora rehearse --time`: what the card's clock shows of workloads and scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.units import format_seconds
from whichlora_estimators.workload import Workload

from ..api import SCHEMA
from ..rehearse.cards import UNLIMITED
from ..rehearse.records import EVIDENCE
from ..rehearse.timed import MEASURED_OVER_REHEARSED, TimedRehearsal, answer, rehearse_times
from .estimate import setup_text
from .tables import table


def echo_times(asked: Sequence[Workload], gpus: Sequence[str], options: Mapping[str, Any]) -> None:
    """Rehearse workloads for their times and print a row each."""
    if not gpus or UNLIMITED in (gpu.casefold() for gpu in gpus):
        todo = "Example: whichlora rehearse meta-llama/Llama-3.1-8B --gpu rtx-4090 --time."
        raise BadValue("times are those of a card", value=", ".join(gpus), todo=todo)
    settings = {"jobs": options["jobs"] or 1, "timeout_s": options["timeout_s"]}
    found = [timed for gpu in dict.fromkeys(gpus) for timed in rehearse_times(asked, gpu, **settings)]
    if options["as_json"]:
        click.echo(json.dumps({"schema": SCHEMA, "times": [answer(timed) for timed in found]}, indent=1))
        return
    headers = ("model", "gpu", "setup", "batch", "step", "prefill", "a token", "evidence")
    click.echo(table(headers, [_cells(timed) for timed in found], right=(3,)))


def _cells(timed: TimedRehearsal) -> list[str]:
    workload = timed.workload
    head = [workload.model, timed.gpu.slug, setup_text(workload), str(workload.batch_size)]
    if timed.error:
        return [*head, f"failed: {timed.error}", "", "", ""]
    return [*head, *(_span(timed, name) for name in ("step", "prefill", "decode_per_token")), timed.evidence]


def _span(timed: TimedRehearsal, name: str) -> str:
    if name not in timed.times:
        return "-"
    low_s, high_s = timed.interval_s(name)
    return f"{format_seconds(timed.times[name])} ({format_seconds(low_s)} to {format_seconds(high_s)})"


def time_lines(times: Mapping[str, float]) -> list[str]:
    """Say what the clock showed of a script."""
    if not times:
        return []
    lines = [f"the card's time: {format_seconds(times['seconds'])}, {times['steps']:.0f} optimizer steps"]
    if "step_s" in times:
        low_s, high_s = (times["step_s"] * ratio for ratio in MEASURED_OVER_REHEARSED)
        bounds = f"between {format_seconds(low_s)} and {format_seconds(high_s)}"
        lines.append(f"a step: {format_seconds(times['step_s'])}, {bounds} ({EVIDENCE})")
    return lines
