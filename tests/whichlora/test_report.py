"""report.html: one well-formed page that loads nothing, names every model and reason, and draws every row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whichlora import PickResult, Row, config_from_fields, pick
from whichlora.report import report_html
from whichlora.report_charts import (
    CATEGORIES,
    memory_axis,
    memory_bars,
    model_bars,
    scatter,
    thinned,
    time_axis,
    time_bars,
)
from whichlora.report_tables import shown_rows
from whichlora.report_view import batch_of, format_count, seconds_of, setup_of, short_names, stages_of
from whichlora_estimators.models import load_model
from whichlora_estimators.units import format_bytes
from whichlora_estimators.workload import Workload

MODELS = ["facebook/opt-125m", "gpt2", "meta-llama/Llama-2-70b-hf"]
SMALL: dict[str, Any] = {
    "gpu": "l4",
    "stage1_profile": {
        "model_names": MODELS,
        "batch_size": [1, 8],
        "prefill_length": [64, 128],
        "tokens_to_generate": 16,
        "time_per_token_ms": 5,
    },
    "stage2_profile": {"batch_size": [1, 4, 64], "total_time_mins": 60, "peak_memory_gb": 6},
    "methods": ["lora", "qlora", "full"],
    "ranks": [4, 8],
    "seq_len": 256,
    "dataset": {"samples": 1000},
}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """The page as a browser would take it apart; elements that close in the wrong order fail."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        kind = self.open[-1] if self.open else ""
        (self.scripts if kind == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def found() -> PickResult:
    return pick(config_from_fields(SMALL), offline=True)


@pytest.fixture(scope="module")
def nothing() -> PickResult:
    fields = {**SMALL, "stage2_profile": {"batch_size": [1, 4], "total_time_mins": 0.001}}
    return pick(config_from_fields(fields), offline=True)


@pytest.fixture(scope="module")
def unserved() -> PickResult:
    profile = {**SMALL["stage1_profile"], "peak_memory_gb": 0.1}
    return pick(config_from_fields({**SMALL, "stage1_profile": profile}), offline=True)


@pytest.fixture(params=["found", "nothing", "unserved"])
def result(request: pytest.FixtureRequest) -> PickResult:
    each: PickResult = request.getfixturevalue(request.param)
    return each


# --- the page ---


def test_page_is_well_formed_and_the_same_each_time(result: PickResult) -> None:
    """Every element closes in order, no id occurs twice, and a search always gives the same page."""
    html = report_html(result)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.tags("h1")) == 1
    assert html == report_html(result)


