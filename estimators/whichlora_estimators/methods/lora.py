"""LoRA, rank-stabilised LoRA, LoRA-FA and DoRA as PEFT runs them (peft/tuners/lora/layer.py, bnb.py, dora.py; read in 0.21).

Adapter weights are fp32 unless asked otherwise (`autocast_adapter_dtype`), and each adapted layer casts its input to
their dtype and keeps that copy for the gradient of A.

# N output width, K input width, R rank
"""

from __future__ import annotations

from .. import ops
from ..families.base import Model
from ..layers import Build, Linear
from ..tape import FP32, Leaf, Tensor
from ..workload import Workload
from .base import Method, adapted_linears, check_rank, method


class LoraLinear:
    """base(x) + B(A(dropout(x))) * scaling."""

    def __init__(self, layer: Linear, build: Build, workload: Workload, *, freeze_a: bool = False) -> None:
        check_rank(layer, workload.rank)
        self.layer, self.dropout = layer, workload.dropout
        self.a = trained(build, f"{layer.name}.lora_A", workload.rank, layer.in_features, frozen=freeze_a)
        self.b = trained(build, f"{layer.name}.lora_B", layer.out_features, workload.rank)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        result = self.layer.base(x)
        dtype = result.dtype
        if not self.layer.quantized:
            x = ops.cast(x, self.a.dtype)
            result = self.combined(result, x)
            return ops.cast(result, dtype)
        convert = x.tape.autocast is None
        if self.layer.clones_result:
            result = ops.copy(result)
        if convert:
            x = ops.cast(x, self.a.dtype)
        return self.combined_quantized(result, x, convert=convert)

    def combined(self, result: Tensor, x: Tensor) -> Tensor:
        """Add the update to the layer's result."""
        return ops.add(result, ops.scale(self.update(x)))

    def combined_quantized(self, result: Tensor, x: Tensor, *, convert: bool) -> Tensor:
        """Add the update as the quantized layers do: cast back before the sum."""
        output = ops.scale(self.update(x))
        if convert:
            output = ops.cast(output, result.dtype)
        return ops.add(result, output)

    def update(self, x: Tensor) -> Tensor:
        """B(A(dropout(x)))."""
        return ops.linear(ops.linear(ops.dropout(x, self.dropout), self.a), self.b)


class DoraLinear(LoraLinear):
    """LoRA with the weight's norm, a vector of magnitudes, and the norm recomputed from the whole weight in every step."""

    def __init__(self, layer: Linear, build: Build, workload: Workload) -> None:
        super().__init__(layer, build, workload)
        self.magnitude = trained(build, f"{layer.name}.lora_magnitude_vector", layer.out_features)

    def combined(self, result: Tensor, x: Tensor) -> Tensor:
        """result + DoRA's correction of it."""
        return ops.add(result, self._corrected(result, x))

    def combined_quantized(self, result: Tensor, x: Tensor, *, convert: bool) -> Tensor:
        """As `combined`, with the cast behind the sum."""
        dtype = result.dtype
        out = self.combined(result, x)
        return ops.cast(out, dtype) if convert else out

    def _corrected(self, result: Tensor, x: Tensor) -> Tensor:
        base_result: Tensor | None = result
        if self.dropout:
            x, base_result = ops.dropout(x, self.dropout), None
        lora_weight = self._lora_weight(x)
        weight = ops.cast(self.layer.dequantized(), x.dtype)
        norm = self._weight_norm(weight, lora_weight)
        magnitude = ops.cast(ops.mul(self.magnitude, norm), self.magnitude.dtype)
        lora_result = ops.linear(ops.linear(x, self.a), self.b)
        if base_result is None:
            base_result = ops.linear(x, weight)
        elif self.layer.bias is not None:
            base_result = ops.add(base_result, self.layer.bias)
        scaled_base = ops.mul(ops.shift(magnitude), base_result)
        scaled_update = ops.scale(ops.mul(magnitude, lora_result))
        return ops.add(scaled_base, scaled_update)

    def _lora_weight(self, x: Tensor) -> Tensor:
        identity = x.tape.new((self.layer.in_features, self.layer.in_features), self.a.dtype)
        product = ops.linear(ops.linear(identity, self.a), self.b)
        return ops.cast(product.view(self.layer.out_features, self.layer.in_features), x.dtype)

    def _weight_norm(self, weight: Tensor, lora_weight: Tensor) -> Tensor:
        scaled = ops.scale(lora_weight.detach())
        total = ops.add(weight, scaled)
        norm = total.tape.new((self.layer.out_features,), total.dtype)
        total.tape.launch(total.bytes)
        return norm


def trained(build: Build, name: str, *shape: int, frozen: bool = False) -> Tensor:
    """Allocate an fp32 adapter weight that trains, unless frozen."""
    with build.tape.tagged("adapters"):
        tensor = build.tape.new(shape, FP32)
    if not frozen:
        tensor.node = Leaf()
    return build.add(name, tensor)


@method
class Lora(Method):
    """Low-rank adapters beside frozen linear layers."""

    name = "lora"
    summary = "low-rank adapters beside frozen linear layers (Hu et al. 2021)"

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target an adapter."""
        for layer in adapted_linears(model, workload):
            layer.adapter = LoraLinear(layer, model.build, workload)


@method
class RankStabilizedLora(Lora):
    """LoRA scaled by alpha over the root of the rank: the same tensors."""

    name = "rslora"
    summary = "LoRA with rank-stabilised scaling (Kalajdzievski 2023): memory and time of LoRA"


@method
class LoraFa(Method):
    """LoRA with A frozen."""

    name = "lora-fa"
    summary = "LoRA with every A frozen (Zhang et al. 2023)"

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target an adapter whose A takes no gradient, so that the layer's input is not kept for it."""
        for layer in adapted_linears(model, workload):
            layer.adapter = LoraLinear(layer, model.build, workload, freeze_a=True)


@method
class Dora(Method):
    """Weight-decomposed LoRA."""

    name = "dora"
    summary = "LoRA with a trained magnitude per output (Liu et al. 2024)"

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target a DoRA adapter."""
        for layer in adapted_linears(model, workload):
            layer.adapter = DoraLinear(layer, model.build, workload)
