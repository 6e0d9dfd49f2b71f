"""What was measured: queries, packs in and out, and for admins who may send them."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import FileResponse, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.gpus import find_gpu
from whichlora_profiles_db import BadPack, Filters, Imported, Measurement, UnknownMeasurement
from whichlora_profiles_db.measurement import measurement_from_json, measurement_to_json
from whichlora_profiles_db.stats_form import group_to_json

from . import schemas
from .access import Forbidden, Lab, lab_of, needs
from .routes import PROBLEMS, READS, as_json
from .tokens import Role, Token

reading = APIRouter(responses=PROBLEMS, dependencies=[Depends(needs(Role.READER))], tags=["measurements"])
writing = APIRouter(responses=PROBLEMS, tags=["measurements"])
admin = APIRouter(responses=PROBLEMS, dependencies=[Depends(needs(Role.ADMIN))], tags=["admin"])

WRITES, ADMINISTERS = {"x-role": "contributor"}, {"x-role": "admin"}
Contributor = Annotated[Token, Depends(needs(Role.CONTRIBUTOR))]
PARQUET = "application/vnd.apache.parquet"
MOST_STARS = 4
_PACK_ID = Annotated[
    str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the pack's bytes.", examples=["0" * 64])
]
_Id = Annotated[str, Path(pattern=r"^[0-9a-f]{8,64}$", description="The id, or how it begins.", examples=["0123abcd"])]
_Card = Annotated[str, Field(pattern=r"^[a-z0-9._%~-]{1,200}$", examples=["rtx-4090"])]
_Month = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}$", examples=["2026-03"])]


class Asked(BaseModel):
    """Conditions in a query string."""

    model_config = ConfigDict(extra="forbid")
    gpu: schemas.Name | None = None
    model: schemas.Name | None = None
    method: schemas.Name | None = None
    evidence: schemas.Name | None = None
    outcome: schemas.Name | None = None
    workload_id: schemas.Name | None = None
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class Placed(BaseModel):
    """Where a pack lies among the others: the one card and month that its measurements are of, if they are."""

    model_config = ConfigDict(extra="forbid")
    gpu: _Card | None = None
    month: _Month | None = None


class Latest(BaseModel):
    """How many are asked for."""

    model_config = ConfigDict(extra="forbid")
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


@reading.get("/v1/measurements", response_model=schemas.Measurements, openapi_extra=READS)
async def measurements(asked: Annotated[Asked, Query()], request: Request) -> Response:
    """List measurements, the latest first; names may be patterns with * and ?."""
    filters = filters_of(asked.model_dump(exclude_none=True, exclude={"limit"}))
    found = await asyncio.to_thread(lab_of(request).keeper.store.query, filters, limit=asked.limit)
    return as_json({"measurements": [measurement_to_json(one.without_names()) for one in found]})


@reading.get("/v1/measurements/{id}", response_model=dict[str, Any], openapi_extra=READS)
async def measurement(id: _Id, request: Request) -> Response:  # noqa: A002
    """Return one measurement."""
    found = await asyncio.to_thread(lab_of(request).keeper.store.get, id)
    return as_json(measurement_to_json(found.without_names()))


@reading.post("/v1/stats", response_model=schemas.Stats, openapi_extra=READS)
async def stats(asked: schemas.StatsRequest, request: Request) -> Response:
    """Count measurements by card and evidence."""
    given = asked.model_dump(exclude_none=True)
    moments: dict[str, Any] = {name: _moment(name, given.pop(name)) for name in ("since", "until") if name in given}
    found = await asyncio.to_thread(lab_of(request).keeper.store.stats, filters_of({**given, **moments}))
    return as_json({"total": found.total, "groups": [group_to_json(group) for group in found.groups]})


@writing.post("/v1/measurements", response_model=schemas.Accepted, status_code=201, openapi_extra=WRITES)
async def submit(asked: schemas.Submit, token: Contributor, request: Request) -> Response:
    """Add measurements: all of them or none. When this is answered, they are on disk."""
    lab = _writable(request)
    given = await asyncio.to_thread(_measurements, asked.measurements)
    return await _taken(lab, lab.keeper.submit_measurements(given, token), "GET /v1/measurements shows the form.")


@reading.get("/v1/packs", response_model=schemas.Packs, openapi_extra=READS, tags=["packs"])
async def packs(request: Request) -> Response:
    """List all packs; together they hold every measurement of the store."""
    listed = await asyncio.to_thread(lab_of(request).keeper.listed)
    return as_json({"packs": sorted(listed.values())})


@reading.get(
    "/v1/packs/{sha256}",
    response_class=FileResponse,
    responses={200: {"content": {PARQUET: {"schema": {"type": "string", "format": "binary"}}}}},
    openapi_extra=READS,
    tags=["packs"],
)
async def fetch_pack(sha256: _PACK_ID, request: Request) -> Response:
    """Return a pack's bytes."""
    keeper = lab_of(request).keeper
    name = (await asyncio.to_thread(keeper.listed)).get(sha256)
    if name is None:
        raise UnknownMeasurement("no pack has this hash", value=sha256, todo="GET /v1/packs lists them.")
    return FileResponse(keeper.packs.path / name, media_type=PARQUET)


