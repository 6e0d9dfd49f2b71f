"""The page about a calibration: what was learnt, how it does on held-out runs, and which runs look wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from whichlora_calibration.calibrate import GROUP_OF, Calibration, TargetScores
from whichlora_calibration.cases import MEMORY, NAMES, Case, Compared, Left
from whichlora_calibration.correction import KNOWN_CARD
from whichlora_calibration.fit import candidates, held_out, weighted_quantile
from whichlora_calibration.modes import FEWEST_GROUPS
from whichlora_calibration.scores import WINS, Held
from whichlora_estimators.errors import BadValue
from whichlora_estimators.files import write_whole
from whichlora_estimators.units import format_bytes, format_seconds

from .report_charts import COLOURS, Figure, bare_layout, titled
from .report_page import chart, page, paragraph, section
from .report_tables import lines_table

#: Held-out errors this many times beyond the interval's end look wrong.
SUSPICIOUS = 2.0
SUSPECTS = 40
#: Whether something is applied; `-` for what is not decided.
_YES: dict[Any, str] = {True: "yes", False: "no"}
#: Shares of the cells that the learning curve is drawn for.
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)


def write_report(found: Calibration, compared: Compared, path: Path) -> None:
    """Write the page. Raises BadValue for a place that cannot be written."""
    text = page("whichlora: calibration", "\n".join(_parts(found, compared)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: text})
    except OSError as error:
        todo = f"{error.strerror}. Name another file."
        raise BadValue("cannot write the report", value=str(path), todo=todo) from None


def _parts(found: Calibration, compared: Compared) -> Iterator[str]:
    correction = found.correction
    made = f"Made {correction.made_at}, version {correction.version}, from {compared.runs:,} runs"
    replaced = f", in place of {correction.replaces}" if correction.replaces else ""
    lead = f'<p class="kicker">whichlora calibrate</p><h1>What was learnt</h1><div class="lead">{made}{replaced}.</div>'
    yield f"<header>{lead}</header>"
    note = (
        "Median errors of predictions made while every run of the same model, or of the same card, was held out. A correction"
        f" is applied where it beats the formula in at least {WINS:.0%} of resamplings of whole groups, of {FEWEST_GROUPS}"
        " groups or more. Where a model was all that its card was measured with, it counts as held out with the card. The"
        " formula's times are those of constants that were fitted on no run of the card."
    )
    yield section("Held-out errors", paragraph(note), _scores(found))
    for name, scores in found.targets.items():
        yield section(_title(name), *_figures(name, scores))
    yield section("Learning curve", *_learning(found, compared.cases))
    suspects = list(_suspects(found))
    note = f"Held out, these missed the end of the interval, made without them, by more than {SUSPICIOUS:g} times its width."
    yield section("Runs that look wrong", paragraph(note if suspects else "None."), _suspect_table(suspects))
    if compared.odd:
        note = (
            "Far from the middle of many runs of one workload on one card and stack; only that middle is learnt from."
        )
        yield section("Runs unlike their repeats", paragraph(note), _reasons(compared.odd))
    if found.left:
        yield section("Runs without a formula", _reasons(found.left))


def _reasons(runs: Sequence[Left]) -> str:
    lines = [([escape(each.measurement_id[:12]), escape(each.reason)], "") for each in runs[:SUSPECTS]]
    return lines_table(("run", "why"), lines, right=(), wide=1)


def _title(target: str) -> str:
    return NAMES[target].capitalize()


def _scores(found: Calibration) -> str:
    lines = []
    for score in found.correction.scores():
        part = score.errors
        shown = [f"{part[kind]['median_abs_error']:.1%}" for kind in ("formula", "corrected")]
        gain = f"{part['gain']:+.1%} ({part['gain_low']:+.1%} to {part['gain_high']:+.1%})"
        inside = "-" if part.get("coverage") is None else f"{part['coverage']:.0%}"
        applied = _YES.get(part.get("applied"), "-")
        cells = [
            escape(score.what.capitalize()),
            {"gpu": "card"}.get(score.group, score.group),
            str(part["groups"]),
            str(part["cells"]),
            *shown,
            gain,
            escape(score.interval),
            inside,
            applied,
        ]
        lines.append((cells, ""))
    headers = (
        "what",
        "held out",
        "groups",
        "cells",
        "formula",
        "corrected",
        "gain, middle 90%",
        "interval",
        "within it",
        "applied",
    )
    return lines_table(headers, lines, right=range(2, 9), wide=6)


def _figures(name: str, scores: TargetScores) -> Iterator[str]:
    held = [each for each in scores.held["model"] if not each.case.out_of_memory]
    text = "A dot a run, its model held out. On the line: predicted as measured."
    yield chart(f"{name}-scatter", "measured against predicted", text, _scatter(name, held))
    text = "Median error on each card, with the model held out."
    yield chart(f"{name}-cards", "error by card", text, _by_card(held))


def _scatter(name: str, held: Sequence[Held]) -> Figure:
    scale = 2**30 if name in MEMORY else 1.0
    unit = "GiB" if name in MEMORY else "s"
    measured = [each.case.measured / scale for each in held]
    plain = [each.case.predicted / scale for each in held]
    better = [each.case.predicted * math.exp(each.correction) / scale for each in held]
    texts = [_hover(name, each) for each in held]
    ends = [min(measured, default=1.0), max(measured, default=1.0)]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": ends,
            "y": ends,
            "line": {"color": "#8a93a0", "dash": "dash"},
            "showlegend": False,
        },
        _dots("formula", plain, measured, texts, "circle-open", COLOURS[1]),
        _dots("corrected", better, measured, texts, "circle", COLOURS[0]),
    ]
    layout = bare_layout()
    layout["xaxis"] |= titled(f"predicted, {unit}") | {"type": "log"}
    layout["yaxis"] |= titled(f"measured, {unit}") | {"type": "log"}
    return {"data": data, "layout": layout}


def _dots(name: str, x: list[float], y: list[float], texts: list[str], symbol: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "hovertext": texts,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"symbol": symbol, "color": colour, "size": 8, "opacity": 0.8},
    }


def _hover(name: str, each: Held) -> str:
    show = format_bytes if name in MEMORY else format_seconds
    case = each.case
    return "<br>".join(
        [
            f"<b>{escape(case.model, quote=False)}</b> on {case.gpu}",
            f"measured {show(case.measured)}, formula {show(case.predicted)}",
            f"corrected {show(case.predicted * math.exp(each.correction))}",
            escape(f"{case.stack}; {case.source}", quote=False),
        ]
    )


def _by_card(held: Sequence[Held]) -> Figure:
    cards = sorted({each.case.gpu for each in held})
    bars = []
    for label, colour in (("formula", COLOURS[1]), ("corrected", COLOURS[0])):
        errors = [100 * _median([e for e in held if e.case.gpu == card], label == "corrected") for card in cards]
        bars.append({"type": "bar", "name": label, "x": cards, "y": errors, "marker": {"color": colour}})
    layout = bare_layout(height=320)
    layout["yaxis"] |= titled("median error, %")
    return {"data": bars, "layout": layout}


def _median(held: Sequence[Held], corrected: bool) -> float:
    errors = [each.corrected_error if corrected else each.formula_error for each in held]
    return weighted_quantile(errors, [each.case.weight for each in held], 0.5)


def _learning(found: Calibration, cases: Sequence[Case]) -> Iterator[str]:
    """Draw the held-out error of the corrected numbers against how many cells they were learnt from."""
    data = []
    for (name, scores), colour in zip(found.targets.items(), COLOURS, strict=False):
        own = [case for case in cases if case.target == name]
        points = [
            (len(some), error) for share in SHARES if (some := _some(own, share)) and (error := _error(name, some))
        ]
        if not points:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _title(name) + ("" if _applied(scores) else " (not applied)"),
                "x": [count for count, _ in points],
                "y": [100 * error for _, error in points],
                "line": {"color": colour},
            }
        )
    layout = bare_layout()
    layout["xaxis"] |= titled("runs") | {"type": "log"}
    layout["yaxis"] |= titled("median error with the model held out, card known, %") | {"rangemode": "tozero"}
    text = "Learnt from ever more of the runs, whole cells at a time."
    yield chart("learning", "error against number of runs", text, {"data": data, "layout": layout})


def _applied(scores: TargetScores) -> bool:
    return any(cards[KNOWN_CARD].applied for cards in scores.correction.modes.values())


def _some(cases: Sequence[Case], share: float) -> list[Case]:
    """Select an even share of the cells."""
    cells = sorted({case.cell for case in cases})
    kept = {
        cells[round(place / share)] for place in range(round(share * len(cells))) if round(place / share) < len(cells)
    }
    return [case for case in cases if case.cell in kept]


def _error(name: str, cases: Sequence[Case]) -> float:
    unseen = [case.as_unseen() for case in cases]
    corrections, known = held_out(unseen, GROUP_OF[KNOWN_CARD], candidates(name))
    told = [
        (abs(math.expm1(case.log_ratio - correction)), case.weight)
        for case, correction, here in zip(unseen, corrections, known, strict=True)
        if here and not case.out_of_memory
    ]
    return weighted_quantile([error for error, _ in told], [weight for _, weight in told], 0.5)


def _suspects(found: Calibration) -> Iterator[tuple[float, float, Held]]:
    """Yield the runs far outside their interval: by how many of its widths, what was expected."""
    wrong = []
    for scores in found.targets.values():
        for each in scores.held["model"]:
            bounds = scores.ruled(each).bounds(each)
            if bounds is None or bounds[0] == bounds[1] or each.case.out_of_memory:
                continue  # nothing is known of how far such a number may be off
            (low, high), learnt = bounds, each.correction if scores.applied(each) else 0.0
            error = each.case.log_ratio - learnt
            beyond = max(low - error, error - high) / (high - low)
            if beyond > SUSPICIOUS:
                wrong.append((beyond, each.case.predicted * math.exp(learnt), each))
    yield from sorted(wrong, key=lambda item: -item[0])[:SUSPECTS]


def _suspect_table(suspects: Sequence[tuple[float, float, Held]]) -> str:
    lines = []
    for beyond, expected, each in suspects:
        case = each.case
        show, name = format_bytes if case.target in MEMORY else format_seconds, case.target
        why = f"{case.measured / expected:.2f} times the expected {show(expected)}; {beyond:.1f} interval widths off"
        cells = [case.measurement_id[:12], _title(name), case.model, case.gpu, show(case.measured), why, case.source]
        lines.append(([escape(cell) for cell in cells], ""))
    headers = ("run", "what", "model", "card", "measured", "why", "source")
    return lines_table(headers, lines, right=(4,), wide=5) if lines else ""
