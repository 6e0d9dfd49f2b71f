"""Where the bytes are, as text."""

from __future__ import annotations

from pathlib import Path

from whichlora_estimators.errors import BadValue
from whichlora_estimators.units import format_bytes

from ..rehearse.breakdown import Breakdown
from .tables import table


def check_page(path: Path | None) -> None:
    """Refuse a page that could not be written, before anything runs for it. Raises BadValue."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise BadValue("no file can be written there", value=str(path), todo="Name a file in a folder that exists.")


def explanation(breakdown: Breakdown, *, most: int = 20) -> str:
    """Itemise a peak: its components, then the source lines that hold most of it."""
    total = max(breakdown.allocated_bytes, 1)

    def cells(size: int) -> tuple[str, str]:
        return format_bytes(size), f"{100 * size / total:.1f}%"

    components = [(name, *cells(size)) for name, size in breakdown.components.items()]
    lines = [(name, *cells(size), line) for (name, line), size in list(breakdown.lines.items())[:most]]
    return "\n\n".join(
        [
            table(("component", "bytes", "share"), components, right=(1, 2)),
            table(("component", "bytes", "share", "source line"), lines, right=(1, 2)),
        ]
    )
