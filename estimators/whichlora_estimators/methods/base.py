"""What a method is: what it trains, and how it rewrites the linear layers that it adapts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from ..errors import Unsupported
from ..families.base import Model
from ..layers import Build, Linear
from ..stack import FP32_ADAPTERS
from ..tape import FP32, Dtype, Leaf, Tensor
from ..workload import Workload

METHODS: dict[str, Method] = {}
C = TypeVar("C", bound="type[Method]")


class Method(ABC):
    """One way to fine-tune; instances are registered by name and hold no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Whether the base weights train.
    trains_base: ClassVar[bool] = False
    #: Whether activations can be checkpointed under it.
    allows_checkpointing: ClassVar[bool] = True
    #: Whether the rank of the workload means something.
    has_rank: ClassVar[bool] = True
    #: Whether a rank above a layer's width is no mistake.
    allows_wide_ranks: ClassVar[bool] = False
    #: Whether PEFT lets biases of the model train beside the adapters.
    has_bias: ClassVar[bool] = True
    #: Whether layers may differ in rank.
    has_rank_pattern: ClassVar[bool] = False
    #: Whether modules and layers can be left out of what the targets name, and whether tokens' embeddings can train.
    has_exclusions: ClassVar[bool] = False
    has_layers: ClassVar[bool] = False
    has_tokens: ClassVar[bool] = False
    #: Whether PEFT's configuration of it has `lora_bias`.
    has_adapter_bias: ClassVar[bool] = False
    #: Whether PEFT's configuration of it has `layer_replication`.
    has_replication: ClassVar[bool] = False
    #: Whether it adapts bare parameters (`target_parameters`).
    has_parameters: ClassVar[bool] = False
    #: Whether PEFT's configuration of it has `ensure_weight_tying`.
    has_tying: ClassVar[bool] = False
    #: Whether its virtual tokens go through an encoder of a width of its own, and whether that is asked for.
    has_encoder: ClassVar[bool] = False
    has_projection: ClassVar[bool] = False

    @abstractmethod
    def adapt(self, model: Model, workload: Workload) -> None:
        """Add adapters to a built model."""

    def peft_config(self, peft: Any, workload: Workload) -> Any:
        """Return PEFT's configuration, given the package: for methods that rehearsals do not know by themselves."""
        raise Unsupported("this method cannot be rehearsed", value=self.name, todo="Choose one that PEFT has.")


def method(cls: C) -> C:
    """Register a method; registering a name twice is an error that names the first."""
    first = METHODS.get(cls.name)
    assert first is None, f"{cls.name} is registered already, by {type(first).__name__}"
    METHODS[cls.name] = cls()
    return cls


def adapter_dtype(layer: Linear) -> Dtype:
    """Return the dtype in which PEFT creates adapters of a layer: what it computes in, fp32 beside int8."""
    return FP32 if layer.compute_dtype is None else layer.compute_dtype


def trained(build: Build, name: str, *shape: int, dtype: Dtype = FP32, frozen: bool = False) -> Tensor:
    """Allocate an adapter weight that trains, unless frozen."""
    with build.tape.tagged("adapters"):
        tensor = build.tape.new(shape, dtype)
    if not frozen:
        tensor.node = Leaf()
    return build.add(name, tensor)


@contextmanager
def upcast(build: Build) -> Iterator[None]:
    """Convert the 16-bit parameters that are added inside to fp32, one by one (tuners_utils.py, cast_adapter_dtype).

    Copies of modules that train whole are made before that.
    """
    before = len(build.parameters)
    yield
    added = build.parameters[before:]
    build.save()
    widen(build, (parameter.tensor for parameter in added))


def widen(build: Build, tensors: Iterable[Tensor]) -> None:
    """Convert 16-bit tensors of adapters to fp32 one by one, in the releases of PEFT that do."""
    if not build.tape.stack.does(FP32_ADAPTERS):
        return
    with build.tape.tagged("adapters"):
        for tensor in tensors:
            if tensor.dtype.bytes < FP32.bytes:
                tensor.storage, tensor.dtype = build.tape.new(tensor.shape, FP32).storage, FP32
