"""A scatter of predicted against measured on logarithmic axes, as SVG: the same dots make the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

#: Okabe and Ito's colours, told apart by nearly all eyes.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee6")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 520, 70, 50, 20, 170
BAND = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A measured x beside a predicted y, both positive; `label` is told when the mouse rests on it."""

    group: str
    x: float
    y: float
    label: str


def scatter(dots: Sequence[Dot], *, unit: str) -> str:
    """Draw dots around the diagonal, with a band of 15% about it."""
    values = [value for dot in dots for value in (dot.x, dot.y)]
    low, high = min(values) / 1.3, max(values) * 1.3
    span = math.log(high / low)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / span

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log(value / low) / span

    groups = sorted({dot.group for dot in dots})
    colours = {group: COLOURS[place % len(COLOURS)] for place, group in enumerate(groups)}
    size = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - BOTTOM - TOP}"'
    shapes = [f'<rect x="{LEFT}" y="{TOP}" {size} fill="none" stroke="#8a93a0"/>']
    for factor, dashes in (
        (1.0, ""),
        (1 + BAND, ' stroke-dasharray="4 4"'),
        (1 / (1 + BAND), ' stroke-dasharray="4 4"'),
    ):
        x = (low * max(1, 1 / factor), high / max(1, factor))
        ends = [(across(value), up(value * factor)) for value in x]
        shapes.append(_line(ends, dashes))
    for tick in _ticks(low, high):
        text = f"{tick:g}"
        shapes.append(_text(across(tick), HEIGHT - BOTTOM + 18, text, "middle"))
        shapes.append(_text(LEFT - 8, up(tick) + 4, text, "end"))
        shapes.append(_line([(across(tick), HEIGHT - BOTTOM), (across(tick), HEIGHT - BOTTOM + 5)], ""))
        shapes.append(_line([(LEFT - 5, up(tick)), (LEFT, up(tick))], ""))
    shapes.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 10, f"measured, {unit}", "middle"))
    shapes.append(f'<g transform="rotate(-90)">{_text(-(HEIGHT - BOTTOM) / 2, 16, f"predicted, {unit}", "middle")}</g>')
    for dot in dots:
        shapes.append(
            f'<circle cx="{across(dot.x):.1f}" cy="{up(dot.y):.1f}" r="4" fill="{colours[dot.group]}" fill-opacity="0.6">'
            f"<title>{escape(dot.label)}</title></circle>"
        )
    for place, group in enumerate(groups):
        y = TOP + 12 + 20 * place
        shapes.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{y - 4}" r="5" fill="{colours[group]}"/>')
        shapes.append(_text(WIDTH - RIGHT + 32, y, group, "start"))
    return _framed(shapes)


def _framed(shapes: Iterable[str]) -> str:
    style = "text{font:13px sans-serif;fill:#3a4350}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{style}</style>", background, *shapes, "</svg>"]) + "\n"


def _line(ends: Sequence[tuple[float, float]], more: str) -> str:
    (x1, y1), (x2, y2) = ends
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#8a93a0"{more}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of every decade between, or the powers of ten alone where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    return [step * 10.0**decade for decade in decades for step in steps if low < step * 10.0**decade < high]
