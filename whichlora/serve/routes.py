"""What is computed: estimates, explorations, searches; and what is known: models, cards, corrections."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.requests import Request

from whichlora_calibration.correction import correction_to_json
from whichlora_calibration.current import correction_history, correction_path, current_correction
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import all_gpus, find_gpu
from whichlora_estimators.models import all_models, bundled_model, default_models

from . import schemas, work
from .access import check, lab_of, needs
from .tokens import Role

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": text}
    for status, text in {
        400: "Not JSON.",
        401: "No token, or one that is not valid.",
        403: "The token's role is not enough, or the server is read-only.",
        404: "There is no such thing.",
        413: "Larger than may be.",
        422: "Understood, and refused: what is wrong and what to do.",
        429: "Too many requests: wait as Retry-After says.",
        503: "Too busy: come again as Retry-After says.",
    }.items()
}
READS = {"x-role": "reader"}
MOST_BYTES_KEYED = 4096


class Remembered(APIRoute):
    """Answers a request that was answered before, byte for byte, without reading it anew."""

    def get_route_handler(self) -> Handler:
        """Look for the answer before anything is parsed."""
        handle: Handler = super().get_route_handler()

        async def handler(request: Request) -> Response:
            body = await request.body()
            if len(body) > MOST_BYTES_KEYED:
                return await handle(request)
            check(request, Role.READER)
            answers: dict[bytes, bytes] = request.app.state.answers
            key = body + work.correction_version().encode()
            if (known := answers.get(key)) is None:
                response = await handle(request)
                if response.status_code == 200:
                    if len(answers) >= work.KEPT:
                        del answers[next(iter(answers))]
                    answers[key] = bytes(response.body)
                return response
            return Response(known, media_type="application/json")

        return handler


remembered = APIRouter(route_class=Remembered, responses=PROBLEMS, dependencies=[Depends(needs(Role.READER))])
router = APIRouter(responses=PROBLEMS, dependencies=[Depends(needs(Role.READER))])


def as_json(content: Any) -> Response:
    """Answer with JSON; a number that there is not (of too few runs, say) is null."""
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), allow_nan=False)
    return Response(text, media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@remembered.post("/v1/estimate", response_model=schemas.Answer, tags=["predictions"], openapi_extra=READS)
async def estimate(asked: schemas.EstimateRequest, request: Request) -> Response:
    """Predict peak memory and time of one workload on a card."""
    return as_json(await lab_of(request).workers.call(work.estimate, asked.model_dump(mode="json")))


@router.post("/v1/estimates", response_model=schemas.Estimates, tags=["predictions"], openapi_extra=READS)
async def estimates(asked: schemas.EstimatesRequest, request: Request) -> Response:
    """Predict several; one that must be refused is answered with its problem, the others all the same."""
    workers = lab_of(request).workers

    async def one(fields: dict[str, Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await workers.call(work.estimate, fields)
        except work.Refused as error:
            return problem(error)
        return found

    found = await asyncio.gather(*(one(each.model_dump(mode="json")) for each in asked.requests))
    return as_json({"predictions": found})


@router.post("/v1/explore", response_model=schemas.Explored, tags=["predictions"], openapi_extra=READS)
async def explore(asked: schemas.ExploreRequest, request: Request) -> Response:
    """Predict fine-tuning of models on a card, by method and batch size: what the page draws."""
    gpu = find_gpu(asked.gpu)
    names = asked.models or list(default_models())
    models = list(dict.fromkeys(bundled_model(name).name for name in names))
    shared = {**asked.model_dump(mode="json", exclude={"models"}), "gpu": gpu.slug}
    workers = lab_of(request).workers
    found = await asyncio.gather(*(workers.call(work.explore, {**shared, "model": model}) for model in models))
    return as_json({"gpu": gpu.slug, "total_bytes": gpu.total_bytes, "rows": [row for rows in found for row in rows]})


# --- searches ---

PickId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", examples=["0123456789abcdef"])]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events."}
}


@router.post("/v1/picks", response_model=schemas.PickState, status_code=202, tags=["picks"], openapi_extra=READS)
async def start_pick(asked: schemas.PickRequest, request: Request) -> Response:
    """Start a search for the largest model within limits."""
    pick = lab_of(request).picks.start(asked.model_dump(mode="json", exclude_none=True))
    return Response(json.dumps(pick.as_json()), status_code=202, media_type="application/json")


@router.get("/v1/picks/{id}", response_model=schemas.PickState, tags=["picks"], openapi_extra=READS)
async def get_pick(id: PickId, request: Request) -> Response:  # noqa: A002
    """Return how a search stands, with its result once it is done."""
    return as_json(lab_of(request).picks.get(id).as_json())


@router.delete("/v1/picks/{id}", response_model=schemas.PickState, tags=["picks"], openapi_extra=READS)
async def cancel_pick(id: PickId, request: Request) -> Response:  # noqa: A002
    """End a search."""
    return as_json((await lab_of(request).picks.cancel(id)).as_json())


@router.get(
    "/v1/picks/{id}/events", tags=["picks"], openapi_extra=READS, response_class=StreamingResponse, responses=_STREAM
)
async def follow_pick(id: PickId, request: Request) -> Response:  # noqa: A002
    """Follow a search as server-sent events: `progress`, then one of `done`, `failed` and `cancelled`."""
    picks = lab_of(request).picks
    pick = picks.get(id)

    async def events() -> AsyncIterator[str]:
        async for kind, fields in picks.follow(pick):
            yield f"event: {kind}\ndata: {json.dumps(fields)}\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # or nginx keeps events until there are many
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


# --- what is known ---


@cache
def _models() -> dict[str, Any]:
    names = schemas.ModelEntry.model_fields
    return {"models": [{name: getattr(shape, name) for name in names} for shape in all_models()]}


@cache
def _gpus() -> dict[str, Any]:
    names = schemas.GpuEntry.model_fields
    return {"gpus": [{name: getattr(gpu, name) for name in names} for gpu in all_gpus()]}


@router.get("/v1/models", response_model=schemas.Models, tags=["known"], openapi_extra=READS)
async def models() -> Response:
    """List the bundled models."""
    return as_json(_models())


@router.get("/v1/gpus", response_model=schemas.Gpus, tags=["known"], openapi_extra=READS)
async def gpus() -> Response:
    """List the cards."""
    return as_json(_gpus())


@router.get("/v1/corrections/current", response_model=schemas.Corrections, tags=["known"], openapi_extra=READS)
async def current() -> Response:
    """Return the correction in use."""
    found = current_correction()
    return as_json({"corrections": [] if found is None else [correction_to_json(found)]})


@router.get("/v1/corrections", response_model=schemas.Corrections, tags=["known"], openapi_extra=READS)
async def corrections() -> Response:
    """List all corrections that were ever in use here, the latest first."""
    found = await asyncio.to_thread(correction_history, correction_path())
    return as_json({"corrections": [correction_to_json(each) for each in found]})


def problem(error: WhichloraError) -> dict[str, Any]:
    """Return an error as JSON that any encoding can carry."""
    shown = None if error.value is None else repr(error.value)[:300]
    return {"error": {"what": _clean(error.what), "value": shown and _clean(shown), "todo": _clean(error.todo)}}


def _clean(text: str) -> str:
    return text[:2000].encode("utf-8", "replace").decode()
