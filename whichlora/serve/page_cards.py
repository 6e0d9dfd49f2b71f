"""All cards, and each with what people here measured on it, how far predictions were off, and how they are corrected."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from starlette.requests import Request

from whichlora_calibration.cases import NAMES, measured
from whichlora_calibration.current import current_correction
from whichlora_estimators.errors import UnknownName, WhichloraError
from whichlora_estimators.gpus import all_gpus, find_gpu
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import Filters, GroupStats, Measurement, UnknownMeasurement
from whichlora_profiles_db.workload_form import workload_to_json

from ..report_page import paragraph, section
from . import work
from .access import Lab, lab_of, needs
from .frame import box, page, url
from .page_calibration import card_offsets
from .tokens import Role

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Role.READER))])

SHOWN = 100
#: Workloads that are predicted for a page; and how long it waits for them.
FORECAST, WAIT_S = 40, 5.0
_MEMORY = ("allocated", "reserved", "process")
Forecasts = Mapping[str, Mapping[str, float]]


@router.get("/cards")
async def cards(request: Request) -> Response:
    """List all cards, those that people here measured first."""
    stats = await asyncio.to_thread(lab_of(request).keeper.store.stats)
    counts: dict[str | None, int] = {}
    for group in stats.groups:
        counts[group.gpu] = counts.get(group.gpu, 0) + group.total
    lines = [
        [
            f'<a href="{escape(url(request, f"/cards/{gpu.slug}"))}">{escape(gpu.name)}</a>',
            format_bytes(gpu.total_bytes),
            f"{gpu.hbm_bytes_per_s / 1e9:,.0f} GB/s",
            escape(gpu.architecture),
            f"{counts.get(gpu.slug, 0):,}",
        ]
        for gpu in sorted(all_gpus(), key=lambda gpu: (-counts.get(gpu.slug, 0), gpu.name))
    ]
    headers = ("card", "memory", "bandwidth", "architecture", "measurements here")
    table = box("Cards", headers, lines, right=(1, 2, 4), wide=0)
    note = f"{stats.total:,} measurements are kept here; cards that were measured come first."
    return page(request, "Cards", "<h1>Cards</h1>" + paragraph(note) + table.replace("scroll", "scroll framed", 1))


@router.get("/cards/{slug}")
async def card(slug: str, request: Request) -> Response:
    """Tell what people here measured on a card, and how corrections do on it."""
    try:
        gpu = find_gpu(slug)
    except UnknownName:
        raise UnknownMeasurement(
            "no such card", value=slug, todo="The page of cards lists all that are known."
        ) from None
    store, only = lab_of(request).keeper.store, Filters(gpu=gpu.slug)
    stats, found = await asyncio.gather(
        asyncio.to_thread(store.stats, only), asyncio.to_thread(store.query, only, limit=SHOWN)
    )
    predicted = await _forecasts(lab_of(request), gpu.slug, found)
    rates = gpu.matmul_flops_per_s
    facts = (
        ("memory", f"{format_bytes(gpu.total_bytes)} ({gpu.memory_basis})"),
        ("bandwidth", f"{gpu.hbm_bytes_per_s / 1e9:,.0f} GB/s"),
        ("bf16", "-" if rates.bf16 is None else f"{rates.bf16 / 1e12:,.0f} TFLOP/s"),
        ("architecture", gpu.architecture),
    )
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    links = f'<a href="{escape(url(request, f"/#gpu={gpu.slug}"))}">What fits on it</a> · '
    links += f'<a href="{escape(url(request, f"/compare?gpu={gpu.slug}"))}">Models side by side on it</a>'
    body = f'<h1>{escape(gpu.name)}</h1><p class="note">{links}</p><dl class="facts">{listed}</dl>'
    body += section("Measured here", _groups(stats.groups), _latest(found, predicted))
    body += section("How far predictions were off", *_errors(found, predicted)) if found else ""
    body += section("Corrections on this card", *card_offsets(current_correction(), gpu.slug, box))
    return page(request, gpu.name, body)


def _groups(groups: Sequence[GroupStats]) -> str:
    if not groups:
        return paragraph("Nothing yet. `whichlora verify` measures, `whichlora profiles push` brings it here.")
    headers = ("evidence", "ok", "out of memory", "failed", "models", "workloads")
    lines = [
        [
            escape(group.evidence),
            *(f"{group.counts[name]:,}" for name in ("ok", "oom", "failed")),
            str(group.models),
            str(group.workloads),
        ]
        for group in groups
    ]
    return box("Counts by evidence", headers, lines, right=range(1, 6), wide=0)


def _latest(found: Sequence[Measurement], predicted: Forecasts) -> str:
    lines = []
    for one in found:
        workload = one.workload
        time = "step" if workload.phase == "train" else "decode"
        rank = f" r{workload.rank}" if "lora" in workload.method or "dora" in workload.method else ""
        lines.append(
            [
                escape(f"{one.measured_at:%Y-%m-%d}" if one.measured_at else "-"),
                escape(workload.model),
                escape(f"{workload.phase}, {workload.method}{rank}, batch {workload.batch_size}"),
                *(_beside(one, name, predicted.get(one.id, {})) for name in ("allocated", "reserved", time)),
                escape(one.outcome),
                f"<code>{one.id[:12]}</code>",
            ]
        )
    headers = ("date", "model", "setup", "allocated", "reserved", "time", "outcome", "id")
    return box("Latest measurements", headers, lines, right=(3, 4, 5), wide=1) if lines else ""


def _beside(one: Measurement, name: str, predicted: Mapping[str, float]) -> str:
    """Show what was measured, and beside it how far a prediction is from it."""
    value = measured(one, name)
    if value is None:
        return "-"
    shown = format_bytes(round(value)) if name in _MEMORY else format_seconds(value)
    if one.outcome != "ok" or name not in predicted:
        return shown
    return f'{shown} <small title="predicted over measured">{predicted[name] / value - 1:+.1%}</small>'


def _errors(found: Sequence[Measurement], predicted: Forecasts) -> list[str]:
    """Lay out the median error of what is predicted now for the latest runs here, whether learnt from them or not."""
    errors: dict[str, list[float]] = {}
    for one in found:
        for name, value in predicted.get(one.id, {}).items():
            if one.outcome == "ok" and (seen := measured(one, name)):
                errors.setdefault(name, []).append(abs(value / seen - 1))
    if not errors:
        return [paragraph("None of the latest runs here is of a kind that is predicted.")]
    note = (
        "Predictions as they are made today, against the latest runs here that went well. These may be among the runs that"
        " corrections were learnt from; held-out errors are on the calibration's page."
    )
    lines = [
        [NAMES[name], f"{len(own):,}", f"{statistics.median(own):.1%}", f"{max(own):.1%}"]
        for name, own in errors.items()
    ]
    headers = ("what", "runs", "median error", "largest error")
    return [paragraph(note), box("Errors on this card", headers, lines, right=(1, 2, 3), wide=0)]


async def _forecasts(lab: Lab, gpu: str, found: Sequence[Measurement]) -> Forecasts:
    """Predict what was measured, each workload and stack once; what takes too long is left out of this page."""
    asked: dict[tuple[str, str], asyncio.Task[Mapping[str, float]]] = {}
    keys = {}
    for one in found:
        if one.device != "cuda":
            continue
        keys[one.id] = key = (one.workload_id, repr(sorted(one.environment.versions.items())))
        if key not in asked and len(asked) < FORECAST:
            fields = {"gpu": gpu, "workload": workload_to_json(one.workload)}
            asked[key] = asyncio.create_task(_forecast(lab, fields | {"versions": dict(one.environment.versions)}))
    if asked:
        await asyncio.wait(asked.values(), timeout=WAIT_S)
    done = {key: task.result() for key, task in asked.items() if task.done()}
    return {id_: done[key] for id_, key in keys.items() if key in done}


async def _forecast(lab: Lab, fields: dict[str, Any]) -> Mapping[str, float]:
    try:
        numbers: Mapping[str, float] = await lab.workers.call(work.forecast, fields)
    except WhichloraError:  # of a kind that is not predicted, or not now
        return {}
    return numbers
