"""A headless Chromium for tests of pages, and an ear at its console and its network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from . import programs

CHROMIUM = programs.find("chromium")
#: Chromium itself asks nobody anything; whatever is asked then, a page asked.
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_QUIET += ["--disable-background-networking", "--disable-component-update"]
WAIT_MS = 90_000


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser, or skip the test, saying what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the page")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield found
        found.close()


@contextmanager
def quiet_page(browser: Any, may_ask: Callable[[str], bool], **options: Any) -> Iterator[Any]:
    """Open a page whose console must stay quiet and which asks only what `may_ask` allows."""
    context = browser.new_context(**options)
    problems: list[str] = []
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda one: None if may_ask(one.url) else problems.append(one.url))
    yield page
    context.close()
    assert not problems, problems
