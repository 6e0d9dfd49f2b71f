"""LoRA, rank-stabilised LoRA, LoRA-FA and DoRA as PEFT runs them (peft/tuners/lora/layer.py, bnb.py, dora.py; read in 0.21).

Adapter weights are fp32 unless asked otherwise (`autocast_adapter_dtype`), and each adapted layer casts its input to
their dtype and keeps that copy for the gradient of A.

# N output width, K input width, R rank
"""

from __future__ import annotations

from .. import ops, products
from ..families.base import Model
from ..layers import Build, Embedding, Linear
from ..reductions import column_sum_bytes
from ..stack import DORA_REUSES_RESULT, FP32_ADAPTERS
from ..tape import FP16, FP32, UINT8, Dtype, Tensor
from ..workload import Workload
from .base import Method, adapter_dtype, method, trained, upcast
from .embeddings import DoraEmbedding, LoraEmbedding
from .parameters import wrap_parameters
from .replication import replicate_layers
from .stacks import LoraStack, lora_targets, without_default
from .targets import adapted_embeddings, rank_of, refuse_bias
from .tying import shared_factors, tied_targets


class LoraLinear:
    """base(x) + B(A(dropout(x))) * scaling."""

    def __init__(
        self,
        layer: Linear,
        build: Build,
        workload: Workload,
        *,
        freeze_a: bool = False,
        source: Embedding | None = None,
    ) -> None:
        rank = rank_of(layer, workload)
        self.layer, self.dropout, dtype = layer, workload.dropout, adapter_dtype(layer)
        if layer.quantized and not build.tape.stack.does(FP32_ADAPTERS):
            dtype = FP32
        if source is None:
            self.a = trained(build, f"{layer.name}.lora_A", rank, layer.in_features, dtype=dtype, frozen=freeze_a)
            self.b = trained(build, f"{layer.name}.lora_B", layer.out_features, rank, dtype=dtype)
        else:
            assert isinstance(source.adapter, LoraEmbedding)
            self.a, self.b = shared_factors(build, layer.name, source.adapter.a, source.adapter.b, freeze_a=freeze_a)
        self.bias: Tensor | None = None
        if workload.lora_bias:
            self.bias = trained(build, f"{layer.name}.lora_B.bias", layer.out_features, dtype=dtype)

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
        return products.linear(products.linear(ops.dropout(x, self.dropout), self.a), self.b, self.bias)


