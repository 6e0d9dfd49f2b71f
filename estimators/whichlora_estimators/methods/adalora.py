"""AdaLoRA as PEFT runs it (peft/tuners/adalora/layer.py, bnb.py, model.py; read in 0.21).

B (A ∘ E) in place of B A, where E scales the rows of A, and a penalty on how far A and B are from orthogonal: backward
begins with it, so that every adapter's gradient lives from then on. Ranks are taken to stay as they began.

# N output width, K input width, R rank
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .. import ops, products
from ..families.base import Model
from ..layers import Build, Linear
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, adapter_dtype, method, trained, upcast
from .replication import replicate_layers
from .targets import adapted_linears
from .tying import tied_targets

#: What PEFT adapts by default, by model_type, where that differs from LoRA (peft/utils/constants.py).
TARGETS: Mapping[str, tuple[str, ...]] = {
    "falcon": (),
    "mistral": (),
    "mixtral": (),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "phi": (),
    "roberta": ("query", "key", "value", "dense"),
    "stablelm": (),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "xlm-roberta": (),
}


class AdaLoraLinear:
    """base(x) + B((A * E) dropout(x)) * scaling / rank."""

    def __init__(self, layer: Linear, build: Build, workload: Workload) -> None:
        self.layer, self.dropout = layer, workload.dropout
        add, rank = partial(trained, build, dtype=adapter_dtype(layer)), workload.rank
        self.a = add(f"{layer.name}.lora_A", rank, layer.in_features)
        self.b = add(f"{layer.name}.lora_B", layer.out_features, rank)
        self.e = add(f"{layer.name}.lora_E", rank, 1)
        self.rank = add(f"{layer.name}.ranknum", 1)  # moving it to the device makes it one that trains

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        if self.layer.quantized:
            return self._quantized(x)
        result = self.layer.base(x)
        rank = ops.shift(self.rank)
        x = ops.cast(x, self.a.dtype)
        of_view = self.layer.result_is_view(len(x.shape))
        return ops.add_into(result, ops.divide(ops.scale(self._update(x)), rank), of_view=of_view)

    def _quantized(self, x: Tensor) -> Tensor:
        """Add to the result of a quantized layer: in place, where that was cloned."""
        result = self.layer.base(x)
        clones, convert = self.layer.clones_result, x.tape.autocast is None
        if clones:
            result = ops.copy(result)
        rank = ops.shift(self.rank)
        if convert:
            x = ops.cast(x, self.a.dtype)
        output = self._update(x)
        if convert:
            output = ops.cast(output, result.dtype)
        output = ops.divide(ops.scale(output), rank)
        return ops.add_into(result, output) if clones else ops.add(result, output)

    def _update(self, x: Tensor) -> Tensor:
        x = ops.dropout(x, self.dropout)
        weight = ops.mul(self.a, self.e)
        low = products.linear(x, weight)
        del x, weight
        return products.linear(low, products.turned(self.b))


def _penalized(adapters: list[AdaLoraLinear], loss: Tensor) -> Tensor:
    """Add the mean distance of A Aᵀ and Bᵀ B from the identity."""
    distances, product, identity = [], None, None
    for adapter in adapters:
        for factor in (adapter.a, adapter.b):
            turned = products.transpose(factor)
            left, right = (factor, turned) if factor is adapter.a else (turned, factor)
            product = products.matmul(left, right)  # this and the identity live until the next ones are there
            identity = ops.empty_like(product)
            distances.append(_norm(ops.shift(product)))
    del product, identity
    total = loss.tape.new((1,), FP32)
    count = 1 + len(distances)
    loss.tape.record(total, (loss, *distances), (), lambda g: (g,) * count)
    return total


def _norm(x: Tensor) -> Tensor:
    """Return the root of the sum of squares, which saves what it sums."""
    out = x.tape.new((1,), x.dtype)

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor]:
        share = ops.empty_like(x)  # x over the norm
        return (ops.empty_like(share),)

    x.tape.record(out, (x,), (x,), backward)
    return out


@method
class AdaLora(Method):
    """Low-rank adapters as singular value decompositions."""

    name = "adalora"
    summary = "LoRA as singular values that training may drop (Zhang et al. 2023); ranks taken to stay"

    has_exclusions = has_layers = has_tokens = has_tying = has_replication = True
    has_adapter_bias = True  # which PEFT takes and makes nothing of

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target an adapter, and the loss its penalty."""
        replicate_layers(model, workload)
        workload, _ = tied_targets(model, workload)  # puts embeddings among them, which are refused
        with upcast(model.build):
            linears = adapted_linears(model, workload, default=TARGETS.get(str(model.config.get("model_type"))))
            adapters = [AdaLoraLinear(layer, model.build, workload) for layer in linears]
        for adapter in adapters:
            adapter.layer.adapter = adapter
        if workload.task != "masked-lm":  # PEFT knows no such task, and calls the model inside of AdaLoRA's
            model.build.penalties.append(partial(_penalized, adapters))
