"""The health of the calibration, in sections of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from whichlora_calibration.correction import Correction, TargetCorrection

from ..report_page import paragraph, section

#: Lays out a table: name, headers, lines, columns to the right, wide column.
Table = Callable[..., str]
_GROUPS = (("model", "another model"), ("chip", "another card"))


def calibration_parts(found: Correction | None, history: Sequence[Correction], table: Table) -> Iterator[str]:
    """Yield what the correction in use was made of, its held-out errors, and what came before it."""
    if found is None:
        yield paragraph("No correction is in use: every number is the formula's. `whichlora calibrate` makes one.")
        return
    counts = ", ".join(f"{count:,} of {name}" for name, count in found.counts.items() if count)
    yield paragraph(f"Version {found.version}, made {found.made_at} from {counts or 'nothing'}.")
    note = (
        "Median error of predictions for runs whose model, or card, was held out. A correction that does not beat the"
        " formula there is not applied."
    )
    yield section("Held-out errors", paragraph(note), _scores(found, table))
    if found.false_fits:
        yield section(
            "False hopes", paragraph(f"Said to fit and did not: {found.false_fits['rate']:.1%} of held-out runs.")
        )
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
        headers = ("made", "version", "rows", "by whichlora")
        yield section("History", table("Corrections over time", headers, lines, right=(2,), wide=0))


def _scores(found: Correction, table: Table) -> str:
    lines = []
    for name, target in found.targets.items():
        for group, label in _GROUPS:
            part = target.scores.get(group)
            if part is None:
                continue
            errors = [f"{part[kind]['median_abs_error']:.1%}" for kind in ("formula", "corrected")]
            coverage = part.get("coverage")
            inside = "-" if coverage is None or math.isnan(coverage) else f"{coverage:.0%}"
            lines.append([escape(name), label, *errors, inside, "yes" if part.get("applied") else "no"])
    headers = ("what", "held out", "formula", "corrected", "in interval", "applied")
    return table("Held-out errors", headers, lines, right=(2, 3, 4), wide=0)


def card_offsets(found: Correction | None, gpu: str, table: Table) -> Iterator[str]:
    """Yield how each number is corrected on a card, and how far it may be off."""
    if found is None or not found.targets:
        yield paragraph("No correction is in use: every number is the formula's.")
        return
    lines = [_offset(name, target, gpu) for name, target in found.targets.items()]
    headers = ("what", "learnt from this card", "applied", "this card's factor", "measured over predicted")
    yield table("Corrections on this card", headers, lines, right=(3, 4), wide=0)
    yield paragraph(f"The last column holds {found.coverage:.0%} of held-out runs.")


def _offset(name: str, target: TargetCorrection, gpu: str) -> list[str]:
    mode, known = target.mode(gpu), gpu in target.cards
    factor = f"{math.exp(target.cards[gpu]):.3f}" if known and mode.applied else "-"
    yes = {True: "yes", False: "no"}
    return [escape(name), yes[known], yes[mode.applied], factor, f"{mode.low:.2f} to {mode.high:.2f}"]
