"""The page as a person uses it: with a mouse, by keyboard, in the dark, on a phone; and nothing leaves the host."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from tests.browsing import quiet_page
from whichlora import estimate
from whichlora.pickconfig import config_from_fields
from whichlora.serve.tokens import Role, Tokens, tokens_path
from whichlora_profiles_db import Environment, Measurement, TimeStats
from whichlora_profiles_db.measurement import measurement_to_json

from .conftest import Running, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the page")
CARD, SMALL = "rtx-4090", "Qwen/Qwen2.5-0.5B"


def at(server: Running) -> Callable[[str], bool]:
    """Return what says that a URL is on the server."""
    host = urlsplit(server.url).netloc
    return lambda url: urlsplit(url).scheme not in ("http", "https", "ws", "wss") or urlsplit(url).netloc == host


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    viewport = {"width": 1200, "height": 900}
    with quiet_page(browser, at(server), viewport=viewport, permissions=["clipboard-read"]) as found:
        yield found


def opened(page: Any, server: Running, choice: str = "") -> None:
    page.goto(f"{server.url}/{choice}")
    page.get_by_text("configurations predicted").wait_for()
    page.locator("#plot .scatterlayer .point").first.wait_for()


def detailed(page: Any, server: Running, choice: str = "") -> None:
    opened(page, server, choice)
    page.locator("#rows tr.chosen button").click()
    page.wait_for_selector("#detail:not([hidden])")


def slide(page: Any, name: str, value: float) -> None:
    page.evaluate(
        "([name, value]) => { const it = document.getElementById(name); it.value = value;"
        " it.dispatchEvent(new Event('input', {bubbles: true})); }",
        [name, value],
    )
    page.wait_for_timeout(200)


def run(command: list[str], folder: Path, **environ: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_choose_slide_click_and_run(page: Any, server: Running, tmp_path: Path) -> None:
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
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert command[0] == "whichlora"
    allocated = re.search(r"allocated at the peak([0-9.]+)", shown)
    assert allocated
    assert allocated[1] in run([sys.executable, "-m", *command], tmp_path)


def test_what_one_would_not_expect_is_said(page: Any, server: Running) -> None:
    """A mixture of experts, were it among the models, has its caveats beside its numbers, a dense model none."""
    opened(page, server, "#gpu=h200-sxm-141gb&methods=qlora&hours=1000")
    page.evaluate(
        "() => { document.getElementById('choose').dataset.models = 'Qwen/Qwen1.5-MoE-A2.7B Qwen/Qwen2.5-0.5B';"
        " document.getElementById('rank').dispatchEvent(new Event('change')); }"
    )
    for name, said in (("Qwen1.5-MoE-A2.7B", True), ("Qwen2.5-0.5B", False)):
        page.locator("#rows tr").filter(has_text=name).locator("button").first.click()
        sync_api.expect(page.locator("#detail-name")).to_contain_text(name)
        sync_api.expect(page.locator("#detail-caveats")).to_be_visible(visible=said)
        assert ("quantises none of the experts" in page.text_content("#detail-caveats")) == said


def test_copied_config_and_job_choose_the_same(page: Any, server: Running, tmp_path: Path) -> None:
    """The copied config, and the job script with it inside, have pick choose what was clicked, within the same limits."""
    detailed(page, server, "#token_ms=12&memory=50&hours=4")
    name = page.text_content("#detail-name")
    config = config_from_fields(yaml.safe_load(page.text_content("#config")))
    assert config.stage1.time_per_token_s == pytest.approx(0.012)
    assert config.stage2.total_time_s == 4 * 3600
    assert config.stage2.peak_memory_bytes == pytest.approx(config.gpu.total_bytes / 2, rel=1e-3)
    tools = tmp_path / "bin"
    tools.mkdir()
    # What the job calls: the real pick, and in place of the training a look at what it would be given.
    (tools / "whichlora").write_text(
        f'#!/bin/bash\nif [ "$1" = finetune ]; then echo "$@"; else exec {sys.executable} -m whichlora "$@" --offline; fi\n'
    )
    (tools / "whichlora").chmod(0o755)
    (tmp_path / "job.sh").write_text(page.text_content("#job"))
    said = run(["bash", "job.sh", "mine.jsonl"], tmp_path, PATH=f"{tools}:{os.environ['PATH']}")
    assert said.splitlines()[-1] == "finetune whichlora-job --data mine.jsonl"
    choice = json.loads((tmp_path / "whichlora-job" / "plan.json").read_text())["choice"]
    assert choice["workload"]["model"] in name
    assert f"batch {choice['workload']['batch_size']}" in name


def test_an_address_brings_the_choice_back(page: Any, server: Running) -> None:
    """What was set is in the address: opened by somebody else, it shows the same; numbers may be any, not slider's steps."""
    opened(page, server, "#gpu=l4&methods=qlora")
    page.fill("#samples_exact", "52002")
    page.fill("#token_ms_exact", "25")
    page.wait_for_timeout(300)
    headline, rows = page.text_content("#headline"), page.locator("#rows tbody").text_content()
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.get_by_text("configurations predicted").wait_for()
    sync_api.expect(page.locator("#rows tbody")).to_have_text(rows)
    assert page.text_content("#headline") == headline
    assert page.input_value("#samples_exact") == "52002"
    assert page.input_value("#gpu") == "l4"


