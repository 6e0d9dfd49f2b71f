"""Predicted against measured: what the store holds of a search's card and models, beside the formula's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from whichlora_calibration.cases import measured as seen_of
from whichlora_calibration.forecasts import Forecasts
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.units import GIB, format_bytes, format_seconds
from whichlora_profiles_db import Filters, Measurement, Store

from .pick import PickResult
from .report_charts import COLOURS, Figure, bare_layout, titled

#: Measurements that are compared: the latest ones.
MOST = 100
_NAMES = {"allocated": "allocated peak", "reserved": "reserved peak", "process": "process"}
_TIMES = {"step": "training step", "prefill": "prefill", "decode": "decoded token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A number that was measured (or rehearsed), and the formula's: `target` names it, bytes or seconds."""

    target: str
    predicted: float
    measured: float
    evidence: str
    text: str


def pairs(result: PickResult, store: Store) -> list[Pair]:
    """Return what the store holds of the search's models on its card, with what the formula says of each."""
    if not store.exists:
        return []
    models = sorted({row.model for row in result.stage1})
    found = store.query(Filters(gpu=result.config.gpu.slug, model=models, outcome="ok"), limit=MOST)
    forecasts = Forecasts()
    return [pair for measurement in found for pair in _pairs(measurement, forecasts)]


def _pairs(measurement: Measurement, forecasts: Forecasts) -> Iterator[Pair]:
    environment, workload = measurement.environment, measurement.workload
    assert environment.gpu is not None
    try:
        predicted = forecasts.of(workload, environment.gpu, environment.versions).predicted
    except WhichloraError:  # no formula: nothing to compare
        return
    for target, value in predicted.items():
        seen = seen_of(measurement, target)
        if seen is not None:
            show = format_bytes if target in _NAMES else format_seconds
            about = f"{workload.method} {workload.quantization} batch {workload.batch_size}"
            lines = (f"<b>{escape(workload.model, quote=False)}</b>", about, f"{measurement.evidence}: {show(seen)}")
            text = "<br>".join([*lines, f"predicted: {show(value)}"])
            yield Pair(target=target, predicted=value, measured=seen, evidence=measurement.evidence, text=text)


def bytes_figure(found: Sequence[Pair]) -> Figure | None:
    """Draw measured against predicted bytes; None where there are none."""
    return _figure([pair for pair in found if pair.target in _NAMES], _NAMES, GIB, "GiB")


def times_figure(found: Sequence[Pair]) -> Figure | None:
    """Draw measured against predicted times; None where there are none."""
    return _figure([pair for pair in found if pair.target in _TIMES], _TIMES, 1.0, "s")


def _figure(found: Sequence[Pair], names: dict[str, str], scale: float, unit: str) -> Figure | None:
    if not found:
        return None
    values = [value / scale for pair in found for value in (pair.predicted, pair.measured)]
    ends = [min(values), max(values)]
    line: dict[str, Any] = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "showlegend": False}
    data = [line | {"line": {"color": "#8a93a0", "dash": "dash"}, "hoverinfo": "skip"}]
    for (target, name), colour in zip(names.items(), COLOURS, strict=False):
        some = [pair for pair in found if pair.target == target]
        if some:
            data.append(_dots(some, name, colour, scale))
    layout = bare_layout()
    layout["hovermode"] = "closest"
    layout["xaxis"] |= titled(f"predicted, {unit}") | {"type": "log"}
    layout["yaxis"] |= titled(f"measured, {unit}") | {"type": "log"}
    return {"data": data, "layout": layout}


def _dots(found: Sequence[Pair], name: str, colour: str, scale: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [pair.predicted / scale for pair in found],
        "y": [pair.measured / scale for pair in found],
        "hovertext": [pair.text for pair in found],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": colour,
            "size": 9,
            "symbol": ["circle" if pair.evidence == "measured" else "circle-open" for pair in found],
        },
    }
