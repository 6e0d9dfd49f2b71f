"""The health of the calibration, in sections of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from whichlora_calibration.cases import NAMES
from whichlora_calibration.correction import PHASE_NAMES, Correction, TargetCorrection
from whichlora_profiles_db import StoreStats

from ..report_page import paragraph, section

#: Lays out a table: name, headers, lines, columns to the right, wide column.
Table = Callable[..., str]
_GROUPS = {"model": "the model", "gpu": "the card"}
_YES = {True: "yes", False: "no"}


def calibration_parts(
    found: Correction | None, history: Sequence[Correction], held: StoreStats, table: Table
) -> Iterator[str]:
    """Yield what the correction in use was made of, its held-out errors, and what came before it."""
    measured = sum(group.total for group in held.groups if group.evidence == "measured")
    runs = f"The store holds {held.total:,} measurements, {measured:,} of them measured by people here."
    if found is None:
        todo = "No correction is in use: every number is the formula's. `whichlora calibrate` makes one."
        yield paragraph(f"{todo} {runs}")
        return
    counts = ", ".join(f"{count:,} of {NAMES.get(name, name)}" for name, count in found.counts.items() if count)
    own = "shipped with whichlora" if found.version not in {each.version for each in history} else "made here"
    made = (
        f"The correction in use ({found.version}, {own}, {found.made_at[:10]}) was learnt from {counts or 'nothing'}."
    )
    yield paragraph(f"{made} {runs}")
    yield section("Held-out errors", paragraph(_note(found)), _scores(found, table))
    if fits := found.false_fits:
        text = f"Of held-out runs, {fits['rate']:.1%} were said to fit and did not"
        known = (
            f" ({fits['wrong']:.0f} of {fits['cells']:.0f} kinds of run)" if {"wrong", "cells"} <= fits.keys() else ""
        )
        yield section("Said to fit, and did not", paragraph(f"{text}{known}."))
    lines = [
        [
            escape(each.made_at),
            f"<code>{escape(each.version)}</code>",
            f"{sum(each.counts.values()):,}",
            escape(each.whichlora),
        ]
        for each in history
    ]
    if lines:
        headers = ("made", "version", "numbers", "by whichlora")
        yield section("History", table("Corrections over time", headers, lines, right=(2,), wide=0))


def _note(found: Correction) -> str:
    return (
        "Median error of predictions for runs whose model, or card, was held out: what to expect of one that nobody"
        " measured. A correction that does not beat the formula there is not applied, and the formula's number stands."
        f" Intervals are made to hold {found.coverage:.0%} of held-out runs; a dash: too few runs to tell."
    )


def _scores(found: Correction, table: Table) -> str:
    lines = []
    for score in found.scores():
        part, label = score.errors, _GROUPS.get(score.group)
        if label is None:
            continue
        errors = [f"{part[kind]['median_abs_error']:.1%}" for kind in ("formula", "corrected")]
        coverage = part.get("coverage")
        inside = "-" if coverage is None or math.isnan(coverage) else f"{coverage:.0%}"
        lines.append([escape(score.what), label, *errors, _YES[bool(part.get("applied"))], inside])
    headers = ("what", "held out", "formula's error", "corrected", "applied", "runs within the interval")
    return table("Held-out errors", headers, lines, right=(2, 3, 5), wide=0)


def card_offsets(found: Correction | None, gpu: str, table: Table) -> Iterator[str]:
    """Yield how each number is corrected on a card, and how far it may be off."""
    if found is None or not found.targets:
        yield paragraph("No correction is in use: every number is the formula's.")
        return
    yield paragraph(
        f"The last column is where {found.coverage:.0%} of held-out runs lay: what was measured, over what is predicted."
    )
    lines = [_offset(name, phase, target, gpu) for name, target in found.targets.items() for phase in target.modes]
    headers = ("what", "learnt from this card", "applied", "this card's factor", "measured over predicted")
    yield table("Corrections on this card", headers, lines, right=(3, 4), wide=0)


def _offset(name: str, phase: str, target: TargetCorrection, gpu: str) -> list[str]:
    mode, known = target.mode(phase, gpu), gpu in target.cards
    what = NAMES[name] + (f", {PHASE_NAMES[phase]}" if len(target.modes) > 1 else "")
    factor = f"{math.exp(target.cards[gpu]):.3f}" if known and mode.applied else "-"
    span = "-" if mode.low == mode.high else f"{mode.low:.2f} to {mode.high:.2f}"  # of too few runs
    return [escape(what), _YES[known], _YES[mode.applied], factor, span]