def test_what_is_open_follows_the_limits(page: Any, server: Running) -> None:
    """Twice the epochs take twice the time, also below a row that was opened before; another card closes it."""
    detailed(page, server)

    def steps() -> int:
        (found,) = re.findall(r"([0-9,]+) steps", page.text_content("#detail-cards"))
        return int(found.replace(",", ""))

    before = steps()
    slide(page, "epochs", 2)
    assert steps() == 2 * before
    assert "epochs: 2" in page.text_content("#config")
    page.select_option("#gpu", "l4")
    page.wait_for_selector("#detail", state="hidden")


def test_a_dot_opens_what_is_behind_it(page: Any, server: Running) -> None:
    """Clicking a point of the plot shows that configuration."""
    opened(page, server)
    page.locator("#plot").scroll_into_view_if_needed()
    box = page.locator("#plot .scatterlayer .trace").last.locator(".point").first.bounding_box()
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
    assert {"gpu", "rank", "seq_len", "samples", "epochs", "memory", "hours", "token_ms", "theme"} <= set(seen)
    page.focus("#memory")
    before = page.input_value("#memory_exact")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator("#memory_exact")).not_to_have_value(before)
    page.focus("#rows tr.chosen button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")


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
    if path == "/":
        detailed(page, server)
    else:
        page.goto(f"{server.url}{path}")
    for _ in range(2):
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
        page.click("#theme")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_models_side_by_side(page: Any, server: Running) -> None:
    """What is ticked and sent is what is compared, on the card that was chosen."""
    page.goto(f"{server.url}/compare")
    while page.locator("input[name=model]:checked").count():
        page.locator("input[name=model]:checked").first.uncheck()
    page.locator(f"input[name=model][value='{SMALL}']").check()
    page.select_option("#gpu", "l4")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**gpu=l4**")
    assert page.locator("thead th").all_text_contents() == ["", SMALL]
    assert "L4" in page.text_content("h1")


def test_a_card_shows_how_far_predictions_were_off(page: Any, server: Running) -> None:
    """Beside what was measured stands by how much a prediction of today is above it."""
    found = estimate(SMALL, "a40", batch_size=2, seq_len=256)
    one = Measurement(
        workload=found.estimate.workload,
        environment=Environment(gpu="a40"),
        evidence="measured",
        device="cuda",
        outcome="ok",
        measured_at=datetime(2026, 3, 1, tzinfo=timezone.utc),
        allocated_peak_bytes=round(found.allocated.expected_bytes / 1.25),
        step=TimeStats(median_s=found.times["step"].expected_s),
    )
    with server.client(Role.CONTRIBUTOR) as client:
        sent = client.post("/v1/measurements", json={"measurements": [measurement_to_json(one)]})
        assert sent.status_code == 201, sent.text
    page.goto(f"{server.url}/cards/a40")
    line = page.locator("tr", has_text="train, lora").first.text_content()
    assert "+25.0%" in line
    assert "+0.0%" in line


def test_a_page_that_is_not_there_says_so(server: Running) -> None:
    """People get a page that tells what is wrong and what to do; programs get JSON."""
    with server.client() as client:
        for path, status in (
            ("/no-such", 404),
            ("/cards/no-such", 404),
            ("/compare?model=x", 422),
            ("/compare?seq_len=a", 422),
        ):
            found = client.get(path, headers={"accept": "text/html"})
            assert (found.status_code, found.headers["content-type"].split(";")[0]) == (status, "text/html")
            assert "<h1>" in found.text
            assert client.get(path).json()["error"]["todo"]


def test_signing_in(browser: Any, tmp_path: Path) -> None:
    """Where reading needs a token, a person signs in with one, reads until it is revoked, and writes nothing by it."""
    store = tmp_path / "s.duckdb"
    tokens = Tokens(tokens_path(store))
    text = tokens.create(Role.CONTRIBUTOR, "ann")
    with serving(store, "--read", "token", "--prefix", "/lab") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/lab/cards")
        page.fill("#token", "whl_wrong")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("not valid here").wait_for()
        page.fill("#token", text)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("heading", name="Cards").wait_for()
        assert urlsplit(page.url).path == "/lab/cards"
        (kept,) = context.cookies()
        assert (kept["httpOnly"], kept["sameSite"], kept["path"]) == (True, "Strict", "/lab")
        opened(page, Running(f"{server.url}/lab", store, server.process))
        with httpx.Client(base_url=server.url, cookies={kept["name"]: kept["value"]}, trust_env=False) as client:
            assert client.get("/lab/v1/packs").status_code == 200
            assert client.put(f"/lab/v1/packs/{'0' * 64}", content=b"x").status_code == 401
            other = {"sec-fetch-site": "cross-site"}
            assert client.post("/lab/sign-in", data={"token": text}, headers=other).status_code == 403
            assert (
                client.post("/lab/sign-in", data={"token": text, "to": "//evil.example/"}).headers["location"]
                == "/lab/"
            )
        page.goto(f"{server.url}/lab/cards")
        tokens.revoke(text.split("_")[1])
        page.goto(f"{server.url}/lab/cards")
        page.get_by_text("not valid here").wait_for()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_role("heading", name="Please sign in").wait_for()
        assert context.cookies() == []
        context.close()
