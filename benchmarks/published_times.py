"""What the roofline says of published times, with constants that know as much of published rows as they may.

`roofline_fits.json` holds the constants that are not the shipped ones: those fitted on single operators alone, and those
fitted without one chip. `benchmarks/roofline_fits.py` writes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.published_rows import PublishedTime
from benchmarks.roofline_cases import timed_case
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.roofline import RooflineConstants, default_constants
from whichlora_estimators.workload import Workload

FITS = Path(__file__).with_name("roofline_fits.json")


def predicted_seconds(
    source: str, workload: Workload, gpu: Gpu, time: PublishedTime, fit: str, versions: Mapping[str, str] | None = None
) -> float:
    """Predict a published time. Raises Unmapped or WhichloraError for what the roofline cannot tell."""
    case = timed_case(source, gpu, workload, time, versions)
    return case.predicted_s(constants(fit, case.chip))


def constants(fit: str, chip: str) -> RooflineConstants:
    """Return the constants for a card of this chip: "none" knows no published row, "all" every one.

    The others know rows of other chips; a chip of which the fit has no row at all takes the shipped ones.
    """
    if fit == "all":
        return default_constants()
    known = _fits()
    if fit == "none":
        return _constants(known["none"])
    return _constants(known["without"][chip]) if chip in known["without"] else default_constants()


@cache
def _fits() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FITS.read_text(encoding="utf-8"))
    return found


def _constants(values: dict[str, float]) -> RooflineConstants:
    names = {field.name for field in dataclasses.fields(RooflineConstants)}
    if set(values) != names:
        todo = "Run benchmarks/roofline_fits.py: the roofline has changed since."
        raise WhichloraError("fits of other constants", value=sorted(names ^ set(values)), todo=todo)
    return RooflineConstants(**values)
