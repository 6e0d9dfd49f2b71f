"""Charts of the report, as plain plotly figures: bars by configuration, bars by model, memory against time."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from whichlora_estimators.units import GIB, format_bytes, format_seconds

from .pick import Row
from .report_view import (
    WITHIN,
    Stage,
    batch_of,
    describe,
    format_span,
    most_bytes,
    seconds_of,
    setup_of,
    short_names,
    span_of,
)

Figure = dict[str, Any]

#: Plotly reads a few tags in labels and undoes these three entities only: quotes must stay as they are.
escape = partial(html.escape, quote=False)

#: Okabe and Ito's colours, told apart by nearly all eyes; yellow and black left out, which one of the themes swallows.
COLOURS = ("#3478c0", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee6")
OTHERS = "#8a93a0"
LIMIT = "#dc4055"
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
    return Axis(title="process bytes, GiB", scale=GIB, limit=limit_bytes / GIB, limit_text=format_bytes(limit_bytes))


def time_axis(stage: Stage) -> Axis:
    """Judge the unit by the longest time that occurs."""
    limit_s = stage.time_limit_s
    longest_s = max((s for row in stage.rows if (s := seconds_of(row)) is not None), default=limit_s or 1.0)
    unit, scale = time_unit(longest_s)
    limit = None if limit_s is None else limit_s / scale
    text = "" if limit_s is None else format_seconds(limit_s)
    return Axis(title=f"{stage.time_name}, {unit}", scale=scale, limit=limit, limit_text=text)


def time_unit(longest_s: float) -> tuple[str, float]:
    """Return the unit that suits times up to this one, and its seconds."""
    return next((unit, scale) for unit, scale, below in _TIME_UNITS if longest_s < below)


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
    return _with_limit({"data": data, "layout": _bar_layout(axis, tallest, len(grid.places), stage.setup_name)}, axis)


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
    return _with_limit({"data": data, "layout": _bar_layout(axis, tallest, len(grid.places), stage.setup_name)}, axis)


class _Grid:
    """The categories along the x axis: every setup with every batch size, as plotly's two levels of labels."""

    def __init__(self, stage: Stage) -> None:
        batches: tuple[int | None, ...] = stage.batches or (None,)
        self.setups = thinned(stage.setups, max(1, CATEGORIES // len(batches)))
        chosen = None if stage.choice is None else setup_of(stage.choice)
        if chosen is not None and chosen not in self.setups:
            place = stage.setups.index(chosen) * len(self.setups) // len(stage.setups)
            self.setups[place] = chosen
        self.places = [(setup, batch) for setup in self.setups for batch in batches]

    @property
    def labels(self) -> list[list[str]]:
        return [[setup for setup, _ in self.places], ["any" if b is None else str(b) for _, b in self.places]]

    def rows_of(self, stage: Stage, model: str) -> list[Row | None]:
        """Return a model's row for each category; a row for every batch size stands in all of its own."""
        found = {(setup_of(row), batch_of(row)): row for row in stage.rows if row.model == model}
        return [found.get(place, found.get((place[0], None))) for place in self.places]


def drawn_setups(stage: Stage) -> int:
    """Count the setups that the charts by configuration show."""
    return len(_Grid(stage).setups)


def least_width_px(stage: Stage, models: int) -> int:
    """Return the width under which bars and labels by configuration are hard to tell apart."""
    return len(_Grid(stage).places) * max(22, 9 * models) + 90


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
    shown = {"text": text, "textposition": "outside", "textfont": {"color": colour, "size": 15}, "textangle": 0}
    return bars | shown | {"cliponaxis": False, "showlegend": False}


def _bar_layout(axis: Axis, tallest: float, places: int, grouped: str) -> dict[str, Any]:
    layout = bare_layout()
    layout["barmode"] = "group"
    layout["bargap"] = max(0.25, 0.8 - 0.06 * places)
    layout["xaxis"] |= {
        "type": "multicategory",
        **titled(f"batch size, by {grouped}"),
        "showgrid": False,
        "tickangle": 0,
        "fixedrange": True,
    }
    layout["yaxis"] |= {
        **titled(axis.title),
        "range": [0, _top(axis, tallest)],
        "fixedrange": True,
    }
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


def _with_limit(figure: Figure, axis: Axis) -> Figure:
    if axis.limit is None:
        return figure
    if axis.limit <= figure["layout"]["yaxis"]["range"][1]:
        return with_limits(figure, y=axis)
    text = f"the limit of {axis.limit_text} lies above this chart"
    note = {"text": text, "xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "showarrow": False}
    figure["layout"]["annotations"] = [note | {"font": {"color": LIMIT}}]
    return figure


def with_limits(figure: Figure, **axes: Axis) -> Figure:
    """Draw the limits of these axes as dashed lines from edge to edge, with their values at the near end."""
    layout = figure["layout"]
    limits = {name: axis for name, axis in axes.items() if axis.limit is not None}
    layout["shapes"] = [_limit_line(name, axis) for name, axis in limits.items()]
    layout["annotations"] = [
        _limit_note(name, axis, layout[f"{name}axis"].get("type") == "log") for name, axis in limits.items()
    ]
    return figure


def _limit_line(name: str, axis: Axis) -> dict[str, Any]:
    across = "x" if name == "y" else "y"
    ends = {f"{name}0": axis.limit, f"{name}1": axis.limit, f"{across}0": 0, f"{across}1": 1}
    return {"type": "line", f"{across}ref": "paper", "line": {"color": LIMIT, "width": 1.5, "dash": "dash"}, **ends}


def _limit_note(name: str, axis: Axis, logarithmic: bool) -> dict[str, Any]:
    """Annotations, unlike lines, take the logarithm on such an axis."""
    assert axis.limit is not None
    across = "x" if name == "y" else "y"
    place = {name: math.log10(axis.limit) if logarithmic else axis.limit, f"{across}ref": "paper", across: 0}
    beside = {"xanchor": "left", "yshift": 2} if name == "y" else {"xanchor": "right", "xshift": -2, "textangle": -90}
    text = {"text": f"limit {axis.limit_text}", "font": {"color": LIMIT}, "bgcolor": "#fff", "borderpad": 1}
    return {**text, **place, **beside, "yanchor": "bottom", "showarrow": False}


# --- one bar per model ---


def model_bars(stage: Stage, *, what: str) -> Figure:
    """Draw each model from its lowest to its highest `time` or `bytes`: pale all, solid what keeps every limit."""
    axis = time_axis(stage) if what == "time" else memory_axis(stage)
    read = seconds_of if what == "time" else most_bytes
    names = short_names(stage.models)
    values: dict[str, list[tuple[float, bool]]] = {model: [] for model in stage.models}
    for row in stage.rows:
        value = read(row)
        if value is not None:
            values[row.model].append((value / axis.scale, not row.rejected))
    every = {names[model]: [value for value, _ in found] for model, found in values.items()}
    satisfying = {names[model]: [value for value, kept in found if kept] for model, found in values.items()}
    layout = bare_layout(height=110 + 24 * len(names))
    layout["xaxis"] |= titled(axis.title) | {"fixedrange": True}
    layout["xaxis"]["range"] = [0, _top(axis, _tallest(every.values()))]
    order = [escape(names[model]) for model in stage.models]
    layout["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    layout["yaxis"] |= {"showgrid": False, "dtick": 1, "fixedrange": True, "range": [-0.6, len(order) - 0.4]}
    layout["barmode"] = "overlay"
    bars = [_spans(every, "all configurations", 0.35), _spans(satisfying, "those within every limit", 1.0)]
    figure = {"data": [*bars, _model_crosses([name for name, found in every.items() if not found])], "layout": layout}
    return figure if axis.limit is None or axis.limit > layout["xaxis"]["range"][1] else with_limits(figure, x=axis)


def _spans(values: dict[str, list[float]], name: str, opacity: float) -> dict[str, Any]:
    found = {model: (min(each), max(each)) for model, each in values.items() if each}
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [escape(model) for model in found],
        "base": [low for low, _ in found.values()],
        "x": [high - low for low, high in found.values()],
        "customdata": [[low, high] for low, high in found.values()],
        "hovertemplate": f"%{{y}}<br>%{{customdata[0]:.3g}} to %{{customdata[1]:.3g}}<br>{name}<extra></extra>",
        "opacity": opacity,
        "marker": {"color": COLOURS[0], "line": {"color": COLOURS[0], "width": 2}},
    }


def _model_crosses(names: list[str]) -> dict[str, Any]:
    """Say which models have no configuration with a value: bars without length, under a cross."""
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


def scatter(stage: Stage, models: Sequence[str]) -> Figure:
    """Draw process bytes against time, a dot per configuration that has both, the limits as dashed lines."""
    across, up = time_axis(stage), memory_axis(stage)
    rows = thinned(dots_of(stage), DOTS)
    traces = _traces("other models", OTHERS, [row for row in rows if row.model not in models], across, up)
    for model, colour in _coloured(models):
        traces += _traces(model, colour, [row for row in rows if row.model == model], across, up)
    if stage.choice is not None:
        traces.append(_star(stage.choice, across, up))
    layout = bare_layout()
    layout["hovermode"] = "closest"
    layout["xaxis"] |= titled(across.title) | _range([trace["x"] for trace in traces], across)
    layout["yaxis"] |= titled(up.title) | _range([trace["y"] for trace in traces], up)
    return with_limits({"data": traces, "layout": layout}, x=across, y=up)


def _traces(name: str, colour: str, rows: list[Row], across: Axis, up: Axis) -> list[dict[str, Any]]:
    """Draw dots for what is within every limit, crosses for the rest; the first of them stands in the legend."""
    kinds = [[row for row in rows if not row.rejected], [row for row in rows if row.rejected]]
    traces = [_dots(some, name, colour, across, up) for some in kinds if some]
    for hidden in traces[1:]:
        hidden["showlegend"] = False
    if colour == OTHERS and traces:
        traces[0]["legendrank"] = 2000
    return traces


def dots_of(stage: Stage) -> list[Row]:
    """Select the rows that have both a time and bytes."""
    return [row for row in stage.rows if seconds_of(row) is not None and row.process_bytes is not None]


def _dots(rows: list[Row], name: str, colour: str, across: Axis, up: Axis) -> dict[str, Any]:
    satisfies = not rows[0].rejected
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "legendgroup": escape(name),
        "x": [(seconds_of(row) or 0.0) / across.scale for row in rows],
        "y": [(most_bytes(row) or 0) / up.scale for row in rows],
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
    dot = _dots([choice], "the choice", "#f5c211", across, up)
    dot["marker"] = {"color": "#f5c211", "size": 17, "symbol": "star", "line": {"width": 1.2, "color": "#7a5b00"}}
    return dot


def _range(columns: list[list[float]], axis: Axis) -> dict[str, Any]:
    """Show every dot and the limit; on a logarithmic scale where they are far apart."""
    values = [value for column in columns for value in column if value > 0]
    values += [axis.limit] if axis.limit is not None else []
    if not values:
        return {}
    low, high = min(values), max(values)
    if high > DECADES_FROM * low:
        return {"type": "log", "range": [math.log10(low / 1.25), math.log10(high * 1.35)]} | _ticks(low, high)
    return {"range": [0, high * 1.12]}


def _ticks(low: float, high: float) -> dict[str, Any]:
    """Label 1, 2 and 5 of each decade in full."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    values = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    return {"tickvals": values, "ticktext": [f"{value:,.10g}" for value in values]}


# --- common ---


def hover(row: Row) -> str:
    """Describe a configuration in the few lines that a pointer shows; escaped for plotly's own markup."""
    lines = [f"<b>{escape(row.model)}</b>", escape(describe(row))]
    if row.process_bytes is not None:
        low, high = (format_bytes(size) for size in row.process_bytes)
        lines.append(f"process {low} to {high}")
    if seconds_of(row) is not None:
        lines.append(f"time {format_span(span_of(row))}")
    reasons = [_folded(reason) for reason in row.rejected] or [WITHIN]
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


def bare_layout(height: int = 430) -> dict[str, Any]:
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


def titled(text: str) -> dict[str, Any]:
    """Return what names an axis."""
    return {"title": {"text": text, "font": {"size": 12.5}}}


def draw(figure: Figure, name: str) -> str:
    """Write a figure as a `div` and the script that draws it into it; plotly.js must be on the page."""
    import plotly.io

    config = {"displayModeBar": False, "responsive": True, "showTips": False}
    return str(
        plotly.io.to_html(
            figure, config=config, include_plotlyjs=False, full_html=False, div_id=name, default_height="auto"
        )
    )
