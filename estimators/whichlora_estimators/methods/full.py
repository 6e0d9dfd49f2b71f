"""Full fine-tuning."""

from __future__ import annotations

from ..families.base import Model
from ..workload import Workload
from .base import Method, method


@method
class Full(Method):
    """Every weight trains."""

    name = "full"
    summary = "every weight trains"
    trains_base = True
    has_rank = False
    has_bias = False

    def adapt(self, model: Model, workload: Workload) -> None:
        """Add nothing."""
