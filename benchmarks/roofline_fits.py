"""Fit the roofline's constants once without any published run, and once without each chip, for held-out errors.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.roofline_fits FILE...

FILEs as for `benchmarks/fit_roofline.py`. Writes `benchmarks/roofline_fits.json`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.fit_roofline import fit, read
from benchmarks.published_times import FITS
from benchmarks.roofline_cases import Case


def main() -> None:
    """Read the arguments, fit, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    cases = read(arguments.files)
    published = [case for case in cases if not case.on_device]
    document = {
        "none": _constants([case for case in cases if case.on_device]),
        "without": {
            chip: _constants([case for case in cases if case.chip != chip])
            for chip in sorted({case.chip for case in published})
        },
        "date": datetime.date.today().isoformat(),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in arguments.files},
        "cases": len(cases),
    }
    FITS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _constants(cases: Sequence[Case]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") for name, value in asdict(fit(cases).constants).items()}


if __name__ == "__main__":
    main()
