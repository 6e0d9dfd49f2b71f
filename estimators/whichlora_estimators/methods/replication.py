"""Layers that stand in a model several times, on shared weights, each with adapters of its own (`layer_replication`).

States replicate_layers and clone_module (peft/tuners/tuners_utils.py; read in 0.21): every layer of the new stack is a deep copy
whose parameters are then replaced by those of the original; what is no parameter stays a copy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

from ..errors import BadValue, Unsupported
from ..families.base import Config, Model
from ..families.windows import WindowedDecoder, WindowedLayer
from ..layers import Build, Embedding, Linear, Stack
from ..quantization import Linear8bit
from ..tape import Tape, Tensor
from ..workload import Workload

#: How the names of layers begin where PEFT finds them.
_LAYER = re.compile(r"((?:model\.layers|bert\.encoder\.layer)\.)(\d+)\.")
#: Models that look every layer's type up in a list of their config, which does not grow with them (transformers 5.23).
LISTED = ("gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3")
#: What is no part of a layer, though a layer holds on to it.
_OTHERS = (FunctionType, MethodType, partial, type, Tensor, Build, Tape, Config)
L = TypeVar("L", bound="Linear | Stack")
Part = Any  # what a layer is made of: modules, which hold modules, lists of them and tensors


def replicate_layers(model: Model, workload: Workload) -> None:
    """Put the layers of the workload's ranges in the place of the model's. Raises BadValue or Unsupported."""
    if not workload.layer_replication:
        return
    blocks: Sequence[Part] = getattr(model, "blocks", ())
    numbers = [number for first, last in workload.layer_replication for number in range(first, last)]
    prefix = _checked(model, workload, numbers, len(blocks))
    plain = [block.layer if isinstance(block, WindowedLayer) else block for block in blocks]
    _copy_once(model.build, [plain[number] for number in numbers])
    stack = [_twin(plain[number], prefix, place) for place, number in enumerate(numbers)]
    _put_in_place(model.build, stack, prefix, set(numbers))
    model.blocks = _windowed(model, stack, len(blocks)) if isinstance(model, WindowedDecoder) else stack  # type: ignore[attr-defined]


def _checked(model: Model, workload: Workload, numbers: Sequence[int], count: int) -> str:
    """Return how the layers' names begin."""
    names = (parameter.name for parameter in model.build.parameters)
    prefixes = {found[1] for found in map(_LAYER.match, names) if found is not None}
    if len(prefixes) != 1:
        todo = "Leave layer_replication out: PEFT finds the layers of models built like Llama or BERT."
        raise Unsupported("layer_replication of this model", value=model.model_type, todo=todo)
    if max(numbers) >= count:
        todo = "Give pairs of a first layer and the one behind the last, such as [[0, 4], [2, 5]]."
        raise BadValue(f"layer_replication of more than {count} layers", value=max(numbers), todo=todo)
    if len(numbers) > count and model.model_type in LISTED:
        todo = f"Give ranges of {count} layers at most: Transformers finds no type for the others."
        raise Unsupported(f"more layers of {model.model_type} than its config lists", value=len(numbers), todo=todo)
    (prefix,) = prefixes
    for name in workload.modules_to_save:
        if any(layer.name.startswith(prefix) and name in layer.name.split(".") for layer in model.build.linears):
            todo = "Leave it out of modules_to_save, or leave layer_replication out."
            raise Unsupported("modules of replicated layers that train whole", value=name, todo=todo)
    return prefix


def _copy_once(build: Build, layers: Sequence[Part]) -> None:
    """Copy layer after layer whole, and let go of what the originals' parameters then replace.

    An int8 layer's codes are kept beside its parameter: the first layer on it takes the parameter's, others go on with theirs.
    """
    met: set[int] = set()
    for layer in layers:
        copies = []
        for module in _modules(layer, set()):
            tensors = {id(value): value for value in _held(module)}.values()
            copies += [build.tape.new(tensor.shape, tensor.dtype) for tensor in tensors]
            if isinstance(module, Linear8bit) and id(module) in met:
                build.originals += copies[-len(tensors) :]
            met.add(id(module))
        del copies


def _held(module: Part) -> Iterator[Tensor]:
    for value in vars(module).values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor) and each.storage is not None:
                yield each


def _modules(part: Part, seen: set[int]) -> Iterator[Part]:
    """Go through a layer's modules, itself first."""
    if isinstance(part, (list, tuple, dict)):
        for each in part.values() if isinstance(part, dict) else part:
            yield from _modules(each, seen)
    elif _is_module(part) and id(part) not in seen:
        seen.add(id(part))
        yield part
        for each in vars(part).values():
            yield from _modules(each, seen)


def _is_module(part: Part) -> bool:
    return hasattr(part, "__dict__") and not isinstance(part, _OTHERS)


def _twin(layer: Part, prefix: str, place: int) -> Part:
    """Make a layer with modules of its own on the same tensors, named by its place."""
    twins = {id(module): copy.copy(module) for module in _modules(layer, set())}

    def of(part: Part) -> Part:
        if type(part) in (list, tuple):
            return type(part)(of(each) for each in part)
        if type(part) is dict:
            return {key: of(each) for key, each in part.items()}
        return twins.get(id(part), part)

    for twin in twins.values():
        for name, value in vars(twin).items():
            setattr(twin, name, of(value))
        if isinstance(twin, (Linear, Embedding, Stack)):
            twin.name = _LAYER.sub(rf"{prefix}{place}.", twin.name, count=1)
    return of(layer)


def _put_in_place(build: Build, stack: Sequence[Part], prefix: str, kept: set[int]) -> None:
    """Count the new layers' modules in place of the old ones', and drop the parameters of layers that are no more.

    Those of the others keep the names of the originals, whichever place they have now.
    """
    made = [module for layer in stack for module in _modules(layer, set())]
    build.linears[:] = _among(build.linears, prefix, [module for module in made if isinstance(module, Linear)])
    build.stacks[:] = _among(build.stacks, prefix, [module for module in made if isinstance(module, Stack)])
    numbers = {id(each): _LAYER.match(each.name) for each in build.parameters}
    build.parameters = [
        each for each in build.parameters if (found := numbers[id(each)]) is None or int(found[2]) in kept
    ]


def _among(listed: list[L], prefix: str, made: list[L]) -> list[L]:
    """Put new modules where the old layers' ones are listed."""
    place = next((place for place, each in enumerate(listed) if each.name.startswith(prefix)), 0)
    others = [each for each in listed if not each.name.startswith(prefix)]
    return [*others[:place], *made, *others[place:]]


def _windowed(model: WindowedDecoder, stack: Sequence[Part], before: int) -> list[Part]:
    """Let layers see the windows of their places."""
    places = set(range(len(stack)) if len(model.windows) == before else model.windows)
    window = next(iter(model.windows.values()), 0)
    model.windows = {place: window for place in sorted(places) if place < len(stack)}
    return [WindowedLayer(layer) if place in places else layer for place, layer in enumerate(stack)]
