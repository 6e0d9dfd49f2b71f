"""report.html in a real browser: nothing in the console, nothing fetched, every plot drawn, details under the pointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browsing import quiet_page
from whichlora import config_from_fields, pick
from whichlora.advice import advise
from whichlora.report import report_html

CONFIG: dict[str, Any] = {
    "gpu": "l4",
    "stage1_profile": {
        "model_names": ["gpt2", "facebook/opt-125m", "Qwen/Qwen2.5-0.5B"],
        "prefill_length": 64,
        "tokens_to_generate": [8, 32],
        "time_per_token_ms": 50,
    },
    "stage2_profile": {"batch_size": [1, 8, 64], "peak_memory_gb": 6, "total_time_mins": 60},
    "dataset": {"samples": 1000},
    "seq_len": 128,
    "soft": {"memory_gb": 2},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = pick(config_from_fields(CONFIG))
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html(result, advise(result)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_works_in_a_browser(browser: Any, report: Path, width: int) -> None:
    """At desktop and phone width: a quiet console, no request, all plots drawn, no sideways scroll, hover tells of a dot."""
    viewport = {"width": width, "height": 800}
    with quiet_page(browser, lambda url: url.startswith(("file:", "data:", "blob:")), viewport=viewport) as page:
        page.goto(report.as_uri())
        plots = page.locator(".js-plotly-plot")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.js-plotly-plot')].every((p) => p.querySelector('.main-svg'))"
        )
        assert plots.count() >= 8
        drawn = page.evaluate(
            "() => [...document.querySelectorAll('.js-plotly-plot')].map((p) => p.querySelectorAll('.point, .js-line').length)"
        )
        assert min(drawn) > 0
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        scatter = page.locator("#stage2-scatter")
        scatter.scroll_into_view_if_needed()
        dot = scatter.locator(".scatterlayer .point").first
        box = dot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        scatter.locator(".hovertext").wait_for()
        assert "batch" in scatter.locator(".hovertext").text_content()
