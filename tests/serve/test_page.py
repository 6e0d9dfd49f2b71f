"""The page as a person uses it: with a mouse, by keyboard, in the dark, on a phone; and nothing leaves the host."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import Running

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the page")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
_QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
_QUIET += ("--disable-background-networking", "--disable-component-update")
_WAIT_MS = 90_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_QUIET))
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """Open a page whose console must stay quiet and whose requests must all go to the server."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["clipboard-read"])
    problems: list[str] = []
    found = context.new_page()
    found.set_default_timeout(_WAIT_MS)
    found.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: problems.append(str(error)))
    host = urlsplit(server.url).netloc
    found.on("request", lambda one: problems.append(one.url) if _goes_elsewhere(one.url, host) else None)
    yield found
    context.close()
    assert problems == []


def _goes_elsewhere(url: str, host: str) -> bool:
    return urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).netloc != host


def opened(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/")
    page.wait_for_selector("#rows tbody tr")
    page.wait_for_selector("#plot .scatterlayer .point")


def slide(page: Any, name: str, value: float) -> None:
    page.evaluate(
        "([name, value]) => { const it = document.getElementById(name); it.value = value;"
        " it.dispatchEvent(new Event('input', {bubbles: true})); }",
        [name, value],
    )
    page.wait_for_timeout(200)


def test_choose_slide_click_and_run(page: Any, server: Running) -> None:
    """Limits that shrink shrink the choice; what is clicked shows its bytes and a command that gives the same numbers."""
    opened(page, server)
    first = page.text_content("#headline")
    within = page.locator("#rows td.yes").count()
    slide(page, "memory", 30)
    assert page.text_content("#headline") != first
    assert page.locator("#rows td.yes").count() < within
    slide(page, "hours", -1)
    slide(page, "samples", 6)
    assert page.text_content("#headline") == "Nothing keeps these limits"
    slide(page, "samples", 3)
    slide(page, "hours", 2)
    page.locator("#rows tr.chosen button").click()
    page.wait_for_selector("#detail:not([hidden])")
    shown = page.text_content("#detail-cards")
    assert "formula" in shown or "corrected" in shown
    assert page.locator("#detail-legend li").count() >= 4
    page.get_by_role("button", name="Copy command").click()
    sync_api.expect(page.locator("#status")).to_have_text("Copied.")
    command = shlex.split(page.text_content("#command"))
    assert command[0] == "whichlora"
    said = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True, timeout=120)
    allocated = re.search(r"allocated at the peak([0-9.]+)", shown)
    assert allocated
    assert allocated[1] in said.stdout


def test_copied_config_and_job_are_valid(page: Any, server: Running) -> None:
    """The copied config is one that pick takes and chooses the same by; the job script is a shell script."""
    import yaml

    from whichlora.pickconfig import config_from_fields

    opened(page, server)
    page.locator("#rows tr.chosen button").click()
    page.wait_for_selector("#detail:not([hidden])")
    name = page.text_content("#detail-name")
    config = config_from_fields(yaml.safe_load(page.text_content("#config")))
    assert config.models[0] in name
    assert f"batch {config.stage2.batch_sizes[0]}" in name
    subprocess.run(["bash", "-n"], input=page.text_content("#job"), text=True, check=True)


def test_a_dot_opens_what_is_behind_it(page: Any, server: Running) -> None:
    """Clicking a point of the plot shows that configuration."""
    opened(page, server)
    page.locator("#plot").scroll_into_view_if_needed()
    box = page.locator("#plot .scatterlayer .trace").nth(1).locator(".point").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(300)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#detail:not([hidden])")


def test_keyboard_alone(page: Any, server: Running) -> None:
    """Every control is reached by Tab and worked by keys."""
    opened(page, server)
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 20)"))
    assert {"gpu", "rank", "seq_len", "samples", "epochs", "memory", "hours", "theme"} <= set(seen)
    page.focus("#memory")
    before = page.text_content("#memory_shown")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator("#memory_shown")).not_to_have_text(before)
    page.focus("#rows tr.chosen button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "detail"


def test_themes(page: Any, server: Running) -> None:
    """The button turns the page dark and light, and the choice lasts."""
    opened(page, server)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    dark = page.evaluate(colour)
    assert light != dark
    page.goto(f"{server.url}/cards")
    assert page.evaluate(colour) == dark
    page.click("#theme")
    assert page.evaluate(colour) == light


@pytest.mark.parametrize("path", ["/", "/compare", "/cards", "/cards/rtx-4090", "/calibration"])
def test_every_page_is_accessible_and_fits_a_phone(page: Any, server: Running, path: str) -> None:
    """On each page axe finds nothing serious in either theme, and at 360 pixels nothing sticks out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe checks accessibility").Axe()
    page.goto(f"{server.url}{path}")
    if path == "/":
        page.wait_for_selector("#rows tbody tr")
        page.locator("#rows tr.chosen button").click()
        page.wait_for_selector("#detail:not([hidden])")
    for _ in range(2):
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
        page.click("#theme")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
