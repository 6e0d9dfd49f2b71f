"""A breakdown as a page to click through: components, then the calls that hold their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whichlora_estimators.units import format_bytes

from .breakdown import Breakdown


def write_icicle(pages: Sequence[tuple[str, Breakdown]], path: Path) -> None:
    """Write one HTML file with an icicle for each (title, breakdown); it needs no network."""
    import plotly.io

    parts = [
        plotly.io.to_html(_figure(title, breakdown), full_html=False, include_plotlyjs=number == 0)
        for number, (title, breakdown) in enumerate(pages)
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Where the bytes are</title>'
    path.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")


def _figure(title: str, breakdown: Breakdown) -> object:
    import plotly.graph_objects as go

    sizes = nodes(breakdown)
    labels = [path[-1] if path else format_bytes(breakdown.allocated_bytes) for path in sizes]
    figure = go.Figure(
        go.Icicle(
            ids=["\n".join(("all", *path)) for path in sizes],
            labels=labels,
            parents=["\n".join(("all", *path[:-1])) if path else "" for path in sizes],
            values=list(sizes.values()),
            customdata=[format_bytes(size) for size in sizes.values()],
            hovertemplate="%{label}<br>%{customdata}<br>%{percentRoot} of the peak<extra></extra>",
            branchvalues="total",
            tiling={"orientation": "v"},
        )
    )
    figure.update_layout(title=title, margin={"t": 60, "l": 10, "r": 10, "b": 10}, height=800)
    return figure


def nodes(breakdown: Breakdown) -> dict[tuple[str, ...], int]:
    """Return bytes by path (component, outermost call, …, innermost call); each node holds what is below it."""
    sizes: dict[tuple[str, ...], int] = {(): 0}
    for held in breakdown.held:
        path = (held.component, *held.stack)
        for depth in range(len(path) + 1):
            sizes[path[:depth]] = sizes.get(path[:depth], 0) + held.allocated_bytes
    return sizes
