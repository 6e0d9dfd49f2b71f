"""Learn the correction that ships with the package, from the published measurements alone, and write its scores.

    python -m benchmarks.make_correction

Writes calibration/whichlora_calibration/data/unseen_times.json and correction.json, and docs/calibration.md. Run it after
every change of the estimators, and after `benchmarks.roofline_fits` where the roofline was fitted anew: tests compare the
predictions that it was learnt from with present ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import unseen_times
from whichlora_calibration.calibrate import Calibration, calibrate, summary_to_json
from whichlora_calibration.cases import MEMORY, NAMES, cases_of
from whichlora_calibration.correction import PHASE_NAMES, Score, correction_to_json
from whichlora_calibration.forecasts import Forecasts
from whichlora_calibration.modes import FEWEST_GROUPS
from whichlora_calibration.scores import covered
from whichlora_profiles_db import published

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "calibration/whichlora_calibration/data/correction.json"
PAGE = ROOT / "docs/calibration.md"
BEGIN, END = "<!-- scores: written by benchmarks/make_correction.py -->", "<!-- end of scores -->"
_YES: dict[Any, str] = {True: "yes", False: "no"}
_GROUPS = {"model": "model", "gpu": "card", "source": "source"}


def main() -> None:
    """Fit, write, print."""
    unseen_times.main()
    forecasts = Forecasts(Path(tempfile.gettempdir()) / "whichlora-forecasts")
    compared = cases_of(published(), forecasts, report=_tell)
    forecasts.save()
    write(calibrate(compared.cases, compared.left, rows=compared.rows, report=_tell))


def write(found: Calibration) -> None:
    """Write the correction and its page, and print the scores."""
    DATA.write_text(json.dumps(correction_to_json(found.correction), indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{scores_page(found)}\n{END}{after}", encoding="utf-8")
    print(scores_page(found))


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def scores_page(found: Calibration) -> str:
    """Lay out the held-out scores as Markdown."""
    lines = [*_pooled(found), ""]
    lines += [
        "| what | held out | groups | cells | formula | corrected | gain (middle 90%) | 90% interval | within it | applied |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_line(score) for score in found.correction.scores()]
    lines += ["", *_too_few(found)]
    lines += ["", *_by_card(found)]
    false = found.correction.false_fits
    if false:
        lines += ["", _false_fits(false)]
    return "\n".join(lines)


def _pooled(found: Calibration) -> list[str]:
    """Say how predictions as they are made do on held-out models and cards."""
    summary = summary_to_json(found)
    lines = [
        "| as predicted | held out | groups | formula | corrected where applied | gain (middle 90%) | in 90% interval |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    phases = {f"memory, {PHASE_NAMES[phase]}": part for phase, part in summary["memory"]["phases"].items()}
    for kind, scores in {"memory": summary["memory"], **phases, "time": summary["time"]}.items():
        for label, held in (("leave_one_model_out", "model"), ("leave_one_card_out", "card")):
            part = scores[label]
            median = " | ".join(f"{part[which]['median_abs_error']:.2%}" for which in ("formula", "corrected"))
            lines.append(
                f"| {kind} | {held} | {part['groups']} | {median} | {_gain(part)} | {_inside(part['coverage_90'])} |"
            )
    return lines


def _gain(part: Any) -> str:
    return f"{part['gain']:+.1%} ({part['gain_low']:+.1%} to {part['gain_high']:+.1%})"


def _inside(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _too_few(found: Calibration) -> list[str]:
    few = [
        f"{score.what} ({score.errors['groups']} {_GROUPS[score.group]}s)"
        for score in found.correction.scores()
        if score.group != "source" and score.errors["groups"] < FEWEST_GROUPS and not score.errors["applied"]
    ]
    return [f"Too few groups to hold out, so nothing is applied: {', '.join(few)}."] if few else []


def _by_card(found: Calibration) -> list[str]:
    """Say how intervals of bytes do that were made without a chip, where there are too few chips for a share to be told."""
    told = []
    for target in MEMORY:
        scores = found.targets[target]
        held = [each for each in scores.held["chip"] if not each.case.out_of_memory]
        for gpu, phase in sorted({(each.case.gpu, each.case.phase) for each in held}):
            own = [each for each in held if (each.case.gpu, each.case.phase) == (gpu, phase)]
            share = covered(own, [scores.ruled(each).inside(each) for each in own])
            count = len({each.case.cell for each in own})
            told.append(f"{NAMES[target]} of {PHASE_NAMES[phase]} on {gpu} {_inside(share)} of {count} cells")
    note = "Too few cards have bytes for a share to mean much; intervals made without a card's chip would have held"
    return [f"{note}: {'; '.join(told)}."]


def _line(score: Score) -> str:
    part = score.errors
    applied = _YES.get(part.get("applied"), "-")
    errors = " | ".join(f"{part[kind]['median_abs_error']:.1%}" for kind in ("formula", "corrected"))
    told = f"{_gain(part)} | {score.interval} | {_inside(part.get('coverage'))} | {applied}"
    return f"| {score.what} | {_GROUPS[score.group]} | {part['groups']} | {part['cells']} | {errors} | {told} |"


def _false_fits(false: Any) -> str:
    return (
        f"Of {false['cells']:.0f} held-out cells with process bytes or an out-of-memory, {false['said_to_fit']:.0f} were"
        f" said to fit and {false['did_not_fit']:.0f} did not fit; said to fit and did not: {false['wrong']:.0f}"
        f" ({false['rate']:.1%})."
    )


if __name__ == "__main__":
    main()
