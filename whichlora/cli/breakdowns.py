"""Where the bytes are, as text."""

from __future__ import annotations

from whichlora_estimators.units import format_bytes

from ..rehearse.breakdown import Breakdown
from .tables import table


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
