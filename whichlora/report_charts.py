"""Charts of the report, as plain plotly figures: bars by configuration, bars by model, memory against time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from whichlora_estimators.units import GIB, format_bytes, format_seconds

from .pick import Row
from .report_view import (
    Stage,
    batch_of,
    describe,
    format_time,
    outcome_of,
    seconds_of,
    setup_of,
    short_names,
)

Figure = dict[str, Any]

#: Okabe and Ito's colours, told apart by nearly all eyes; yellow and black left out, which one of the themes swallows.
COLOURS = ("#3478c0", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee6")
OTHERS = "#8a93a0"
LIMIT = "#d3394c"
#: Configurations along one chart; of more setups an even selection is drawn.
CATEGORIES = 48
#: Dots that a browser still draws at once.
DOTS = 2500
#: Bars beyond this many times the limit are cut off, so that those near it can be told apart.
HEADROOM = 1.6
#: A scatter's time axis is logarithmic when its largest number is this many times the smallest.
DECADES_FROM = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A quantity to draw: its name with the unit, how many of ours make one of the unit, and its limit in that unit."""

    title: str
    scale: float
    limit: float | None
    limit_text: str


def memory_axis(stage: Stage) -> Axis:
    """Process bytes in GiB."""
    limit_bytes = stage.memory_limit_bytes
    return Axis(title="process memory, GiB", scale=GIB, limit=limit_bytes / GIB, limit_text=format_bytes(limit_bytes))


def time_axis(stage: Stage) -> Axis:
    """Judge the unit by the longest time that occurs."""
    limit_s = stage.time_limit_s
    longest_s = max((s for row in stage.rows if (s := seconds_of(row)) is not None), default=limit_s or 1.0)
    unit, scale = next((u, s) for u, s, below in _TIME_UNITS if longest_s < below)
    limit = None if limit_s is None else limit_s / scale
    text = "" if limit_s is None else format_seconds(limit_s)
    return Axis(title=f"{stage.time_name}, {unit}", scale=scale, limit=limit, limit_text=text)


_TIME_UNITS = (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, math.inf))


# --- one bar per configuration ---


def time_bars(stage: Stage, models: Sequence[str]) -> Figure:
    """Bars of time by setup and batch size, grouped by model; a cross where no time is known."""
    axis = time_axis(stage)
    grid = _Grid(stage)
    data: list[dict[str, Any]] = []
    for model, colour in _coloured(models):
        rows = grid.rows_of(stage, model)
        seconds = [None if row is None else seconds_of(row) for row in rows]
        data.append(_bars(grid, rows, [None if s is None else s / axis.scale for s in seconds], model, colour))
        data.append(_crosses(grid, rows, [s is None for s in seconds], model, colour))
    tallest = _tallest(trace["y"] for trace in data)
    return _with_limit({"data": data, "layout": _bar_layout(axis, tallest)}, axis, tallest)


def memory_bars(stage: Stage, models: Sequence[str]) -> Figure:
    """Bars of process bytes, grouped by model: solid what is needed at least, pale what the allocator may add to it."""
    axis = memory_axis(stage)
    grid = _Grid(stage)
    data: list[dict[str, Any]] = []
    for model, colour in _coloured(models):
        rows = grid.rows_of(stage, model)
        ranges = [None if row is None else row.process_bytes for row in rows]
        least = [None if each is None else each[0] / axis.scale for each in ranges]
        slack = [None if each is None else (each[1] - each[0]) / axis.scale for each in ranges]
        data.append(_bars(grid, rows, least, model, colour))
        more = _bars(grid, rows, slack, model, colour)
        data.append(more | {"base": [each or 0 for each in least], "opacity": 0.35, "showlegend": False})
        data.append(_crosses(grid, rows, [each is None for each in ranges], model, colour))
    tallest = max((row.process_bytes[1] / GIB for row in stage.rows if row.process_bytes), default=0.0)
    return _with_limit({"data": data, "layout": _bar_layout(axis, tallest)}, axis, tallest)


