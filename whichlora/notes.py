"""What one would not expect of workloads: each sentence once, with the models that it is said of."""

from __future__ import annotations

from collections.abc import Iterable

from whichlora_estimators.caveats import caveats
from whichlora_estimators.stack import Stack
from whichlora_estimators.workload import Workload


def notes(workloads: Iterable[Workload], stack: Stack) -> dict[str, list[str]]:
    """Return the caveats of workloads, each with its models, in the order met. Raises UnknownName as `caveats` does."""
    found: dict[str, dict[str, None]] = {}
    for workload in workloads:
        for text in caveats(workload, stack):
            found.setdefault(text, {})[workload.model] = None
    return {text: list(models) for text, models in found.items()}