class DoraLinear(LoraLinear):
    """LoRA with the weight's norm, a vector of magnitudes, and the norm recomputed from the whole weight in every step."""

    def __init__(self, layer: Linear, build: Build, workload: Workload, *, source: Embedding | None = None) -> None:
        super().__init__(layer, build, workload, source=source)
        dtype = self._start()
        self.magnitude = trained(build, f"{layer.name}.lora_magnitude_vector", layer.out_features, dtype=dtype)

    def _start(self) -> Dtype:
        """Compute the first magnitudes, from the weight and B A: the first product on the device."""
        a, b, new = self.a, self.b, self.a.tape.new
        if a.dtype is FP16:
            a, b = ops.cast(a, FP32), ops.cast(b, FP32)
        copied = self.layer.copy_packed()
        weight = self.layer.dequantized()
        product = new((self.layer.out_features, self.layer.in_features), a.dtype)
        products.matmul_kernel(product, 1, self.layer.out_features, self.layer.in_features, a.shape[0])
        product = ops.cast(product, self.a.dtype)
        norm = self._weight_norm(weight, product)
        del copied
        return norm.dtype

    def combined(self, result: Tensor, x: Tensor) -> Tensor:
        """Add DoRA's correction to the layer's result."""
        base_result: Tensor | None = result
        if self.dropout or not x.tape.stack.does(DORA_REUSES_RESULT):
            x, base_result = ops.dropout(x, self.dropout), None
        return ops.add(result, self._corrected(x, base_result))

    def combined_quantized(self, result: Tensor, x: Tensor, *, convert: bool) -> Tensor:
        """As `combined`, with the cast behind the sum."""
        dtype = result.dtype
        result = self.combined(result, x)
        return ops.cast(result, dtype) if convert else result

    def _corrected(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        """(m - 1) base(x) + m B(A(x)) * scaling, where m is the magnitude over the weight's norm."""
        lora_weight = self._lora_weight()
        lora_weight = ops.cast(lora_weight, x.dtype)
        weight = self.layer.dequantized()
        weight = ops.cast(weight, x.dtype)
        norm = self._weight_norm(weight, lora_weight.detach())
        magnitude = ops.mul(self.magnitude, norm)
        lora_result = products.linear(products.linear(x, self.a), self.b)
        if base_result is None:
            base_result = products.linear(x, weight)
        elif self.layer.bias is not None:
            base_result = ops.add(base_result, self.layer.bias)
        return ops.add(
            ops.mul(ops.shift(magnitude), base_result),
            ops.scale(ops.mul(magnitude, lora_result)),
        )

    def _lora_weight(self) -> Tensor:
        """B(A(identity)), transposed."""
        width = self.layer.in_features
        identity = self.a.tape.new((width, width), self.a.dtype)
        product = products.linear(products.linear(identity, self.a), self.b)
        return products.transpose(product)

    def _weight_norm(self, weight: Tensor, lora_weight: Tensor) -> Tensor:
        weight = ops.add(weight, ops.scale(lora_weight))
        weight.tape.launch(weight.bytes)
        norm = weight.tape.new((self.layer.out_features,), weight.dtype)
        if self.layer.transposed:  # summed over the first dimension in memory
            shape = self.layer.in_features, self.layer.out_features
            weight.tape.new((column_sum_bytes(*shape, card=weight.tape.card),), UINT8)
        return norm


def _adapt(model: Model, workload: Workload, *, freeze_a: bool = False) -> None:
    replicate_layers(model, workload)
    workload, tie = tied_targets(model, without_default(model, workload))
    linears, stacks = lora_targets(model, workload)
    tables = [*adapted_embeddings(model, workload), *tie.tables]
    if workload.lora_bias:
        refuse_bias(tables)
    with upcast(model.build):
        for table in tables:
            table.adapter = LoraEmbedding(table, model.build, workload)
        for layer in linears:
            layer.adapter = LoraLinear(layer, model.build, workload, freeze_a=freeze_a)
        for stack, rank in stacks:
            stack.adapter = LoraStack(stack, model.build, rank, freeze_a=freeze_a)
        wrap_parameters(model, workload, freeze_a=freeze_a)
        for head in tie.heads:
            head.adapter = LoraLinear(head, model.build, workload, freeze_a=freeze_a, source=tie.source)


@method
class Lora(Method):
    """Low-rank adapters beside frozen linear layers."""

    name = "lora"
    summary = "low-rank adapters beside frozen linear layers (Hu et al. 2021)"
    has_rank_pattern = has_exclusions = has_layers = has_tokens = has_adapter_bias = True
    has_tying = has_replication = has_parameters = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target an adapter."""
        _adapt(model, workload)


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
    has_rank_pattern = has_exclusions = has_layers = has_tokens = has_adapter_bias = True
    has_tying = has_replication = has_parameters = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target an adapter whose A takes no gradient, so that the layer's input is not kept for it."""
        _adapt(model, workload, freeze_a=True)


@method
class Dora(Method):
    """Weight-decomposed LoRA."""

    name = "dora"
    summary = "LoRA with a trained magnitude per output (Liu et al. 2024)"
    has_rank_pattern = has_exclusions = has_layers = has_tokens = has_tying = has_replication = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target a DoRA adapter."""
        replicate_layers(model, workload)
        workload, tie = tied_targets(model, workload)
        linears, tables = lora_targets(model, workload)[0], [*adapted_embeddings(model, workload), *tie.tables]
        with upcast(model.build):
            for table in tables:
                table.adapter = DoraEmbedding(table, model.build, workload)
            for layer in linears:
                layer.adapter = DoraLinear(layer, model.build, workload)
            for head in tie.heads:
                head.adapter = DoraLinear(head, model.build, workload, source=tie.source)