class _Grid:
    """The categories along the x axis: every setup with every batch size, as plotly's two levels of labels."""

    def __init__(self, stage: Stage) -> None:
        batches: tuple[int | None, ...] = stage.batches or (None,)
        self.setups = thinned(stage.setups, max(1, CATEGORIES // len(batches)))
        self.places = [(setup, batch) for setup in self.setups for batch in batches]

    @property
    def labels(self) -> list[list[str]]:
        return [[setup for setup, _ in self.places], ["any" if b is None else str(b) for _, b in self.places]]

    def rows_of(self, stage: Stage, model: str) -> list[Row | None]:
        """Return a model's row for each category; a row for every batch size stands in all of its own."""
        found = {(setup_of(row), batch_of(row)): row for row in stage.rows if row.model == model}
        return [found.get(place, found.get((place[0], None))) for place in self.places]


def grid_width(stage: Stage) -> tuple[int, int]:
    """Return how many setups the charts by configuration show, and how many there are."""
    return len(_Grid(stage).setups), len(stage.setups)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Select evenly, first and last included."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _bars(
    grid: _Grid, rows: Sequence[Row | None], values: list[float | None], model: str, colour: str
) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": escape(model),
        "legendgroup": escape(model),
        "offsetgroup": escape(model),
        "x": grid.labels,
        "y": values,
        "hovertext": ["" if row is None else hover(row) for row in rows],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": colour, "opacity": [0.4 if row is not None and row.rejected else 1.0 for row in rows]},
    }


def _crosses(grid: _Grid, rows: Sequence[Row | None], crossed: list[bool], model: str, colour: str) -> dict[str, Any]:
    """Bars without height under a cross: so the cross stands where the model's bar would."""
    marks = [row is not None and cross for row, cross in zip(rows, crossed, strict=True)]
    bars = _bars(grid, rows, [0.0 if mark else None for mark in marks], model, colour)
    text = ["✕" if mark else "" for mark in marks]
    shown = {"text": text, "textposition": "outside", "textfont": {"color": colour, "size": 13}, "textangle": 0}
    return bars | shown | {"cliponaxis": False, "showlegend": False}


def _bar_layout(axis: Axis, tallest: float) -> dict[str, Any]:
    layout = _layout()
    layout["barmode"] = "group"
    layout["bargap"] = 0.25
    layout["xaxis"] |= {"type": "multicategory", "title": {"text": "batch size"}, "showgrid": False}
    layout["yaxis"] |= {"title": {"text": axis.title}, "range": [0, _top(axis, tallest)], "fixedrange": True}
    return layout


def _tallest(columns: Iterable[Sequence[float | None]]) -> float:
    return max((value for column in columns for value in column if value is not None), default=0.0)


def _top(axis: Axis, tallest: float) -> float:
    """Leave out what is far beyond the limit, and the limit where it is far beyond everything."""
    if axis.limit is None:
        return tallest * 1.08 or 1.0
    if tallest > axis.limit * HEADROOM:
        return axis.limit * HEADROOM
    return max(tallest, axis.limit if axis.limit < 3 * tallest or not tallest else 0.0) * 1.12


