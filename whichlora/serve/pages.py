"""The pages: written here, but for the table and plot of the first one, which follow its sliders in the browser."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, Response
from starlette.requests import Request

from whichlora_calibration.current import correction_history, correction_path, current_correction
from whichlora_estimators.errors import UnknownName
from whichlora_estimators.gpus import all_gpus, find_gpu
from whichlora_estimators.models import all_models, bundled_model, default_models
from whichlora_estimators.units import format_bytes, format_seconds
from whichlora_profiles_db import Filters, GroupStats, TimeStats, UnknownMeasurement

from ..report_page import paragraph, section
from ..report_tables import lines_table
from ..report_view import format_count
from . import work
from .access import Lab, lab_of, needs
from .page_calibration import calibration_parts, card_offsets
from .tokens import Role

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Role.READER))])
static = APIRouter(include_in_schema=False)

DEFAULT_GPU = "rtx-4090"
COMPARED = 6
SHOWN = 100
_METHODS = ("lora", "qlora", "dora", "qdora", "lora-fa", "full")
_TYPES = {"serve.js": "text/javascript", "theme.js": "text/javascript", "plotly.js": "text/javascript"}
_STYLES = "style.css"


@static.get("/static/{name}")
async def asset(name: str) -> Response:
    """Return a script or the style: nothing else is in there."""
    if name not in (*_TYPES, _STYLES):
        raise UnknownMeasurement("no such file", value=name, todo="The page names those that there are.")
    kind = _TYPES.get(name, "text/css")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(_content(name), media_type=f"{kind}; charset=utf-8", headers=headers)


@cache
def _content(name: str) -> str:
    if name == "plotly.js":
        from plotly.offline import get_plotlyjs

        return str(get_plotlyjs())
    if name == _STYLES:
        return _style()
    return resources.files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def _style() -> str:
    """Join the report's style and ours; the report's two palettes can also be chosen, not only followed."""
    report = resources.files("whichlora").joinpath("report.css").read_text(encoding="utf-8")
    ours = resources.files(__package__).joinpath("static", "serve.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{([^}]*)\}", report)[:2]
    chosen = f':root[data-theme="light"] {{{light}}}\n:root[data-theme="dark"] {{{dark}}}\n'
    return f"{report}\n{chosen}\n{ours}"


@cache
def _version(name: str) -> str:
    return hashlib.sha256(_content(name).encode()).hexdigest()[:12]


def _url(request: Request, path: str) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/") + path


def _page(request: Request, title: str, body: str, *, scripts: Iterable[str] = ()) -> HTMLResponse:
    """Write a page around a body, which must be escaped."""

    def link(name: str) -> str:
        return escape(f"{_url(request, '/static/')}{name}?v={_version(name)}")

    loaded = "\n".join(f'<script src="{link(name)}" defer></script>' for name in scripts)
    here = request.url.path.removeprefix(str(request.scope.get("root_path", "")))
    places = (("/", "Choose"), ("/compare", "Compare"), ("/cards", "Cards"), ("/calibration", "Calibration"))
    links = "".join(
        f'<a href="{escape(_url(request, path))}"{" aria-current=page" if path == here else ""}>{name}</a>'
        for path, name in places
    )
    return HTMLResponse(f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · whichlora</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{link(_STYLES)}">
<script src="{link("theme.js")}"></script>
{loaded}
</head>
<body data-root="{escape(_url(request, ""))}">
<a class="skip" href="#main">Skip to content</a>
<header class="bar"><strong>whichlora</strong><nav aria-label="Pages">{links}</nav>
<button type="button" id="theme" aria-label="Switch between dark and light">◐</button></header>
<main id="main">
{body}
</main>
</body>
</html>
""")


def _table(
    name: str, headers: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[int], wide: int
) -> str:
    """Lay out cells, which must be escaped, in a box that the keyboard scrolls too."""
    laid = lines_table(headers, [(cells, "") for cells in lines], right=right, wide=wide)
    return laid.replace('class="scroll"', f'class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"', 1)


# --- choose ---


