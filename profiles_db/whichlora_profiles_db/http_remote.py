"""A lab's server as a remote: the packs of `whichlora serve`, fetched and sent over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from .errors import BadPack
from .filters import Filters
from .remotes import RemoteError, is_pack_name, partition, sha256_of
from .store import GroupStats

T = TypeVar("T")
#: Holds the token where none is given.
VARIABLE = "WHICHLORA_TOKEN"
TIMEOUT_S = 30.0
TRIES = 4
_PAUSE_S = 0.25
_CHUNK_BYTES = 1 << 20
_MOST_JSON_BYTES = 1 << 28
_AGAIN = (429, 502, 503, 504)


class HttpRemote:
    """A server, with a token for what it does not do for everybody. Nothing is sent to any other host."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            todo = "Write https://host, with a port or a path where it has one; give a token with --token."
            raise RemoteError("not the URL of a server", value=url, todo=todo)
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._token = token or os.environ.get(VARIABLE) or None
        self._opener = urllib.request.build_opener(_NoRedirects)

    @property
    def url(self) -> str:
        """The server's URL."""
        return self._url

    def list(self) -> list[str]:
        """Return the names of the packs that are there, in order."""
        found = self.ask("GET", "/v1/packs").get("packs")
        return sorted(name for name in found or () if isinstance(name, str) and is_pack_name(name))

    def fetch(self, name: str, to: Path, *, most_bytes: int) -> None:
        """Copy a pack into a new file; one that is cut off on the way is asked for anew."""

        def copy(answer: http.client.HTTPResponse) -> None:
            size, announced = 0, answer.headers.get("Content-Length", "")
            with to.open("wb") as file:
                while chunk := answer.read(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > most_bytes:
                        raise BadPack("a pack larger than any may be", value=name, todo=f"Up to {most_bytes} bytes.")
                    file.write(chunk)
            if announced.isdigit() and size != int(announced):
                raise http.client.IncompleteRead(b"", int(announced) - size)

        self._call("GET", f"/v1/packs/{sha256_of(name)}", copy)

    def put(self, name: str, source: Path) -> None:
        """Send a pack; when this returns, the server has its measurements on disk."""
        gpu, month = partition(name)
        known = {key: value for key, value in (("gpu", gpu), ("month", month)) if value is not None}
        path = f"/v1/packs/{sha256_of(name)}" + (f"?{urlencode(known, quote_via=quote)}" if known else "")
        self._call("PUT", path, _drained, body=source)

    def stats(self, filters: Filters | None = None) -> tuple[GroupStats, ...]:
        """Return how much the server holds, by card and evidence."""
        from .stats_form import group_from_json

        groups = self.ask("POST", "/v1/stats", _filter_fields(filters)).get("groups")
        return tuple(group_from_json(group) for group in groups or ())

    def ask(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send JSON, if any, and return the JSON object of the answer. Raises RemoteError."""
        content = None if fields is None else json.dumps(fields).encode()
        text = self._call(method, path, lambda answer: answer.read(_MOST_JSON_BYTES), body=content)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RemoteError("no server of whichlora answers there", value=self._url, todo="Check the URL.")
        return found

    def _call(
        self, method: str, path: str, read: Callable[[http.client.HTTPResponse], T], *, body: bytes | Path | None = None
    ) -> T:
        """Send a request and read its answer, again after a pause where the link or the server failed."""
        for left in reversed(range(TRIES)):
            try:
                return self._once(method, path, read, body)
            except _PASSING as error:
                if left == 0 or not _passes(error):
                    raise self._error(error) from error
                wait_s = _retry_after(error) or _PAUSE_S * 2 ** (TRIES - left)
            time.sleep(wait_s * random.uniform(0.5, 1.5))
        raise AssertionError

    def _once(
        self, method: str, path: str, read: Callable[[http.client.HTTPResponse], T], body: bytes | Path | None
    ) -> T:
        headers = {"Accept": "application/json, */*", "User-Agent": "whichlora"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if isinstance(body, Path):
            headers |= {"Content-Type": "application/vnd.apache.parquet", "Content-Length": str(body.stat().st_size)}
            with body.open("rb") as file:
                return self._open(urllib.request.Request(self._url + path, file, headers, method=method), read)
        if body is not None:
            headers["Content-Type"] = "application/json"
        return self._open(urllib.request.Request(self._url + path, body, headers, method=method), read)

    def _open(self, request: urllib.request.Request, read: Callable[[http.client.HTTPResponse], T]) -> T:
        with self._opener.open(request, timeout=self._timeout_s) as answer:
            return read(answer)

    def _error(self, error: Exception) -> RemoteError:
        if isinstance(error, urllib.error.HTTPError):
            what, todo = _said(error)
            return RemoteError(f"the server refused: {what}", value=self._url, todo=todo)
        said = getattr(error, "reason", None) or error
        return RemoteError(
            "the server cannot be reached", value=self._url, todo=f"Check the URL and the link. ({said})"
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token goes to the host that it was given for, and to no other that this one may name."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_PASSING = (urllib.error.URLError, http.client.HTTPException, OSError)


def _passes(error: Exception) -> bool:
    return not isinstance(error, urllib.error.HTTPError) or error.code in _AGAIN


def _retry_after(error: Exception) -> float | None:
    if isinstance(error, urllib.error.HTTPError):
        text = error.headers.get("Retry-After", "")
        return min(float(text), 10.0) if text.isdigit() else None
    return None


def _said(error: urllib.error.HTTPError) -> tuple[str, str]:
    """Return what is wrong and what to do, as the server says."""
    try:
        fields = json.loads(error.read(1 << 16))["error"]
        return str(fields["what"]), str(fields["todo"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        if 300 <= error.code < 400:
            return f"it sends elsewhere ({error.code})", f"Name that place itself: {error.headers.get('Location')}."
        return f"status {error.code}", "Check the URL."


def _drained(answer: http.client.HTTPResponse) -> None:
    answer.read(_CHUNK_BYTES)


def _filter_fields(filters: Filters | None) -> dict[str, Any]:
    from .filters import NAMES, listed

    if filters is None:
        return {}
    fields: dict[str, Any] = {
        name: list(listed(name, chosen)) for name in NAMES if (chosen := getattr(filters, name)) is not None
    }
    return fields | {
        name: moment.isoformat() for name in ("since", "until") if (moment := getattr(filters, name)) is not None
    }
