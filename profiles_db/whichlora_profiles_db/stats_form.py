"""Counts of a group of measurements as JSON, between a server and who asks it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from .store import GroupStats


def group_to_json(group: GroupStats) -> dict[str, Any]:
    """Return the JSON form of a group's counts."""
    return {
        "gpu": group.gpu,
        "evidence": group.evidence,
        "counts": dict(group.counts),
        "models": group.models,
        "workloads": group.workloads,
        "first_at": group.first_at and group.first_at.isoformat(),
        "last_at": group.last_at and group.last_at.isoformat(),
    }


def group_from_json(fields: dict[str, Any]) -> GroupStats:
    """Read what `group_to_json` wrote."""
    moments = {
        name: datetime.fromisoformat(text) if (text := fields[name]) else None for name in ("first_at", "last_at")
    }
    return GroupStats(**{**fields, **moments})