@router.get("/")
async def choose(request: Request) -> Response:
    """Choose a card and limits."""
    gpus = _options([(gpu.slug, f"{gpu.name}, {format_bytes(gpu.total_bytes)}") for gpu in _sorted_gpus()], DEFAULT_GPU)
    ranks = _options([(str(rank), str(rank)) for rank in (4, 8, 16, 32, 64, 128)], "16")
    methods = "".join(
        f'<label><input type="checkbox" name="method" value="{name}"{" checked" if name in _METHODS[:2] else ""}> '
        f"{name}</label>"
        for name in _METHODS
    )
    text = resources.files(__package__).joinpath("static", "choose.html").read_text(encoding="utf-8")
    body = text.replace("{gpus}", gpus).replace("{ranks}", ranks).replace("{methods}", methods)
    return _page(request, "Choose", body, scripts=("plotly.js", "serve.js"))


def _sorted_gpus() -> list[Any]:
    return sorted(all_gpus(), key=lambda gpu: gpu.name)


def _options(choices: Iterable[tuple[str, str]], *selected: str) -> str:
    return "".join(
        f'<option value="{escape(value)}"{" selected" if value in selected else ""}>{escape(text)}</option>'
        for value, text in choices
    )


# --- compare ---


@router.get("/compare")
async def compare(
    request: Request,
    gpu: Annotated[str, Query(max_length=200)] = DEFAULT_GPU,
    model: Annotated[list[str] | None, Query(max_length=50)] = None,
    seq_len: Annotated[int, Query(ge=1, le=1 << 17)] = 1024,
) -> Response:
    """Put models side by side on a card."""
    card = find_gpu(gpu)
    names = [bundled_model(name).name for name in (model or list(default_models())[:3])[:COMPARED]]
    columns = await asyncio.gather(*(_column(lab_of(request), card.slug, name, seq_len) for name in names))
    known = [(shape.name, f"{shape.name} ({format_count(shape.parameters or 0)})") for shape in all_models()]
    form = f"""<form method="get" class="choose">
<p><label for="gpu">Card</label><select id="gpu" name="gpu">{
        _options([(each.slug, each.name) for each in _sorted_gpus()], card.slug)
    }</select></p>
<p><label for="model">Models, up to {COMPARED}</label><select id="model" name="model" multiple size="8">{
        _options(known, *names)
    }</select></p>
<p><label for="seq_len">Tokens a sample</label><input id="seq_len" name="seq_len" type="number" min="1"
 max="131072" value="{seq_len}"></p>
<p><button type="submit">Compare</button></p></form>"""
    facts = list(columns[0]) if columns else []
    lines = [[escape(fact), *(escape(column[fact]) for column in columns)] for fact in facts]
    table = _table("Models side by side", ("", *names), lines, right=(), wide=0)
    note = "LoRA and QLoRA of rank 16 on all linear layers; the largest batch of 1 to 64 whose upper bound fits."
    body = f"<h1>Compare models on a {escape(card.name)}</h1>{form}" + section("Side by side", paragraph(note), table)
    return _page(request, "Compare", body)


async def _column(lab: Lab, gpu: str, model: str, seq_len: int) -> dict[str, str]:
    """Say what a model takes, by what is asked."""
    fields = {"gpu": gpu, "model": model, "methods": ["lora", "qlora"], "rank": 16, "seq_len": seq_len}
    rows = await lab.workers.call(work.explore, {**fields, "precision": "bf16-true"})
    shape, card = bundled_model(model), find_gpu(gpu)
    column = {"parameters": format_count(shape.parameters or 0), "family": shape.family}
    for method in ("lora", "qlora"):
        fitting = [
            row
            for row in rows
            if row["method"] == method and (row["process_bytes"] or [0, 1 << 60])[1] <= card.total_bytes
        ]
        column[f"{method}: batch that fits"] = str(max((row["batch_size"] for row in fitting), default="none"))
        least = min((row["process_bytes"][1] for row in fitting), default=None)
        column[f"{method}: process bytes, at least"] = "-" if least is None else format_bytes(least)
        rates = [row["batch_size"] * seq_len / row["step_s"] for row in fitting if row["step_s"]]
        column[f"{method}: tokens a second"] = f"{max(rates):,.0f}" if rates else "-"
    return column | await _serving(lab, gpu, model)


