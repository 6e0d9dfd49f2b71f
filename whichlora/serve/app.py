"""The server as an ASGI application: routes around the library, and what happens to errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import StoreBusy, StoreError, UnknownMeasurement
from whichlora_profiles_db.errors import BadPack

from .. import __version__
from . import frame, page_cards, pages, routes, schemas, store_routes
from .access import Forbidden, Lab, Unknown, check, lab_of, secured
from .guard import Guard, Metrics
from .keeper import Full, Keeper
from .picks import Picks, UnknownPick
from .routes import PROBLEMS, as_json, problem
from .settings import Settings
from .tokens import Role
from .work import Busy, Workers

RETRY_AFTER_S = 2
_ABOUT = (
    "Which base model, LoRA variant and batch size fit a GPU and finish in time, and what was measured in this lab."
)
#: Errors with a status of their own, the most special first.
_STATUS: tuple[tuple[type[WhichloraError], int], ...] = (
    (Unknown, 401),
    (Forbidden, 403),
    (UnknownMeasurement, 404),
    (UnknownPick, 404),
    (BadPack, 422),
    (Busy, 503),
    (Full, 503),
    (StoreBusy, 503),
    (StoreError, 503),
)


def make_app(settings: Settings, keeper: Keeper) -> FastAPI:
    """Return the application of a server that owns the store of an entered `keeper`."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        workers = Workers(jobs=settings.jobs, limit_s=settings.estimate_s)
        picks = Picks(most=settings.most_picks, limit_s=settings.pick_s)
        app.state.lab = Lab(settings=settings, keeper=keeper, workers=workers, picks=picks, metrics=metrics)
        _gauges(app.state.lab)
        try:
            yield
        finally:
            await picks.close()
            workers.close()

    app = FastAPI(
        title="whichlora",
        description=_ABOUT,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.answers = {}
    for router in (routes.remembered, routes.router, store_routes.reading, store_routes.writing, store_routes.admin):
        app.include_router(router)
    _add_service_routes(app)
    for router in (pages.router, page_cards.router, frame.public):
        app.include_router(router)
    app.add_exception_handler(WhichloraError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    described = app.openapi
    app.openapi = lambda: secured(described(), read_needs_token=settings.read_needs_token)  # type: ignore[method-assign]
    return app


def _add_service_routes(app: FastAPI) -> None:
    limits: dict[int | str, dict[str, Any]] = {429: PROBLEMS[429]}

    @app.get("/health", response_model=schemas.Health, tags=["service"], responses=limits)
    async def health(request: Request) -> Response:
        """Say that the server answers."""
        read_only = lab_of(request).settings.read_only
        return as_json({"status": "ok", "whichlora": __version__, "read_only": read_only})

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
    denied: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (401, 403, 429)}

    @app.get(
        "/metrics", tags=["service"], response_class=Response, responses={200: text, **denied}, openapi_extra=_READS
    )
    async def metrics(request: Request) -> Response:
        """Count requests, times, submissions and what is kept, for Prometheus."""
        check(request, Role.READER)
        content = generate_latest(lab_of(request).metrics.registry)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


_READS = routes.READS


def _gauges(lab: Lab) -> None:
    lab.metrics.gauge("measurements", "Measurements in the store.", lambda: lab.keeper.store.count())
    lab.metrics.gauge("submissions_waiting", "Submissions that wait for their turn.", lambda: lab.keeper.waiting)
    lab.metrics.gauge("picks_running", "Searches that run.", lambda: lab.picks.running)
    lab.metrics.gauge("cache_hits", "Predictions that were known already.", lambda: lab.workers.hits)
    lab.metrics.gauge("cache_misses", "Predictions that were computed.", lambda: lab.workers.misses)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, WhichloraError)
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 422)
    if status == 503 and isinstance(error, StoreError):
        error = StoreError("the store cannot be used now", todo="Try again; tell whoever runs the server.")
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": str(RETRY_AFTER_S)}}.get(status)
    return _problem(request, status, problem(error), headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    if first["type"] == "json_invalid":
        return _said(request, 400, "not JSON", "Send a JSON object, as /openapi.json describes.")
    place = ".".join(str(part)[:100] for part in first["loc"])
    return _said(request, 422, f"{place}: {first['msg']}", "See /openapi.json for what is allowed.")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _said(request, error.status_code, str(error.detail), "See /openapi.json for what there is.", error.headers)


def _said(request: Request, status: int, what: str, todo: str, headers: Any = None) -> Response:
    return _problem(request, status, problem(WhichloraError(what, todo=todo)), headers)


def _problem(request: Request, status: int, content: dict[str, Any], headers: Any = None) -> Response:
    if frame.is_page(request):
        answer = frame.problem_page(request, status, content)
    else:
        answer = as_json(content)
        answer.status_code = status
    answer.headers.update(headers or {})
    return answer
