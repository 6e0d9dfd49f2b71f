"""LoRA of parameters that are named themselves, whatever module holds them (`target_parameters`): PEFT's ParamWrapper.

States _inject_parameters (peft/tuners/tuners_utils.py) and ParamWrapper (peft/tuners/lora/layer.py), read in 0.21. The whole
adapted weight is made anew in every pass, of linear layers and tables of embeddings too, and kept for backward.

# V rows of a table, D width, N output width, K input width, R rank
"""

from __future__ import annotations

from .. import ops, products
from ..errors import BadValue, Unsupported
from ..families.base import Model
from ..layers import Build, Embedding, Linear, Stack
from ..tape import Tensor
from ..workload import Workload
from .base import trained
from .stacks import LoraStack, MatrixFolding, check_wrapped
from .targets import is_target, rank_of


def wrap_parameters(model: Model, workload: Workload, *, freeze_a: bool) -> None:
    """Give each parameter that the workload names an adapter. Raises BadValue or Unsupported."""
    if not workload.target_parameters:
        return
    check_wrapped(workload)
    turned = next((layer.name for layer in model.build.linears if layer.transposed and layer.adapter), None)
    if turned is not None:
        todo = "Name them all in targets, or all in target_parameters."
        raise Unsupported("LoRA of Conv1D layers beside that of parameters", value=turned, todo=todo)
    build, named = model.build, workload.target_parameters
    owners: dict[str, Stack | Linear | Embedding] = {stack.name: stack for stack in build.stacks}
    owners |= {f"{layer.name}.weight": layer for layer in (*build.linears, *build.heads)}
    owners |= {f"{table.name}.weight": table for table in build.embeddings}
    _check_names(model, workload, owners)
    for name, owner in owners.items():
        if not is_target(name, named):
            continue
        if not isinstance(owner, Stack):
            _wrap(owner, build, workload, freeze_a=freeze_a)
        elif owner.adapter is None:  # else it is meant by its name of before transformers 5, too
            owner.adapter = LoraStack(owner, build, rank_of(owner, workload), freeze_a=freeze_a)


def _check_names(model: Model, workload: Workload, owners: dict[str, Stack | Linear | Embedding]) -> None:
    named = workload.target_parameters
    other = [each.name for each in model.build.parameters if each.name not in owners and is_target(each.name, named)]
    if other and not other[0].endswith(("lora_A", "lora_B")):
        todo = "Name weights of linear layers, of embeddings, or of stacked experts."
        raise Unsupported("LoRA of such a parameter", value=other[0], todo=todo)
    if not workload.targets and not any(is_target(name, named) for name in owners):
        known = sorted({".".join(name.split(".")[-2:]) for name in owners})
        raise BadValue("the model has no parameter of this name", value=", ".join(named), todo=f"Known: {known}.")


def _wrap(module: Linear | Embedding, build: Build, workload: Workload, *, freeze_a: bool) -> None:
    if module.adapter is not None:
        todo = "Name it in targets or in target_parameters, not in both."
        raise Unsupported("LoRA of a layer and of its weight", value=module.name, todo=todo)
    if isinstance(module, Embedding):
        module.adapter = WrappedTable(module, build, workload, freeze_a=freeze_a)
    elif module.quantized:
        todo = "Name the layer in targets, or leave the quantization out."
        raise Unsupported("LoRA of a packed weight", value=module.name, todo=todo)
    else:
        module.adapter = WrappedLinear(module, build, workload, freeze_a=freeze_a)


class WrappedTable:
    """Rows of W + B A, [V, D]."""

    def __init__(self, table: Embedding, build: Build, workload: Workload, *, freeze_a: bool) -> None:
        self.table = table
        self.factors = _factors(table, table.weight, build, workload, freeze_a=freeze_a)

    def __call__(self, ids: Tensor) -> Tensor:
        """Take rows."""
        folding = MatrixFolding(self.table.weight, *self.factors)
        weight = folding.weight()
        found = ops.embedding(ids, weight)
        return ops.scale(found) if self.table.scaled else found


class WrappedLinear:
    """A linear layer that uses W + B A, where W is [N, K] or lies turned."""

    def __init__(self, layer: Linear, build: Build, workload: Workload, *, freeze_a: bool) -> None:
        assert layer.weight is not None
        self.layer, weight = layer, layer.weight
        self.stored = products.transpose(weight) if layer.transposed else weight
        self.factors = _factors(layer, self.stored, build, workload, freeze_a=freeze_a)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        folding, bias = MatrixFolding(self.stored, *self.factors), self.layer.bias
        weight = folding.weight()
        if self.layer.transposed:
            weight = products.transpose(weight)
        if self.layer.adds_bias and bias is not None:
            return ops.add(products.linear(x, weight), bias)
        return products.linear(x, weight, bias)


def _factors(
    module: Linear | Embedding, weight: Tensor, build: Build, workload: Workload, *, freeze_a: bool
) -> tuple[Tensor, Tensor]:
    """Make A and B for a weight as it is stored."""
    rows, columns = weight.shape
    rank = rank_of(module, workload, name=f"{module.name}.weight")
    a = trained(build, f"{module.name}.lora_A", rank, columns, dtype=weight.dtype, frozen=freeze_a)
    return a, trained(build, f"{module.name}.lora_B", rows, rank, dtype=weight.dtype)
