"""Which correction is in use: the one an environment variable names, the user's own, or the one that ships."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from whichlora_estimators.errors import BadValue
from whichlora_estimators.files import write_whole
from whichlora_profiles_db import default_path

from .correction import Correction, correction_to_json, read_correction, shipped_correction

#: Names a correction file, or `none` for the formula alone.
VARIABLE = "WHICHLORA_CORRECTION"
FILE_NAME = "correction.json"
HISTORY = "corrections"


def correction_path(environ: Mapping[str, str] | None = None) -> Path:
    """Return where the user's own correction is kept: beside the user's store."""
    return default_path(environ).parent / FILE_NAME


def current_correction(environ: Mapping[str, str] | None = None) -> Correction | None:
    """Return the correction in use; None where there is to be none. Raises BadValue for a file that cannot be read."""
    environ = os.environ if environ is None else environ
    chosen = environ.get(VARIABLE)
    if chosen == "none":
        return None
    path = Path(chosen).expanduser() if chosen else correction_path(environ)
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        if chosen:
            todo = f"{error.strerror}. Mend ${VARIABLE}, or set it to none."
            raise BadValue("cannot read the correction", value=chosen, todo=todo) from None
        return shipped_correction()
    return _read(path, stamp)


@lru_cache(maxsize=4)
def _read(path: Path, stamp: int) -> Correction:
    return read_correction(path)


def save_correction(correction: Correction, path: Path) -> Path:
    """Put a correction in use at a path, whole or not at all; it stays in the folder `corrections` beside it, by version."""
    text = json.dumps(correction_to_json(correction), indent=1) + "\n"
    kept = path.parent / HISTORY / f"{correction.version}.json"
    for place in (kept, path):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole({place: text})
    return kept


def correction_history(path: Path) -> list[Correction]:
    """Return every correction that was ever put in use at a path, the latest first."""
    found = [read_correction(each) for each in (path.parent / HISTORY).glob("*.json")]
    return sorted(found, key=lambda correction: correction.made_at, reverse=True)
