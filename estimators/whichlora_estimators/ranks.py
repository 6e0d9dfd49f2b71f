"""Ranks that PEFT runs, but that nobody who chooses by a budget wants."""

from __future__ import annotations

from .errors import BadValue
from .families.base import Model
from .methods import find_method
from .methods.targets import is_target, rank_of
from .stack import NEWEST_STACK, Stack
from .tape import Tape
from .timeline import build_model
from .workload import Workload


def check_rank(workload: Workload, stack: Stack = NEWEST_STACK) -> None:
    """Refuse a rank above the smaller side of a layer: such an adapter has more parameters than the layer. Raises BadValue."""
    method = find_method(workload.method)
    if not method.has_rank or method.allows_wide_ranks or workload.phase == "generate":
        return
    model = build_model(workload.with_(quantization="none"), Tape(stack=stack), workload.config)
    for layer in model.build.linears:
        widest = min(layer.in_features, layer.out_features)
        rank = rank_of(layer, workload)
        if rank > widest > 1 and _adapts(model, layer.name, workload):  # a gate of one output is no mistake
            todo = f"{layer.name} is {layer.out_features} x {layer.in_features}: choose a rank up to {widest}."
            raise BadValue("rank above the layer's width", value=rank, todo=todo)


def _adapts(model: Model, name: str, workload: Workload) -> bool:
    return is_target(name, model.default_targets if workload.targets is None else workload.targets)
