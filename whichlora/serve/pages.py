"""The first page, whose table and plot follow its sliders in the browser; models side by side; the calibration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response
from starlette.requests import Request

from whichlora_calibration.current import correction_history, correction_path, current_correction
from whichlora_estimators.gpus import all_gpus, find_gpu
from whichlora_estimators.models import all_models, bundled_model, default_models
from whichlora_estimators.units import format_bytes, format_seconds

from ..pickconfig import CHECKPOINTING_ABOVE
from ..report_page import paragraph, section
from ..report_view import format_count
from . import work
from .access import Lab, lab_of, needs
from .frame import box, page, url
from .page_calibration import calibration_parts
from .tokens import Role

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Role.READER))])

DEFAULT_GPU = "rtx-4090"
COMPARED = 6
#: What a model of 4-bit weights needs at least of a card, activations and adapters included, for a first guess.
_BYTES_A_PARAMETER = 1.2
#: The line of a comparison for what one would not expect; left out where no model has anything.
_CAVEATS = "worth knowing"
_METHODS = ("lora", "qlora", "dora", "qdora", "lora-fa", "full")


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
    models = escape(" ".join(reversed(default_models())))
    for name, value in (("gpus", gpus), ("ranks", ranks), ("methods", methods), ("models", models)):
        text = text.replace(f"{{{name}}}", value)
    return page(request, "Choose", text, scripts=("plotly.js", "serve.js"))


def _sorted_gpus() -> list[Any]:
    return sorted(all_gpus(), key=lambda gpu: gpu.name)


def _options(choices: Iterable[tuple[str, str]], selected: str) -> str:
    return "".join(
        f'<option value="{escape(value)}"{" selected" if value == selected else ""}>{escape(text)}</option>'
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
    wanted = list(dict.fromkeys(bundled_model(name).name for name in model or _fitting(card.total_bytes)))
    names = wanted[:COMPARED]
    columns = await asyncio.gather(*(_column(lab_of(request), card.slug, name, seq_len) for name in names))
    facts = [fact for fact in columns[0] if any(column[fact] for column in columns)]
    lines = [[escape(fact), *(escape(column[fact]) for column in columns)] for fact in facts]
    table = box("Models side by side", ("", *names), lines, right=(), wide=0)
    note = (
        "LoRA and QLoRA of rank 16 on all linear layers, activations checkpointed above"
        f" {CHECKPOINTING_ABOVE / 1e9:g} B parameters. A batch of 1 to 64 fits where all of its interval does."
    )
    left = f"The first {COMPARED} of {len(wanted)} are shown." if len(wanted) > COMPARED else ""
    parts = (paragraph(note), paragraph(left) if left else "", table)
    body = f"<h1>Models on {escape(card.name)}</h1>{_compare_form(card.slug, names, seq_len)}"
    body += section("Side by side", *parts)
    more = f'<a href="{escape(url(request, f"/#gpu={card.slug}"))}">What fits on this card</a>'
    return page(request, "Compare", f'{body}<p class="note after">{more}</p>')


def _fitting(total_bytes: int) -> list[str]:
    """Guess the largest three models that a card of this size can fine-tune."""
    names = default_models()
    fitting = [name for name in names if (bundled_model(name).parameters or 0) * _BYTES_A_PARAMETER <= total_bytes]
    return (fitting or list(names[:1]))[-3:]


def _compare_form(gpu: str, chosen: list[str], seq_len: int) -> str:
    """Write the form; the models that are compared come first, the others by size."""
    shapes = sorted(all_models(), key=lambda shape: (shape.name not in chosen, shape.parameters or 0))
    boxes = "".join(
        f'<label><input type="checkbox" name="model" value="{escape(shape.name)}"'
        f"{' checked' if shape.name in chosen else ''}> {escape(shape.name)} <small>{format_count(shape.parameters or 0)}"
        "</small></label>"
        for shape in shapes
    )
    cards = _options([(each.slug, each.name) for each in _sorted_gpus()], gpu)
    return f"""<form method="get" class="choose">
<p><label for="gpu">Card</label><select id="gpu" name="gpu">{cards}</select></p>
<p><label for="seq_len">Tokens a sample</label><input id="seq_len" name="seq_len" type="number" min="1"
 max="131072" value="{seq_len}"></p>
<fieldset class="whole"><legend>Models, up to {COMPARED}</legend><div class="boxes" tabindex="0" role="region"
 aria-label="Models">{boxes}</div></fieldset>
<p><button type="submit">Compare</button></p></form>"""


async def _column(lab: Lab, gpu: str, model: str, seq_len: int) -> dict[str, str]:
    """Say what a model takes, by what is asked."""
    fields = {"gpu": gpu, "model": model, "methods": ["lora", "qlora"], "rank": 16, "seq_len": seq_len}
    rows = await lab.workers.call(work.explore, {**fields, "precision": "bf16-true"})
    shape, card = bundled_model(model), find_gpu(gpu)
    column = {"parameters": format_count(shape.parameters or 0), "family": shape.family}
    for method in ("lora", "qlora"):
        own = [row for row in rows if row["method"] == method and row["process_bytes"]]
        fitting = [row for row in own if row["process_bytes"][1] <= card.total_bytes]
        column[f"{method}: largest batch that fits"] = str(max((row["batch_size"] for row in fitting), default="none"))
        least = min((row["process_bytes"][1] for row in own), default=None)
        column[f"{method}: process bytes up to, batch 1"] = "-" if least is None else format_bytes(least)
        rates = [row["batch_size"] * seq_len / row["step_s"] for row in fitting if row["step_s"]]
        column[f"{method}: tokens trained a second"] = f"{max(rates):,.0f}" if rates else "-"
    said = dict.fromkeys(text for row in rows for text in row.get("caveats", ()))
    column[_CAVEATS] = "; ".join(said)
    return column | await _serving(lab, gpu, model)


async def _serving(lab: Lab, gpu: str, model: str) -> dict[str, str]:
    from .schemas import EstimateRequest

    asked = EstimateRequest(gpu=gpu, model=model, phase="generate", prefill_len=512, decode_len=128)
    names = ("serving: process bytes", "serving: prefill of 512 tokens", "serving: time per token", "serving: verdict")
    try:
        found = await lab.workers.call(work.estimate, asked.model_dump(mode="json"))
    except work.Refused as error:
        return dict.fromkeys(names, error.what)
    times = (found.get("prefill_s"), found.get("decode_s_per_token"))
    shown = [format_seconds(each) if each is not None else "-" for each in times]
    return dict(zip(names, (format_bytes(found["process_bytes"]), *shown, found["verdict"]), strict=True))


# --- calibration ---


@router.get("/calibration")
async def calibration(request: Request) -> Response:
    """Tell how well predictions do on what they have not seen."""
    history = await asyncio.to_thread(correction_history, correction_path())
    held = await asyncio.to_thread(lab_of(request).keeper.store.stats)
    body = "\n".join(calibration_parts(current_correction(), history, held, box))
    return page(request, "Calibration", f"<h1>How good predictions are</h1>{body}")