async def _serving(lab: Lab, gpu: str, model: str) -> dict[str, str]:
    from .schemas import EstimateRequest

    asked = EstimateRequest(gpu=gpu, model=model, phase="generate", prefill_len=512, decode_len=128)
    names = ("serving: process bytes", "serving: prefill of 512", "serving: a token", "serving: verdict")
    try:
        found = await lab.workers.call(work.estimate, asked.model_dump(mode="json"))
    except work.Refused as error:
        return dict.fromkeys(names, error.what)
    times = (found.get("prefill_s"), found.get("decode_s_per_token"))
    shown = [format_seconds(each) if each is not None else "-" for each in times]
    return dict(zip(names, (format_bytes(found["process_bytes"]), *shown, found["verdict"]), strict=True))


# --- cards ---


@router.get("/cards")
async def cards(request: Request) -> Response:
    """List all cards, those that people here measured first."""
    stats = await asyncio.to_thread(lab_of(request).keeper.store.stats)
    counts: dict[str | None, int] = {}
    for group in stats.groups:
        counts[group.gpu] = counts.get(group.gpu, 0) + group.total
    lines = [
        [
            f'<a href="{escape(_url(request, f"/cards/{gpu.slug}"))}">{escape(gpu.name)}</a>',
            format_bytes(gpu.total_bytes),
            escape(gpu.architecture),
            f"{counts.get(gpu.slug, 0):,}",
        ]
        for gpu in sorted(all_gpus(), key=lambda gpu: (-counts.get(gpu.slug, 0), gpu.name))
    ]
    table = _table("Cards", ("card", "memory", "architecture", "measurements here"), lines, right=(1, 3), wide=0)
    return _page(request, "Cards", "<h1>Cards</h1>" + section("All cards", table))


@router.get("/cards/{slug}")
async def card(slug: str, request: Request) -> Response:
    """Tell what people here measured on a card, and how corrections do on it."""
    try:
        gpu = find_gpu(slug)
    except UnknownName as error:
        raise UnknownMeasurement("no such card", value=slug, todo=error.todo) from None
    store, only = lab_of(request).keeper.store, Filters(gpu=gpu.slug)
    stats, found = await asyncio.gather(
        asyncio.to_thread(store.stats, only), asyncio.to_thread(store.query, only, limit=SHOWN)
    )
    rates = gpu.matmul_flops_per_s
    facts = (
        ("memory", f"{format_bytes(gpu.total_bytes)} ({gpu.memory_basis})"),
        ("bandwidth", f"{gpu.hbm_bytes_per_s / 1e9:,.0f} GB/s"),
        ("bf16", "-" if rates.bf16 is None else f"{rates.bf16 / 1e12:,.0f} TFLOP/s"),
        ("architecture", gpu.architecture),
    )
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    body = f'<h1>{escape(gpu.name)}</h1><dl class="facts">{listed}</dl>'
    body += section("Measured here", _groups(stats.groups), _latest(found))
    body += section("Corrections on this card", *card_offsets(current_correction(), gpu.slug, _table))
    return _page(request, gpu.name, body)


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
    return _table("Counts by evidence", headers, lines, right=range(1, 6), wide=0)


def _latest(found: Sequence[Any]) -> str:
    lines = []
    for one in found:
        workload, times = one.workload, one.step or one.decode_per_token
        peaks = (one.allocated_peak_bytes, one.reserved_peak_bytes)
        lines.append(
            [
                escape(f"{one.measured_at:%Y-%m-%d}" if one.measured_at else "-"),
                escape(workload.model),
                escape(f"{workload.phase} {workload.method} r{workload.rank} batch {workload.batch_size}"),
                *("-" if each is None else format_bytes(each) for each in peaks),
                _seconds(times),
                escape(one.outcome),
                f"<code>{one.id[:12]}</code>",
            ]
        )
    headers = ("date", "model", "setup", "allocated", "reserved", "time", "outcome", "id")
    return _table("Latest measurements", headers, lines, right=(3, 4, 5), wide=1) if lines else ""


def _seconds(times: TimeStats | None) -> str:
    known = None if times is None else times.mean_s if times.median_s is None else times.median_s
    return "-" if known is None else format_seconds(known)


# --- calibration ---


@router.get("/calibration")
async def calibration(request: Request) -> Response:
    """Tell how well predictions do on what they have not seen."""
    history = await asyncio.to_thread(correction_history, correction_path())
    body = "\n".join(calibration_parts(current_correction(), history, _table))
    return _page(request, "Calibration", f"<h1>How good predictions are</h1>{body}")