def _with_limit(figure: Figure, axis: Axis, tallest: float) -> Figure:
    if axis.limit is None:
        return figure
    if axis.limit > figure["layout"]["yaxis"]["range"][1]:
        text = f"the limit of {axis.limit_text} lies above this chart"
        note = {"text": text, "xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "showarrow": False}
        figure["layout"]["annotations"] = [note | {"font": {"color": LIMIT}}]
    else:
        figure["layout"]["shapes"] = [_limit_line("y", axis)]
    return figure


def _limit_line(direction: str, axis: Axis) -> dict[str, Any]:
    across = "x" if direction == "y" else "y"
    ends = {f"{direction}0": axis.limit, f"{direction}1": axis.limit, f"{across}0": 0, f"{across}1": 1}
    label = {"text": f"limit {axis.limit_text}", "textposition": "end", "font": {"color": LIMIT, "size": 12}}
    if direction == "x":
        label |= {"textangle": -90, "yanchor": "bottom"}
    line = {"color": LIMIT, "width": 1.5, "dash": "dash"}
    return {"type": "line", f"{across}ref": "paper", "line": line, "label": label, **ends}


# --- one bar per model ---


def model_bars(stage: Stage, *, what: str) -> Figure:
    """Draw each model's lowest `time` or `memory` as a bar, up to its highest as a whisker, crosses for none; largest on top."""
    axis = time_axis(stage) if what == "time" else memory_axis(stage)
    read = _seconds if what == "time" else _most_bytes
    names = short_names(stage.models)
    spans = {model: _span(stage, model, read, axis) for model in stage.models}
    satisfying = {row.model for row in stage.rows if not row.rejected}
    known = [model for model in stage.models if spans[model] is not None]
    data = [
        _model_bars({m: spans[m] for m in known if (m in satisfying) is kept}, names, kept) for kept in (True, False)
    ]
    data.append(_model_crosses([names[model] for model in stage.models if spans[model] is None]))
    layout = _layout(height=90 + 24 * len(stage.models))
    tallest = max((span[1] for span in spans.values() if span), default=0.0)
    layout["xaxis"] |= {"title": {"text": axis.title}, "range": [0, _top(axis, tallest)], "fixedrange": True}
    order = [escape(names[model]) for model in stage.models]
    layout["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order, "showgrid": False}
    layout["yaxis"]["dtick"] = 1
    layout["barmode"] = "overlay"
    if axis.limit is not None and axis.limit <= layout["xaxis"]["range"][1]:
        layout["shapes"] = [_limit_line("x", axis)]
    return {"data": data, "layout": layout}


def _seconds(row: Row) -> float | None:
    return seconds_of(row)


def _most_bytes(row: Row) -> float | None:
    return None if row.process_bytes is None else float(row.process_bytes[1])


def _span(stage: Stage, model: str, read: Callable[[Row], float | None], axis: Axis) -> tuple[float, float] | None:
    values = [value / axis.scale for row in stage.rows if row.model == model and (value := read(row)) is not None]
    return (min(values), max(values)) if values else None


def _model_bars(spans: dict[str, Any], names: dict[str, str], satisfying: bool) -> dict[str, Any]:
    lows = [span[0] for span in spans.values()]
    return {
        "type": "bar",
        "orientation": "h",
        "name": "some configuration keeps the limits" if satisfying else "none does",
        "y": [escape(names[model]) for model in spans],
        "x": lows,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [span[1] - span[0] for span in spans.values()],
            "arrayminus": [0.0 for _ in lows],
            "thickness": 1,
            "width": 3,
            "color": OTHERS,
        },
        "marker": {"color": COLOURS[0] if satisfying else OTHERS},
        "hovertemplate": "%{y}<br>%{x:.3g} to %{customdata:.3g}<extra></extra>",
        "customdata": [span[1] for span in spans.values()],
    }


def _model_crosses(names: list[str]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "y": [escape(name) for name in names],
        "x": [0.0 for _ in names],
        "text": ["✕" for _ in names],
        "textposition": "outside",
        "textfont": {"color": LIMIT, "size": 13},
        "cliponaxis": False,
        "hovertemplate": "%{y}: no configuration fits<extra></extra>",
        "showlegend": False,
    }


# --- memory against time ---


def scatter(stage: Stage, models: Sequence[str], choice: Row | None) -> Figure:
    """Draw process bytes against time, a dot per configuration that has both, the limits as dashed lines."""
    across, up = time_axis(stage), memory_axis(stage)
    rows = [row for row in stage.rows if seconds_of(row) is not None and row.process_bytes is not None]
    rows = thinned(rows, DOTS)
    colours = dict(_coloured(models))
    traces = []
    for name in (*models, None):
        members = [row for row in rows if (row.model if row.model in colours else None) == name]
        label = "other models" if name is None else name
        for satisfies in (True, False):
            some = [row for row in members if bool(row.rejected) is not satisfies]
            if some:
                legend = satisfies or not any(not row.rejected for row in members)
                traces.append(
                    _dots(some, label, colours.get(name or "", OTHERS), across, up, satisfies) | {"showlegend": legend}
                )
    if choice is not None:
        traces.append(_star(choice, across, up))
    layout = _layout()
    layout["hovermode"] = "closest"
    layout["xaxis"] |= {"title": {"text": across.title}} | _range([t["x"] for t in traces], across)
    layout["yaxis"] |= {"title": {"text": up.title}} | _range([t["y"] for t in traces], up)
    layout["shapes"] = [_limit_line(d, axis) for d, axis in (("x", across), ("y", up)) if axis.limit is not None]
    return {"data": traces, "layout": layout}


def _dots(rows: list[Row], name: str, colour: str, across: Axis, up: Axis, satisfies: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "legendgroup": escape(name),
        "x": [(seconds_of(row) or 0.0) / across.scale for row in rows],
        "y": [_most(row) / up.scale for row in rows],
        "hovertext": [hover(row) for row in rows],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": colour,
            "size": 9,
            "symbol": "circle" if satisfies else "x-thin-open",
            "opacity": 0.85,
            "line": {"width": 0.5 if satisfies else 2, "color": colour},
        },
    }


