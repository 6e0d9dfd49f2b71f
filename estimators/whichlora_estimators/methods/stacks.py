"""LoRA of weights that are no linear layer's: the stacked experts of a mixture and its router (peft/tuners/lora/layer.py, 0.21).

PEFT's ParamWrapper makes the whole adapted weight anew in every pass, and the products keep it for backward: a stack of experts
costs its size once more in every layer, and its gradient in full on the way to the adapter's.

# E experts, D output width, I input width, R rank
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import mixture, ops, products
from ..errors import BadValue, Unsupported
from ..families.base import Model
from ..layers import Build, Folding, Linear, Stack
from ..tape import Tensor
from ..workload import Workload
from .base import trained
from .targets import adapted_linears, is_adapted, rank_of


def lora_targets(model: Model, workload: Workload) -> tuple[list[Linear], list[tuple[Stack, int]]]:
    """Return what LoRA adapts: linear layers, and stacks with their ranks. Raises BadValue or Unsupported.

    Names that the experts' layers had before they were stacked stand for the stacks; two of them joined have twice the rank.
    Which modules are excluded and which layers are meant is nothing to PEFT then: all stacks of a name are adapted.
    """
    names, targets = model.stack_names, workload.targets
    if targets == ():
        return [], []
    if not names or not model.build.stacks:  # before 5.0 they are layers of their own
        return adapted_linears(model, workload, embeds=True, needed=not workload.target_parameters), []
    if targets is None:
        todo = 'Name the layers to adapt, or give "all-linear".'
        raise BadValue("PEFT has no default target modules for mixtures of stacked experts", value=None, todo=todo)
    if targets == "all-linear":
        meant = [layer for layer in model.build.linears if is_adapted(layer.name, targets, workload)]
        linears = [layer for layer in meant if layer.name.rpartition(".")[2] not in names]
        return linears, list(_stacks(model, set(names), workload))
    if isinstance(targets, str):
        targets = _last_names(model, targets, workload)
        if not targets:
            return adapted_linears(model, workload, embeds=True), []  # which tells what there is
    rest = tuple(name for name in targets if name.rpartition(".")[2] not in names)
    wanted = {name.rpartition(".")[2] for name in targets} & set(names)
    stacks = list(_stacks(model, wanted, workload))
    if not rest:
        return [], stacks
    needed = not stacks and not workload.target_parameters
    return adapted_linears(model, workload.with_(targets=rest), embeds=True, needed=needed), stacks


def without_default(model: Model, workload: Workload) -> Workload:
    """Return the workload with no targets where PEFT takes none, being given parameters: of mixtures, or unknown models."""
    if workload.targets is not None or not workload.target_parameters:
        return workload
    mixed = bool(model.stack_names) and bool(model.build.stacks)
    return workload.with_(targets=()) if mixed or not model.default_targets else workload


def _last_names(model: Model, pattern: str, workload: Workload) -> tuple[str, ...]:
    """Return the last names of what a pattern means in a mixture: PEFT takes these instead, so layers are not told apart.

    States _resolve_string_target_modules (peft/utils/transformers_weight_conversion.py, 0.21).
    """
    build = model.build
    wholes = [layer.name for layer in (*build.linears, *build.heads)] + [table.name for table in build.embeddings]
    for stack in build.stacks:
        wholes += [stack.name, stack.name.removesuffix(".weight")]
        container = stack.name.rpartition(".")[0]
        wholes += [f"{container}.{old}" for old, new in model.stack_names.items() if stack.name.endswith(f".{new}")]
    return tuple(sorted({whole.rpartition(".")[2] for whole in wholes if is_adapted(whole, pattern, workload)}))


def _stacks(model: Model, wanted: set[str], workload: Workload) -> Iterator[tuple[Stack, int]]:
    joined: dict[str, list[str]] = {}
    for name, stack_name in model.stack_names.items():
        joined.setdefault(stack_name, []).append(name)
    for parts in joined.values():
        missing = set(parts) - wanted
        if missing and len(missing) < len(parts):
            todo = f"They are one weight: name all of {', '.join(parts)}, or none."
            raise BadValue("a target without the other half of its weight", value=min(set(parts) - missing), todo=todo)
    for stack in model.build.stacks:
        parts = joined[next(name for name in joined if stack.name.endswith(f".{name}"))]
        if set(parts) <= wanted:
            check_wrapped(workload)
            yield stack, rank_of(stack, workload, default=workload.rank * len(parts))


def check_wrapped(workload: Workload) -> None:
    """Refuse what PEFT's adapters of bare parameters lack. Raises Unsupported."""
    if workload.method == "dora":
        todo = "Name linear layers as targets (q_proj, …), or choose lora."
        raise Unsupported(
            "PEFT has no DoRA of bare parameters, such as stacked experts", value=workload.model, todo=todo
        )
    if workload.lora_bias:
        todo = "Leave lora_bias out, or name linear layers alone as targets."
        raise Unsupported("PEFT has no lora_bias of bare parameters, such as stacked experts", value=True, todo=todo)
    if workload.dropout:
        todo = "Name linear layers as targets (q_proj, …), or leave out dropout."
        raise Unsupported(
            "PEFT has no dropout before bare parameters, such as stacked experts", value=workload.dropout, todo=todo
        )


class LoraStack:
    """W + B A, expert by expert."""

    def __init__(self, stack: Stack, build: Build, rank: int, *, freeze_a: bool = False) -> None:
        self.stack = stack
        self.experts = stack.weight.shape[0] if len(stack.weight.shape) > products.MATRIX else 1
        width_out, width_in = stack.weight.shape[-2:]
        ranks, dtype = rank * self.experts, stack.weight.dtype
        self.a = trained(build, f"{stack.name}.lora_A", ranks, width_in, dtype=dtype, frozen=freeze_a)
        self.b = trained(build, f"{stack.name}.lora_B", width_out, ranks, dtype=dtype)

    def __call__(self) -> Folding:
        """Start a pass."""
        return StackFolding(self) if self.experts > 1 else MatrixFolding(self.stack.weight, self.a, self.b)


class StackFolding(Folding):
    """The factors in the dtype of the weight, and the sum once it was asked for; a first sum is only a trial."""

    def __init__(self, lora: LoraStack) -> None:
        super().__init__(lora.stack.weight)
        dtype = self.stored.dtype
        ranks, width = lora.a.shape
        self.up = ops.cast(mixture.by_expert(lora.b, lora.experts), dtype)
        self.down = ops.cast(ops.reshape(lora.a, lora.experts, ranks // lora.experts, width), dtype)
        self.cached: Tensor | None = None
        mixture.folded(self.stored, self.up, self.down)

    def weight(self) -> Tensor:
        """Return W + B A."""
        if self.cached is None:
            self.cached = mixture.folded(self.stored, self.up, self.down)
        return self.cached


class MatrixFolding(Folding):
    """The update of a matrix, a router's say, made at once; a first sum is only a trial."""

    def __init__(self, stored: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__(stored)
        update = ops.scale(products.matmul(b, a))
        self.update = ops.cast(update, self.stored.dtype)
        del update
        ops.add(self.stored, self.update)

    def weight(self) -> Tensor:
        """Return W + B A."""
        return ops.add(self.stored, self.update)
