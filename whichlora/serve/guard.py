"""Around every request: sizes, rates, the headers that keep a page to itself, and counting."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from starlette.exceptions import HTTPException

from .settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The page takes nothing from elsewhere; plotly sets styles on what it draws.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
#: How much of a request that is refused is read nevertheless.
DISCARDED_BYTES = 16 << 20
_CALLERS = 10_000
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "whichlora_requests", "Requests by route and status.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "whichlora_request_seconds", "Time to answer.", ("route",), buckets=_BUCKETS, registry=self.registry
        )
        self.added = Counter("whichlora_measurements_added", "Measurements that came in.", registry=self.registry)
        self.refused = Counter("whichlora_packs_refused", "Packs that were refused.", registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Tell a number as it is when it is asked for."""
        Gauge(f"whichlora_{name}", text, registry=self.registry).set_function(read)


class TooLarge(HTTPException):
    """A body longer than allowed."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(413, detail=f"a request of more than {most_bytes} bytes", headers={"connection": "close"})


class Rates:
    """A bucket of requests for each caller, filled at a steady rate."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """Count a request; return 0 where it may pass, else how long to wait."""
        if self._per_s <= 0:
            return 0.0
        now = time.monotonic()
        left, seen = self._buckets.pop(caller, (float(self._burst), now))
        left = min(float(self._burst), left + (now - seen) * self._per_s)
        passes = left >= 1
        self._buckets[caller] = (left - passes, now)
        if len(self._buckets) > _CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if passes else (1 - left) / self._per_s


class Guard:
    """The outermost layer of the server."""

    def __init__(self, app: App, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._rates = Rates(settings.rate_per_s, settings.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.update(_under(self._settings.root_path, scope["path"]))
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self._pass(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        wait_s = self._rates.wait_s(_caller(scope))
        if wait_s > 0:
            retry = {"retry-after": str(math.ceil(wait_s))}
            await refuse(send, 429, "too many requests", f"Wait {math.ceil(wait_s)} s.", retry)
            return
        most = self._settings.most_pack_bytes if scope["method"] == "PUT" else self._settings.most_body_bytes
        todo = f"At most {most} bytes are taken."
        if (announced := _header(scope, b"content-length")).isdigit() and int(announced) > most:
            await _discard(receive)
            await refuse(send, 413, "a request that is too large", todo, {"connection": "close"})
            return
        await self._app(scope, _bounded(receive, most), send)


async def _discard(receive: Receive) -> None:
    """Hear out a request that is a little too large: who still sends hears no answer, a proxy above all."""
    size, more = 0, True
    while more and size < DISCARDED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _under(root: str, path: str) -> dict[str, str]:
    """Place a path under the prefix, which some proxies take off and some leave on."""
    prefixed = not root or path == root or path.startswith(f"{root}/")
    return {"root_path": root, "path": path if prefixed else root + path}


def _bounded(receive: Receive, most_bytes: int) -> Receive:
    """Count what comes in, for bodies whose length is not announced, or not truly."""
    size = 0

    async def receiving() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most_bytes:
            raise TooLarge(most_bytes)
        return message

    return receiving


async def refuse(send: Send, status: int, what: str, todo: str, headers: dict[str, str]) -> None:
    """Answer with a problem."""
    body = json.dumps({"error": {"what": what, "value": None, "todo": todo}}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    start = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _caller(scope: Scope) -> str:
    """Tell callers apart by their address: anybody can make up tokens."""
    return str((scope.get("client") or ("",))[0])