def _star(choice: Row, across: Axis, up: Axis) -> dict[str, Any]:
    dot = _dots([choice], "the choice", "#f5c211", across, up, True)
    dot["marker"] = {"color": "#f5c211", "size": 17, "symbol": "star", "line": {"width": 1.2, "color": "#7a5b00"}}
    return dot


def _most(row: Row) -> int:
    return 0 if row.process_bytes is None else row.process_bytes[1]


def _range(columns: list[list[float]], axis: Axis) -> dict[str, Any]:
    """Show every dot and the limit; on a logarithmic scale where they are far apart."""
    values = [value for column in columns for value in column if value > 0]
    values += [axis.limit] if axis.limit is not None else []
    if not values:
        return {}
    low, high = min(values), max(values)
    if high > DECADES_FROM * low:
        return {"type": "log", "range": [math.log10(low / 1.25), math.log10(high * 1.35)], "dtick": "D2"}
    return {"range": [0, high * 1.12]}


# --- common ---


def hover(row: Row) -> str:
    """Describe a configuration in the few lines that a pointer shows; escaped for plotly's own markup."""
    lines = [f"<b>{escape(row.model)}</b>", escape(describe(row))]
    if row.process_bytes is not None:
        low, high = (format_bytes(size) for size in row.process_bytes)
        lines.append(f"process {low} to {high}")
    if seconds_of(row) is not None:
        lines.append(f"time {format_time(seconds_of(row))}")
    reasons = [_folded(reason) for reason in row.rejected] or [outcome_of(row) + " every limit"]
    return "<br>".join([*lines, *reasons])


def _folded(text: str, width: int = 60) -> str:
    """Break a long reason into lines, which plotly does not do."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(escape(line) for line in lines)


def _coloured(models: Sequence[str]) -> list[tuple[str, str]]:
    return [(model, COLOURS[index % len(COLOURS)]) for index, model in enumerate(models)]


def _layout(height: int = 430) -> dict[str, Any]:
    """Leave colours of text and lines to the page's style, which knows the theme."""
    axis = {"automargin": True, "zeroline": False, "linewidth": 1, "ticks": ""}
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12.5},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "#1d2530", "bordercolor": "#1d2530", "font": {"color": "#fff"}, "align": "left"},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def draw(figure: Figure, name: str) -> str:
    """Write a figure as a `div` and the script that draws it into it; plotly.js must be on the page."""
    import plotly.io

    config = {"displayModeBar": False, "responsive": True, "showTips": False}
    return str(
        plotly.io.to_html(
            figure, config=config, include_plotlyjs=False, full_html=False, div_id=name, default_height="auto"
        )
    )
