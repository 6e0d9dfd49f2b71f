"""The report's second thoughts: what no configuration beats, what limits hold off, what rank and data set cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import ceil
from typing import Any

from whichlora_estimators.units import GIB, MIB, format_bytes, format_seconds

from .advice import Advice, Gain, RankCost, Relaxation
from .pick import PickResult, Row
from .pickconfig import PickConfig
from .policy import frontier
from .report_charts import COLOURS, Axis, Figure, bare_layout, time_unit, titled, with_limits
from .report_tables import lines_table
from .report_view import (
    describe,
    format_count,
    format_range,
    format_time,
    most_bytes,
    seconds_of,
    short_names,
    span_of,
)

#: Lines in the chart of data sizes, and points along each.
DRAWN_MODELS = 6
POINTS = 9
#: The range of data sets that is drawn where the config names none.
SAMPLES = 10_000


# --- the frontier ---


def frontier_table(result: PickResult) -> str:
    """Lay out the configurations that no other beats in size, memory and time."""
    lines = [(_frontier_cells(row), "chosen" if row is result.choice else "") for row in frontier(result.stage2)]
    time = "step time" if result.config.samples is None else "total time"
    headers = ("model", "parameters", "setup", "trained", "process up to", time, "between")
    return lines_table(headers, lines, right=(1, 3, 4, 5, 6), wide=2)


def _frontier_cells(row: Row) -> Iterator[str]:
    yield escape(row.model)
    yield format_count(row.parameters)
    yield escape(describe(row))
    yield "-" if row.trainable_params is None else format_count(row.trainable_params)
    yield format_bytes(most_bytes(row) or 0)
    yield format_time(seconds_of(row))
    yield format_range(span_of(row))


# --- what limits hold off ---


def advice_list(advice: Advice) -> str:
    """Say what the next larger model lacks and what each soft limit would buy; empty where there is nothing to say."""
    items = [*_relaxed(advice.relaxation), *map(_gained, advice.gains)]
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _relaxed(found: Relaxation | None) -> Iterator[str]:
    if found is None:
        return
    moves = "; ".join(map(str, found.moves)) or "nothing more, by a full prediction"
    yield (
        f"The next larger model, <strong>{escape(found.model)}</strong>, would run with {escape(describe(found.row))}."
        f" It lacks {escape(moves)}."
    )
    if found.gpu is not None:
        size = format_bytes(found.gpu.total_bytes)
        yield f"The smallest card on which it keeps every other limit is the {escape(found.gpu.name)} ({size})."


def _gained(gain: Gain) -> str:
    if gain.choice is None:
        return f"With {escape(gain.change)}, still nothing satisfies every limit."
    row = gain.choice
    return (
        f"With {escape(gain.change)}, the choice would be <strong>{escape(row.model)}</strong> with"
        f" {escape(describe(row))}: up to {format_bytes(most_bytes(row) or 0)}, {format_time(seconds_of(row))}."
    )


# --- ranks ---


def rank_figure(costs: Sequence[RankCost], chosen: int) -> Figure:
    """Draw the adapter's size, process bytes and time over the rank, one panel each, the chosen rank marked."""
    seconds = [cost.time_s if cost.time_s is not None else cost.step_s or 0.0 for cost in costs]
    unit, scale = time_unit(max(seconds))
    panels = (
        ("adapter, MiB", [cost.adapter_bytes / MIB for cost in costs]),
        ("process bytes up to, GiB", [cost.process_bytes[1] / GIB for cost in costs]),
        (f"{'time in all' if costs[0].time_s else 'step time'}, {unit}", [s / scale for s in seconds]),
    )
    layout = bare_layout(height=300) | {
        "showlegend": False,
        "grid": {"rows": 1, "columns": 3, "pattern": "independent"},
    }
    data = []
    for place, (name, values) in enumerate(panels, 1):
        data.append(_panel(place, [cost.rank for cost in costs], values, chosen))
        layout[f"xaxis{place}"] = (
            layout["xaxis"] | titled("rank") | {"type": "log", "tickvals": [c.rank for c in costs]}
        )
        layout[f"yaxis{place}"] = layout["yaxis"] | titled(name) | {"rangemode": "tozero"}
    del layout["xaxis"], layout["yaxis"]
    return {"data": data, "layout": layout}


def _panel(place: int, ranks: list[int], values: list[float], chosen: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": ranks,
        "y": values,
        "xaxis": f"x{place}",
        "yaxis": f"y{place}",
        "line": {"color": COLOURS[0]},
        "marker": {"size": [13 if rank == chosen else 7 for rank in ranks], "color": COLOURS[0]},
        "hovertemplate": "rank %{x}: %{y:.4g}<extra></extra>",
    }


# --- data sets ---


def data_figure(result: PickResult) -> Figure:
    """Draw the time of fine-tuning over the size of the data set: the best configuration of the largest models."""
    config = result.config
    most = 2 * (config.samples or SAMPLES)
    sizes = [most * point // (POINTS - 1) for point in range(POINTS)]
    best = _best_of_models(result)
    names = short_names(row.model for row in best)
    unit = time_unit(max((_training_s(config, row, most) for row in best), default=0.0))
    data = [
        _time_line(config, row, names[row.model], sizes, colour, unit)
        for row, colour in zip(best, COLOURS, strict=False)
    ]
    layout = bare_layout()
    layout["xaxis"] |= titled("samples in the data set")
    layout["yaxis"] |= titled(f"fine-tuning, {unit[0]}") | {"rangemode": "tozero"}
    limit_s = config.stage2.total_time_s
    figure = {"data": data, "layout": layout}
    if limit_s is None:
        return figure
    if limit_s > 3 * max(y for line in data for y in line["y"]) * unit[1]:  # it would press the lines to the ground
        return figure
    axis = Axis(title="", scale=unit[1], limit=limit_s / unit[1], limit_text=format_seconds(limit_s))
    return with_limits(figure, y=axis)


def _best_of_models(result: PickResult) -> list[Row]:
    """Return the frontier's quickest row of each model, largest first, in front of them the choice."""
    chosen = [] if result.choice is None else [result.choice]
    best: dict[str, Row] = {}
    for row in (*chosen, *frontier(result.stage2)):
        best.setdefault(row.model, row)
    return list(best.values())[:DRAWN_MODELS]


def _time_line(
    config: PickConfig, row: Row, name: str, sizes: Iterable[int], colour: str, unit: tuple[str, float]
) -> dict[str, Any]:
    points = list(sizes)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(f"{name}, {describe(row)}"),
        "x": points,
        "y": [_training_s(config, row, size) / unit[1] for size in points],
        "line": {"color": colour},
        "hovertemplate": f"%{{x:,}} samples: %{{y:.3g}} {unit[0]}<extra></extra>",
    }


def _training_s(config: PickConfig, row: Row, samples: int) -> float:
    """Return the seconds of all epochs over another number of samples, as long as those of the data set are."""
    if row.time_s is not None and row.schedule is not None:
        return row.time_s * samples / row.schedule.samples
    return config.epochs * ceil(samples / row.effective_batch) * (row.step_s or 0.0)
