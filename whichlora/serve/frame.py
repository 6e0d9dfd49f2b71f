"""The frame of every page: its head, the way to the others, and the pages that say what is wrong or ask who you are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.requests import Request

from whichlora_profiles_db import UnknownMeasurement

from ..report_page import paragraph
from ..report_tables import lines_table
from .access import COOKIE, Forbidden, lab_of

#: Files, and the pages where people sign in and out: open to everybody.
public = APIRouter(include_in_schema=False)

_TYPES = {"serve.js": "text/javascript", "theme.js": "text/javascript", "plotly.js": "text/javascript"}
_STYLES = "style.css"
_PLACES = (("/", "Choose"), ("/compare", "Compare"), ("/cards", "Cards"), ("/calibration", "Calibration"))
_TITLES = {401: "Please sign in", 403: "Not with this token", 404: "There is no such page", 422: "That cannot be shown"}
#: A page of ours, as a path without host: where a sign-in leads back to.
_PATH = re.compile(r"/(?:[a-z]+(?:/[a-z0-9._-]+)?)?")
_COOKIE_S = 30 * 24 * 3600


@public.get("/static/{name}")
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


def url(request: Request, path: str) -> str:
    """Return a path of ours as a browser must ask for it, behind whatever prefix."""
    return str(request.scope.get("root_path", "")).rstrip("/") + path


def page(request: Request, title: str, body: str, *, scripts: Iterable[str] = (), status: int = 200) -> HTMLResponse:
    """Write a page around a body, which must be escaped."""

    def link(name: str) -> str:
        return escape(f"{url(request, '/static/')}{name}?v={_version(name)}")

    loaded = "\n".join(f'<script src="{link(name)}" defer></script>' for name in scripts)
    here = _here(request)
    links = "".join(
        f'<a href="{escape(url(request, path))}"{" aria-current=page" if path == here else ""}>{name}</a>'
        for path, name in _PLACES
    )
    text = f"""<!doctype html>
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
<body data-root="{escape(url(request, ""))}">
<a class="skip" href="#main">Skip to content</a>
<header class="bar"><strong>whichlora</strong><nav aria-label="Pages">{links}</nav>{_leave(request)}
<button type="button" id="theme" aria-label="Switch between dark and light">◐</button></header>
<main id="main">
{body}
</main>
</body>
</html>
"""
    return HTMLResponse(text, status_code=status, headers={"vary": "cookie", "cache-control": "no-cache"})


def _here(request: Request) -> str:
    return request.url.path.removeprefix(str(request.scope.get("root_path", ""))) or "/"


def box(name: str, headers: Sequence[str], lines: Iterable[Sequence[str]], *, right: Sequence[int], wide: int) -> str:
    """Lay out a table of cells, which must be escaped, in a box that the keyboard scrolls too."""
    laid = lines_table(headers, [(cells, "") for cells in lines], right=right, wide=wide)
    return laid.replace('class="scroll"', f'class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"', 1)


# --- what is wrong ---


def is_page(request: Request) -> bool:
    """Say whether somebody looks at a page, rather than a program at the interface."""
    here = _here(request)
    return "text/html" in request.headers.get("accept", "") and not here.startswith(("/v1/", "/static/"))


def problem_page(request: Request, status: int, problem: dict[str, Any]) -> Response:
    """Tell on a page what is wrong and what to do; whoever must sign in is asked to."""
    if status == 401:
        return _ask(request, wrong=request.cookies.get(COOKIE) is not None)
    said = problem["error"]
    value = f" <code>{escape(said['value'])}</code>" if said["value"] else ""
    body = f"<h1>{escape(_TITLES.get(status, 'That did not work'))}</h1>"
    body += f'<p class="lead">{escape(said["what"])}{value}.</p>{paragraph(said["todo"])}'
    return page(request, "Problem", body, status=status)


# --- signing in ---


def _ask(request: Request, *, wrong: bool, to: str | None = None) -> Response:
    to = to or (_here(request) if _PATH.fullmatch(_here(request)) else "/")
    note = '<p class="no" role="alert">That token is not valid here (any more).</p>' if wrong else ""
    body = f"""<h1>{_TITLES[401]}</h1>
<p class="lead">This lab's server is open to holders of a token. Whoever runs it makes them:
<code>whichlora serve tokens create NAME --role reader</code>.</p>{note}
<form method="post" action="{escape(url(request, "/sign-in"))}" class="choose sign-in">
<p><label for="token">Token</label><input id="token" name="token" type="password" autocomplete="current-password"
 spellcheck="false" required maxlength="200"></p><input type="hidden" name="to" value="{escape(to)}">
<p><button type="submit">Sign in</button></p></form>"""
    return page(request, "Sign in", body, status=401)


def _leave(request: Request) -> str:
    if request.cookies.get(COOKIE) is None:
        return ""
    action = escape(url(request, "/sign-out"))
    return f'<form method="post" action="{action}"><button type="submit">Sign out</button></form>'


@public.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Keep a token in a cookie that scripts do not see and other sites do not send."""
    _from_here(request)
    given = parse_qs((await request.body()).decode("latin-1"))
    token, to = (given.get(name, [""])[0].strip() for name in ("token", "to"))
    to = to if _PATH.fullmatch(to) else "/"
    if lab_of(request).keeper.tokens.holder(token) is None:
        return _ask(request, wrong=True, to=to)
    answer = RedirectResponse(url(request, to), status_code=303)
    secure = request.url.scheme == "https"
    path = url(request, "") or "/"
    answer.set_cookie(COOKIE, token, max_age=_COOKIE_S, path=path, secure=secure, httponly=True, samesite="strict")
    return answer


@public.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """Forget the token."""
    _from_here(request)
    answer = RedirectResponse(url(request, "/"), status_code=303)
    answer.delete_cookie(COOKIE, path=url(request, "") or "/", httponly=True, samesite="strict")
    return answer


def _from_here(request: Request) -> None:
    """Raise Forbidden for a form of another site: nobody is signed in or out by others."""
    if request.headers.get("sec-fetch-site") not in (None, "same-origin"):
        raise Forbidden("a form of another site", todo="Sign in on the server's own page.")
