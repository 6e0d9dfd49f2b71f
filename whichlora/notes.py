"""What one would not expect of workloads: each sentence once, with the models that it is said of."""

from __future__ import annotations

from collections.abc import Iterable

from whichlora_estimators.caveats import caveats
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.stack import Stack
from whichlora_estimators.workload import Workload


def notes(workloads: Iterable[Workload], stack: Stack) -> dict[str, list[str]]:
    """Return the caveats of workloads, each with its models, in the order met; none of what has no formula."""
    found: dict[str, dict[str, None]] = {}
    for workload in workloads:
        for text in _known(workload, stack):
            found.setdefault(text, {})[workload.model] = None
    return {text: list(models) for text, models in found.items()}


def _known(workload: Workload, stack: Stack) -> tuple[str, ...]:
    try:
        return caveats(workload, stack)
    except WhichloraError:  # it may still be rehearsed
        return ()
