"""Files that are written whole or not at all: beside the place first, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_whole(texts: Mapping[Path, str]) -> None:
    """Put texts in the place of files, new or not: all are on the disk before the first one is replaced.

    Who reads meanwhile finds the old or the new text. Raises OSError; then nothing half-written stays.
    """
    fresh = {path: path.with_name(f".{path.name}.{secrets.token_hex(6)}.new") for path in texts}
    try:
        for path, text in texts.items():
            with fresh[path].open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for path in texts:
            fresh[path].replace(path)
    finally:
        for left in fresh.values():
            left.unlink(missing_ok=True)
