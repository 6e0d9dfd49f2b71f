"""Where a user's store lies unless told otherwise."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "WHICHLORA_DB"
FILE_NAME = "profiles.duckdb"


def default_path(
    environ: Mapping[str, str] | None = None, *, platform: str = sys.platform, home: Path | None = None
) -> Path:
    """Return the path in the environment variable WHICHLORA_DB, or else the user's data folder's profiles.duckdb.

    Data folders: XDG Base Directory Specification on Linux and other Unixes (a relative XDG_DATA_HOME is ignored, as it
    demands), Library/Application Support on macOS, LOCALAPPDATA on Windows.
    """
    environ = os.environ if environ is None else environ
    if chosen := environ.get(VARIABLE):
        return Path(chosen).expanduser()
    home = home or Path.home()
    return _data_folder(environ, platform, home) / "whichlora" / FILE_NAME


def _data_folder(environ: Mapping[str, str], platform: str, home: Path) -> Path:
    if platform == "darwin":
        return home / "Library" / "Application Support"
    if platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    xdg = Path(environ.get("XDG_DATA_HOME") or "")
    return xdg if xdg.is_absolute() else home / ".local" / "share"
