"""Units are converted here and nowhere else; inside, everything is bytes, seconds and FLOPs."""

from __future__ import annotations

import re

from .errors import BadValue

GB = 10**9
GIB = 2**30
MIB = 2**20
KIB = 2**10

_BYTES_PER_UNIT = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12}
_BYTES_PER_UNIT |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}


def format_bytes(size_bytes: int | float) -> str:
    """Format bytes in binary units, as PyTorch and nvidia-smi print them: `'15.37 GiB'`."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def parse_bytes(text: str) -> int:
    """Parse `'24 GB'` (10⁹), `'22.5GiB'` (2³⁰) or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _BYTES_PER_UNIT:
        raise BadValue("not an amount of memory", value=text, todo="Write a number and a unit: 24GB or 22.5GiB.")
    return int(float(match[1]) * _BYTES_PER_UNIT[match[2].lower()])


def format_seconds(duration_s: float) -> str:
    """Format a duration with the unit that suits it: `'3.1 ms'`, `'2.4 s'`, `'12.0 min'`, `'5.2 h'`."""
    if duration_s < 1:
        return f"{duration_s * 1e3:.1f} ms"
    for unit, scale, below in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, float("inf"))):
        if duration_s < below:
            return f"{duration_s / scale:.1f} {unit}"
    raise AssertionError(duration_s)
