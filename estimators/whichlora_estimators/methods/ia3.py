"""(IA)³ as PEFT runs it (peft/tuners/ia3/layer.py, bnb.py; utils/constants.py; read in 0.21).

One vector a layer: keys and values (as PEFT's defaults have it) are scaled behind the layer, the last layer of the MLP
before it. Where a workload names no layers, and for all linear ones, PEFT's own targets are taken.

# N output width, K input width
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..errors import BadValue
from ..families.base import Model
from ..layers import Build, Linear
from ..tape import FP32, Tensor
from ..workload import Workload
from .base import Method, adapter_dtype, method, trained, upcast
from .targets import adapted_linears

#: What PEFT adapts by model_type, and which of it is scaled on the way in.
TARGETS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "bert": (("key", "value", "output.dense"), "output.dense"),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), "mlp.dense_4h_to_h"),
    "falcon": (("query_key_value", "dense_4h_to_h"), "dense_4h_to_h"),
    "gemma": (("q_proj", "v_proj", "down_proj"), "down_proj"),
    "gemma2": (("q_proj", "v_proj", "down_proj"), "down_proj"),
    "gemma3_text": (("q_proj", "v_proj", "down_proj"), "down_proj"),
    "gpt2": (("c_attn", "mlp.c_proj"), "mlp.c_proj"),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), "dense_4h_to_h"),
    "llama": (("k_proj", "v_proj", "down_proj"), "down_proj"),
    "mistral": (("k_proj", "v_proj", "down_proj"), "down_proj"),
    "mixtral": (("k_proj", "v_proj", "w2"), "w2"),
    "mt5": (("k", "v", "wi_1"), ""),
    "opt": (("q_proj", "k_proj", "fc2"), "fc2"),
    "phi": (("q_proj", "v_proj", "fc2"), "fc2"),
    "qwen2": (("q_proj", "v_proj", "down_proj"), "down_proj"),
    "qwen3": (("q_proj", "v_proj", "down_proj"), "down_proj"),
    "roberta": (("key", "value", "output.dense"), "output.dense"),
    "t5": (("k", "v", "wo"), "wo"),
}


class Ia3Linear:
    """base(x) * l, or base(x * l) where the layer ends an MLP."""

    def __init__(self, layer: Linear, build: Build, *, feedforward: bool) -> None:
        self.layer, self.feedforward = layer, feedforward
        shape = (1, layer.in_features) if feedforward else (layer.out_features, 1)
        self.vector = trained(build, f"{layer.name}.ia3_l", *shape, dtype=adapter_dtype(layer))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        scaling = ops.scale(self.vector.view(self.vector.numel))  # 1 times the vector
        if self.layer.quantized:
            return self._quantized(x, scaling)
        if not self.feedforward:
            result = self.layer.base(x)
            return ops.cast(ops.mul(result, scaling), result.dtype)
        dtype = x.dtype
        x = ops.cast(x, self.vector.dtype)
        scaled = ops.cast(ops.mul(x, scaling), dtype)
        return self.layer.base(scaled)

    def _quantized(self, x: Tensor, scaling: Tensor) -> Tensor:
        """Scale around a quantized layer, whose results 4 bit copies."""
        convert = x.tape.autocast is None and x.dtype is not FP32
        if convert:
            x = ops.cast(x, FP32)
        result = self.layer.base(ops.mul(x, scaling) if self.feedforward else x)
        dtype = result.dtype
        if not self.feedforward:
            result = ops.mul(result, scaling)
        if self.layer.clones_result:
            result = ops.copy(result)
        return ops.cast(result, dtype) if convert else result


@method
class Ia3(Method):
    """Learned scales of keys, values and MLPs."""

    name = "ia3"
    summary = "learned scales of keys, values and MLP (Liu et al. 2022), at PEFT's default layers"
    has_rank = False
    has_bias = False
    has_exclusions = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each of PEFT's default targets a vector."""
        kind = str(model.config.get("model_type"))
        if kind not in TARGETS:
            todo = f"PEFT knows no feed-forward layers of others than: {', '.join(sorted(TARGETS))}."
            raise BadValue("(IA)³ for this architecture", value=kind, todo=todo)
        names, feedforward = TARGETS[kind]
        if workload.targets == "all-linear":
            workload = workload.with_(targets=names)
        with upcast(model.build):
            for layer in adapted_linears(model, workload, default=names):
                scales_input = bool(feedforward) and layer.name.endswith(feedforward)
                layer.adapter = Ia3Linear(layer, model.build, feedforward=scales_input)
