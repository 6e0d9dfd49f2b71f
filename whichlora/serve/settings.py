"""How a server is run: what is open to whom, and how much anybody may ask."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from whichlora_profiles_db.pack_stage import MOST_FILE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The store and the limits. `rate_per_s` is per token, or per address without one; 0 sets no limit."""

    store: Path
    read_needs_token: bool = False
    read_only: bool = False
    root_path: str = ""
    jobs: int = min(4, os.cpu_count() or 1)
    rate_per_s: float = 50.0
    burst: int = 200
    most_body_bytes: int = 1 << 20
    most_pack_bytes: int = min(MOST_FILE_BYTES, 256 << 20)
    estimate_s: float = 20.0
    pick_s: float = 600.0
    most_picks: int = 4
