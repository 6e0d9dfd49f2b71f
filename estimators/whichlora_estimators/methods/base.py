"""What a method is: what it trains, and how it rewrites the linear layers that it adapts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from ..errors import BadValue
from ..families.base import Model
from ..layers import Linear
from ..workload import Workload

METHODS: dict[str, Method] = {}
C = TypeVar("C", bound="type[Method]")


class Method(ABC):
    """One way to fine-tune; instances are registered by name and hold no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Whether the base weights train.
    trains_base: ClassVar[bool] = False
    #: Whether the rank of the workload means something.
    has_rank: ClassVar[bool] = True

    @abstractmethod
    def adapt(self, model: Model, workload: Workload) -> None:
        """Add adapters to a built model."""


def method(cls: C) -> C:
    """Register a method; registering a name twice is an error that names the first."""
    first = METHODS.get(cls.name)
    assert first is None, f"{cls.name} is registered already, by {type(first).__name__}"
    METHODS[cls.name] = cls()
    return cls


def adapted_linears(model: Model, workload: Workload) -> list[Linear]:
    """Return the layers that the workload's targets name: by the last part of their names, or all of them."""
    targets = workload.targets
    if targets == "all-linear":
        return list(model.build.linears)
    wanted = set(model.default_targets if targets is None else targets)
    known = {layer.name for layer in model.build.linears}
    missing = sorted(wanted - known)
    if missing:
        todo = f"Linear layers of this model: {', '.join(sorted(known))}."
        raise BadValue("the model has no linear layer with this target name", value=missing[0], todo=todo)
    return [layer for layer in model.build.linears if layer.name in wanted]


def check_rank(layer: Linear, rank: int) -> None:
    """Refuse a rank above the smaller side of a layer: such an adapter has more parameters than what it replaces."""
    widest = min(layer.in_features, layer.out_features)
    if rank > widest:
        todo = f"{layer.name} is {layer.out_features} x {layer.in_features}: choose a rank up to {widest}."
        raise BadValue("rank above the layer's width", value=rank, todo=todo)
