"""What commands that run workloads share: the store of their results, and lines that say why there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from whichlora_estimators.errors import BadValue
from whichlora_profiles_db import Store, open_store


def results_store(options: Mapping[str, Any]) -> Store | None:
    """Return the store that results go to, None where they are not kept.

    Raises BadValue for one that cannot be written, which would else be found out once the first result is there.
    """
    if not options["stored"]:
        return None
    store = open_store(options["db"])
    there = next(path for path in (store.path, *store.path.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise BadValue(
            "the store cannot be written",
            value=str(store.path),
            todo="Name another with --db, or keep nothing: --no-store.",
        )
    return store


def unanswered(shown: Mapping[str, Any]) -> str | None:
    """Return the line of a workload without bytes: out of memory, or why; None for one that has some."""
    if "error" not in shown:
        return None
    why = "out of memory" if shown.get("oom") else "no answer"
    return f"{shown['id'] or shown.get('model') or 'a workload'}: {why}: {shown['error']}"
