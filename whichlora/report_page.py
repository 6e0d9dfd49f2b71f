"""What every page of ours is made of: one self-contained file with plotly.js in it, sections and figures."""

from __future__ import annotations

from html import escape
from importlib import resources

from .report_charts import Figure, draw

#: Nothing is fetched: should the page try to, the browser refuses.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(title: str, body: str) -> str:
    """Write a page around a body: nothing is loaded when it is opened; the title is escaped, the body must be."""
    from plotly.offline import get_plotlyjs

    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
{body}
</main>
<script>{_TOUCH}</script>
</body>
</html>
"""


# A finger that drags over a chart means to scroll the page, not to zoom into the chart.
_TOUCH = """
if (matchMedia("(pointer: coarse)").matches)
  document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, {dragmode: false}));
"""


def section(name: str, *parts: str) -> str:
    """Put parts, which must be escaped, under a heading."""
    inner = "\n".join(parts)
    return f"<section>\n<h2>{escape(name)}</h2>\n{inner}\n</section>"


def paragraph(text: str) -> str:
    """Write a small remark."""
    return f'<p class="note">{escape(text)}</p>'


def chart(key: str, name: str, caption: str, drawn: Figure, least_px: int = 0) -> str:
    """Put a chart under its name; one with many bars keeps its width and scrolls on a narrow screen."""
    caption = f"<h3>{escape(name[:1].upper() + name[1:])}</h3>\n<p>{escape(caption)}</p>"
    chart = f'<div class="scroll"><div style="min-width:{least_px}px">{draw(drawn, key)}</div></div>'
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{chart}\n</figure>"