_BODY = {"required": True, "content": {PARQUET: {"schema": {"type": "string", "format": "binary"}}}}


@writing.put(
    "/v1/packs/{sha256}",
    response_model=schemas.Accepted,
    status_code=201,
    openapi_extra={**WRITES, "requestBody": _BODY},
    tags=["packs"],
)
async def put_pack(
    sha256: _PACK_ID, token: Contributor, request: Request, asked: Annotated[Placed, Query()]
) -> Response:
    """Add a pack, whole or not at all, whose bytes hash to the name. When this is answered, it is on disk."""
    lab = _writable(request)
    path = lab.keeper.fresh()
    try:
        await _received(request, path, sha256)
        running = lab.keeper.submit(path, token, gpu=asked.gpu, month=asked.month)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return await _taken(lab, running, "`whichlora profiles check` tells what is wrong with it.")


async def _received(request: Request, path: FilePath, sha256: str) -> None:
    """Write a body into a file. Raises BadPack where it was cut off, or is another's."""
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                await asyncio.to_thread(file.write, chunk)
    except ClientDisconnect:
        raise BadPack("a pack that was cut off on its way", value=sha256, todo="Send it again.") from None
    if digest.hexdigest() != sha256:
        raise BadPack("a pack that does not hash to its name", value=sha256, todo="Send it again.")


async def _taken(lab: Lab, running: Future[Imported], todo: str) -> Response:
    """Answer once what was submitted is on disk; a refusal does not say where on this machine the rows lie."""
    try:
        return _accepted(lab, await asyncio.wrap_future(running))
    except BadPack as error:
        lab.metrics.refused.inc()
        raise BadPack(error.what, todo=f"Nothing was taken. {todo}") from None


def _accepted(lab: Lab, done: Imported) -> Response:
    lab.metrics.added.inc(done.added)
    answer = as_json({"pack": done.sha256, "rows": done.manifest.rows, "added": done.added})
    answer.status_code = 201
    return answer


def _writable(request: Request) -> Lab:
    lab = lab_of(request)
    if lab.settings.read_only:
        raise Forbidden("this server is read-only", todo="Push to another one, or ask whoever runs it.")
    return lab


def _measurements(given: list[dict[str, Any]]) -> list[Measurement]:
    found = []
    for place, fields in enumerate(given):
        try:
            found.append(measurement_from_json(fields))
        except WhichloraError as error:
            what = f"measurement {place}: {error.what}"
            raise BadValue(what, value=error.value, todo=error.todo) from None
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError) as error:
            todo = "Send the JSON form that `whichlora profiles show --json` prints."
            raise BadValue(f"measurement {place} is none ({type(error).__name__})", todo=todo) from None
    return found


def filters_of(fields: dict[str, Any]) -> Filters:
    """Return conditions: values only, which DuckDB gets as parameters."""
    for names in fields.values():
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else ():
            if name.count("*") > MOST_STARS:
                raise BadValue("a pattern with too many stars", value=name, todo=f"Use at most {MOST_STARS}.")
    if gpu := fields.get("gpu"):
        names = [gpu] if isinstance(gpu, str) else gpu
        fields = {**fields, "gpu": [name if "*" in name or "?" in name else find_gpu(name).slug for name in names]}
    try:
        return Filters(**fields)
    except OverflowError:
        raise BadValue("a date beyond all calendars", todo="Give one of this century.") from None


def _moment(name: str, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise BadValue(f"{name} is not a date", value=text, todo="Write 2026-01-31T12:00:00+00:00.") from None


# --- for admins ---

_TokenId = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$", examples=["0123456789ab"])]


@admin.get("/v1/tokens", response_model=schemas.TokenList, openapi_extra=ADMINISTERS)
async def tokens(request: Request) -> Response:
    """List tokens, without their secrets."""
    found = [dataclasses.asdict(token) | {"role": token.role.title} for token in lab_of(request).keeper.tokens.all()]
    return as_json({"tokens": found})


@admin.delete("/v1/tokens/{id}", response_model=schemas.TokenList, openapi_extra=ADMINISTERS)
async def revoke(id: _TokenId, request: Request) -> Response:  # noqa: A002
    """Revoke a token: it is refused from now on."""
    known = lab_of(request).keeper.tokens
    if id not in {token.id for token in known.all()}:
        raise UnknownMeasurement("no token has this id", value=id, todo="GET /v1/tokens lists them.")
    known.revoke(id)
    return await tokens(request)


@admin.get("/v1/submissions", response_model=schemas.SubmissionList, openapi_extra=ADMINISTERS)
async def submissions(request: Request, asked: Annotated[Latest, Query()]) -> Response:
    """List what came in, the latest first, and with whose token."""
    found = lab_of(request).keeper.tokens.submissions(asked.limit)
    return as_json({"submissions": [dataclasses.asdict(each) for each in found]})
