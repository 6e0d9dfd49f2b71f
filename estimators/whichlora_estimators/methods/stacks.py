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
from .targets import adapted_linears, is_adapted


def lora_targets(model: Model, workload: Workload) -> tuple[list[Linear], list[tuple[Stack, int]]]:
    """Return what LoRA adapts: linear layers, and stacks with their ranks. Raises BadValue or Unsupported.

    Names that the experts' layers had before they were stacked stand for the stacks; two of them joined have twice the rank.
    Which modules are excluded and which layers are meant is nothing to PEFT then: all stacks of a name are adapted.
    """
    names = model.stack_names
    if not names or not model.build.stacks or workload.targets is None:  # before 5.0 they are layers of their own
        return adapted_linears(model, workload, embeds=True), []
    targets = workload.targets
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
    linears = adapted_linears(model, workload.with_(targets=rest), embeds=True) if rest else []
    return linears, list(_stacks(model, wanted, workload))


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
            _check(workload)
            yield stack, workload.rank * len(parts)


def _check(workload: Workload) -> None:
    if workload.method == "dora":
        todo = "Name linear layers as targets (q_proj, …), or choose lora."
        raise Unsupported("PEFT has no DoRA of stacked experts", value=workload.model, todo=todo)
    if workload.dropout:
        todo = "Name linear layers as targets (q_proj, …), or leave out dropout."
        raise Unsupported("PEFT has no dropout before stacked experts", value=workload.dropout, todo=todo)


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
        return StackFolding(self) if self.experts > 1 else RouterFolding(self)


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


class RouterFolding(Folding):
    """The update of a router's weight, made at once; a first sum is only a trial."""

    def __init__(self, lora: LoraStack) -> None:
        super().__init__(lora.stack.weight)
        update = ops.scale(products.matmul(lora.b, lora.a))
        self.update = ops.cast(update, self.stored.dtype)
        del update
        ops.add(self.stored, self.update)

    def weight(self) -> Tensor:
        """Return W + B A."""
        return ops.add(self.stored, self.update)
