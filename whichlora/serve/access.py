"""Checking at every request who asks, and whether they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from whichlora_estimators.errors import WhichloraError

from .tokens import Role, Token

if TYPE_CHECKING:
    from .guard import Metrics
    from .keeper import Keeper
    from .picks import Picks
    from .settings import Settings
    from .work import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """All that requests are answered from."""

    settings: Settings
    keeper: Keeper
    workers: Workers
    picks: Picks
    metrics: Metrics


#: Where a browser keeps the token of whoever signed in. It lets read, never write: no form of elsewhere can use it.
COOKIE = "whichlora_token"


class Unknown(WhichloraError):
    """Nobody that we know: status 401."""


class Forbidden(WhichloraError):
    """Somebody who may not do this: status 403."""


def lab_of(request: Request) -> Lab:
    """Return what a request is answered from."""
    lab: Lab = request.app.state.lab
    return lab


def caller(request: Request) -> Token | None:
    """Return whose request this is, None for one without a token. Raises Unknown for a token that is not valid."""
    given = request.headers.get("authorization")
    if given is None:
        return None
    kind, _, text = given.partition(" ")
    token = lab_of(request).keeper.tokens.holder(text.strip()) if kind.lower() == "bearer" else None
    if token is None:
        raise Unknown("a token that is not valid here", todo="Ask whoever runs the server for another one.")
    return token


def signed_in(request: Request) -> Token | None:
    """Return the token that a browser was given at its sign-in, None without one that is still valid."""
    kept = request.cookies.get(COOKIE)
    return None if kept is None else lab_of(request).keeper.tokens.holder(kept)


def check(request: Request, role: Role) -> Token | None:
    """Return the caller's token. Raises Unknown, or Forbidden where the role is not enough."""
    token = caller(request)
    if token is None and role is Role.READER:
        token = signed_in(request)
    settings = lab_of(request).settings
    if token is None and (role > Role.READER or settings.read_needs_token):
        raise Unknown("a token is needed", todo="Send it as `Authorization: Bearer …`.")
    if token is not None and token.role < role:
        todo = f"This one is a {token.role.title}'s: ask whoever runs the server."
        raise Forbidden(f"a {role.title}'s token is needed", todo=todo)
    return token


def needs(role: Role) -> Callable[[Request], Awaitable[Token | None]]:
    """Return what FastAPI asks before a request of this role is answered."""

    async def asked(request: Request) -> Token | None:
        return check(request, role)

    return asked


def secured(schema: dict[str, Any], *, read_needs_token: bool) -> dict[str, Any]:
    """Say in an OpenAPI description which operations need a token: those marked with a role."""
    schema.setdefault("components", {})["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "Made with `whichlora serve tokens create`."}
    }
    for operations in schema["paths"].values():
        for operation in operations.values():
            role = operation.get("x-role", "")
            if role in ("contributor", "admin") or (role == "reader" and read_needs_token):
                operation["security"] = [{"token": []}]
    return schema