def test_page_loads_nothing(result: PickResult) -> None:
    """No element and no style refers outside, plotly.js is there once, and the policy forbids the rest."""
    html = report_html(result)
    page = Page(html)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL)))
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    policies = [tag["content"] for tag in page.tags("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none';")
    assert "http" not in str(policies[0])


def test_page_names_every_model_and_every_reason(result: PickResult) -> None:
    """What was tried and why it was dropped is all in the text."""
    text = Page(report_html(result)).text
    for row in (*result.stage1, *result.stage2):
        assert row.model in text
        for reason in row.rejected:
            assert " ".join(reason.split()) in text


def test_headline_states_the_choice(found: PickResult) -> None:
    """Model, method, rank, batch size, time and bytes of the choice stand at the top, its evidence at each number."""
    assert found.choice is not None
    assert found.prediction is not None
    text = Page(report_html(found)).text
    head, numbers = text.split("Process bytes", 1)
    assert found.choice.workload is not None
    assert (
        f"Fine-tune {found.choice.model} with LoRA , rank 8, at batch size {found.choice.workload.batch_size}." in head
    )
    assert format_bytes(found.prediction.estimate.process_bytes) in head
    assert f"{found.prediction.process.coverage:.0%} probability" in head
    for size in (found.prediction.estimate.allocated_peak_bytes, found.prediction.estimate.reserved_peak_bytes):
        assert format_bytes(size) in numbers
    assert format_count(found.prediction.estimate.trainable_params) in numbers
    assert numbers.split("The training")[0].count("formula") == 7


def test_nothing_is_said_to_fit_where_nothing_does(nothing: PickResult, unserved: PickResult) -> None:
    """Without a choice the page says so first, and what came closest."""
    for each in (nothing, unserved):
        text = Page(report_html(each)).text
        assert "Nothing satisfies every limit." in text
        assert "What came closest:" in text
        assert "Fine-tune" not in text.split("Every model")[0].replace("Fine-tuning", "")


def test_breakdown_is_as_long_as_the_process_bytes(found: PickResult) -> None:
    """The segments of the bar add up to the share of the card that is in use."""
    assert found.prediction is not None
    styles = [str(span.get("style")) for span in Page(report_html(found)).tags("span") if "style" in span]
    widths = [float(style.removeprefix("width:").removesuffix("%")) for style in styles]
    share = found.prediction.estimate.process_bytes / found.config.gpu.total_bytes
    assert sum(widths) == pytest.approx(100 * share, abs=0.01)


def test_assumptions_say_what_is_not_predicted(result: PickResult) -> None:
    """Accuracy, precision, checkpointing, the data set and the context are spoken of on every page."""
    text = Page(report_html(result)).text.split("What was assumed")[1]
    for word in ("Accuracy is not predicted", "bf16-true", "checkpointing", "1,000 samples", "CUDA context"):
        assert word in text


HOSTILE = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>&amp;", "</style></title><!-- %{x} {{y}}")


def _pick_hostile(names: tuple[str, ...]) -> PickResult:
    """Search over models in folders of these names, on a card that is called so too."""
    for name in names:
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text(json.dumps(dict(load_model("gpt2").config)))
    profile = {**SMALL["stage1_profile"], "model_names": list(names)}
    gpu = {**_custom_gpu(), "name": f"card of {names[0]}"}
    return pick(config_from_fields({**SMALL, "stage1_profile": profile, "gpu": gpu, "methods": ["lora"]}))


def test_hostile_names_are_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names full of markup add no element to the page, and are read there as they are."""
    monkeypatch.chdir(tmp_path)
    benign, hostile = (Page(report_html(_pick_hostile(names))) for names in (("a/b", "c", "d/e/f"), HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in benign.elements]
    assert all(" ".join(name.split()) in hostile.text for name in HOSTILE)
    assert f"card of {HOSTILE[0]}" in hostile.text


def test_hostile_names_are_only_text_in_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly, which reads tags in labels, finds none but ours there."""
    monkeypatch.chdir(tmp_path)
    result = _pick_hostile(HOSTILE)
    for stage in stages_of(result):
        bars = [draw(stage, stage.models) for draw in (time_bars, memory_bars, scatter)]
        for figure in (*bars, model_bars(stage, what="time"), model_bars(stage, what="bytes")):
            tags = {tag for text in _texts(figure) for tag in re.findall("<[^>]*>", text)}
            assert tags <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _custom_gpu() -> dict[str, Any]:
    return {
        "compute_capability": "8.9",
        "sm_count": 58,
        "total_bytes": "22GiB",
        "hbm_bytes_per_s": "300GB/s",
        "matmul_flops_per_s": {"fp32": 30e12, "bf16": 121e12, "fp16": 121e12, "tf32": 60e12},
    }


# --- charts ---


def _places(figure: dict[str, Any], model: str) -> list[tuple[float | None, str]]:
    """For each configuration of a model the height of its bar, and the cross over it."""
    bars, *_, crosses = [trace for trace in figure["data"] if trace["name"] == model]
    return list(zip(bars["y"], crosses["text"], strict=True))


def test_every_configuration_has_a_bar_or_a_cross(result: PickResult) -> None:
    """By configuration, each model shows its time or a cross, its bytes or a cross, and never both."""
    for stage in stages_of(result):
        for draw, known in ((time_bars, seconds_of), (memory_bars, lambda row: row.process_bytes)):
            for model in stage.models:
                rows = [row for row in stage.rows if row.model == model]
                places = _places(draw(stage, stage.models), model)
                assert all((height is None) == (cross == "✕") for height, cross in places)
                single = [row for row in rows if batch_of(row) is not None]
                assert sum(height is not None for height, _ in places) == sum(known(row) is not None for row in single)


def test_bars_are_as_tall_as_the_rows_say(found: PickResult) -> None:
    """Heights are the rows' numbers in the unit of the axis; slack stands on top of what is needed at least."""
    for stage in stages_of(found):
        model = stage.models[0]
        rows = [row for row in stage.rows if row.model == model]
        seconds = [height * time_axis(stage).scale for height, _ in _places(time_bars(stage, [model]), model) if height]
        assert sorted(seconds) == pytest.approx(sorted(s for row in rows if (s := seconds_of(row)) is not None))
        least, slack, _ = memory_bars(stage, [model])["data"]
        tops = [a + b for a, b in zip(least["y"], slack["y"], strict=True) if a is not None]
        scale = memory_axis(stage).scale
        assert sorted(top * scale for top in tops) == pytest.approx(
            sorted(row.process_bytes[1] for row in rows if row.process_bytes)
        )
        assert [base for base, a in zip(slack["base"], least["y"], strict=True) if a] == [a for a in least["y"] if a]


def test_scatter_draws_every_row_that_has_a_time_between_the_limits(found: PickResult) -> None:
    """Each such row is a dot, or a cross if it was dropped; both limits are dashed lines where the config has them."""
    for stage in stages_of(found):
        figure = scatter(stage, stage.models)
        dots = [trace for trace in figure["data"] if trace["name"] != "the choice"]
        drawn = {
            kind: sum(len(t["x"]) for t in dots if t["marker"]["symbol"] == kind) for kind in ("circle", "x-thin-open")
        }
        timed = [row for row in stage.rows if seconds_of(row) is not None]
        assert drawn["circle"] == sum(not row.rejected for row in timed)
        assert drawn["x-thin-open"] == sum(bool(row.rejected) for row in timed)
        by_time, by_bytes = figure["layout"]["shapes"]
        assert by_time["line"]["dash"] == by_bytes["line"]["dash"] == "dash"
        assert by_time["x0"] * time_axis(stage).scale == pytest.approx(stage.time_limit_s)
        assert by_bytes["y0"] * memory_axis(stage).scale == pytest.approx(stage.memory_limit_bytes)


def test_scatter_shows_all_dots_and_limits(found: PickResult) -> None:
    """No dot and no limit lies outside of the axes."""
    for stage in stages_of(found):
        figure = scatter(stage, stage.models)
        for name in "xy":
            axis = figure["layout"][f"{name}axis"]
            low, high = (10**end if axis.get("type") == "log" else end for end in axis["range"])
            values = [value for trace in figure["data"] for value in trace[name]]
            values += [shape[f"{name}0"] for shape in figure["layout"]["shapes"] if shape.get(f"{name}ref") != "paper"]
            assert all(low <= value <= high for value in values)


def test_model_bars_span_all_configurations(found: PickResult) -> None:
    """Each model's bar goes from its least to its most; a model without any value is crossed."""
    stage = stages_of(found)[0]
    every, satisfying, crosses = model_bars(stage, what="bytes")["data"]
    names = short_names(stage.models)
    for model in stage.models:
        most = [row.process_bytes[1] for row in stage.rows if row.model == model and row.process_bytes]
        assert (names[model] in crosses["y"]) == (not most)
        if most:
            place = every["y"].index(names[model])
            ends = (every["base"][place], every["base"][place] + every["x"][place])
            assert [end * memory_axis(stage).scale for end in ends] == pytest.approx([min(most), max(most)])
    kept = {names[row.model] for row in stage.rows if not row.rejected}
    assert set(satisfying["y"]) == kept


# --- many rows ---


@given(st.lists(st.integers(), max_size=60), st.integers(1, 30))
def test_thinning_keeps_order_and_ends(items: list[int], most: int) -> None:
    """An even selection is a subsequence as long as asked, with the first item and (of two or more) the last."""
    selected = thinned(list(enumerate(items)), most)
    assert len(selected) == min(most, len(items))
    assert selected == sorted(set(selected))
    if items:
        assert selected[0][0] == 0
    if most > 1 and items:
        assert selected[-1][0] == len(items) - 1


@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(5, 30))
def test_long_tables_keep_every_model(models: list[str], most: int) -> None:
    """The rows shown are at most as many as asked, in their order, and the first of each model is among them."""
    workload = Workload(model="any", config={})
    rows = [Row(model=model, parameters=index, workload=workload) for index, model in enumerate(models)]
    shown = shown_rows(rows, most)
    assert len(shown) <= most
    assert [row.parameters for row in shown] == sorted({row.parameters for row in shown})
    firsts = {models.index(model) for model in models}
    assert firsts <= {row.parameters for row in shown}


def test_page_of_many_setups_stays_small_and_shows_the_choice() -> None:
    """Far more setups than a chart can hold: it draws an even selection with the choice in it, and says how many."""
    profile = {"model_names": ["gpt2"], "prefill_length": 64, "tokens_to_generate": 16}
    fields = {**SMALL, "stage1_profile": profile, "ranks": list(range(1, 26)), "methods": ["lora"]}
    result = pick(config_from_fields(fields), offline=True)
    assert result.choice is not None
    stage = stages_of(result)[1]
    figure = time_bars(stage, stage.models)
    setups, _ = figure["data"][0]["x"]
    assert len(setups) <= CATEGORIES < len(stage.rows)
    assert setup_of(result.choice) in setups
    assert f"Shown: {len(set(setups))} of 25 setups" in Page(report_html(result)).text
