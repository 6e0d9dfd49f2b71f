"""Programs of the system that tests run, found also where a user's PATH lacks the folders of the administrator's."""

from __future__ import annotations

import os
import shutil

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def find(name: str) -> str | None:
    """Return where a program is, None where it is not."""
    return shutil.which(name, path=PATH)
