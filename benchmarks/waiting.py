"""Waiting for what another process does, and ports that nobody has."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable


def until(
    ready: Callable[[], bool], what: Callable[[], object] | str, *, seconds: float = 60, pause_s: float = 0.1
) -> None:
    """Wait until something holds. Raises TimeoutError where it does not within some seconds, with `what` it then was."""
    end_s = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end_s:
            raise TimeoutError(what if isinstance(what, str) else str(what()))
        time.sleep(pause_s)


def answers(url: str) -> bool:
    """Say whether a server answers, whatever proxies the environment names."""
    import httpx

    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def free_ports(count: int = 1) -> list[int]:
    """Return ports of the loopback that nobody has, each another one."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]
