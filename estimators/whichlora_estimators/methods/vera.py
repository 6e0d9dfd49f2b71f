"""VeRA as PEFT runs it (peft/tuners/vera/layer.py, model.py; read in 0.21): one frozen pair A, B for all layers.

Layers take as many columns of A and rows of B as they are wide, as views, and train one vector behind each.

# N output width, K input width, R rank
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops, products
from ..families.base import Model
from ..layers import Build, Linear
from ..tape import Dtype, Tensor
from ..workload import Workload
from .base import Method, adapter_dtype, method, trained, upcast
from .targets import adapted_linears

#: What PEFT adapts by default, by model_type, where that differs from LoRA (peft/utils/constants.py).
TARGETS: Mapping[str, tuple[str, ...]] = {"phi": ("q_proj", "v_proj")}


class Projections:
    """The frozen pair: A [R, widest K] and B [widest N, R], made with the first layer."""

    def __init__(self, layers: list[Linear], rank: int) -> None:
        self.rank = rank
        self.widest_in = max(layer.in_features for layer in layers)
        self.widest_out = max(layer.out_features for layer in layers)
        self.made: tuple[Tensor, Tensor] | None = None

    def make(self, build: Build, dtype: Dtype) -> tuple[Tensor, Tensor]:
        """Return the pair, allocating it the first time."""
        if self.made is None:
            a = trained(build, "vera_A", self.rank, self.widest_in, dtype=dtype, frozen=True)
            self.made = a, trained(build, "vera_B", self.widest_out, self.rank, dtype=dtype, frozen=True)
        return self.made


class VeraLinear:
    """base(x) + b * B(d * A(dropout(x)))."""

    def __init__(self, layer: Linear, build: Build, workload: Workload, shared: Projections) -> None:
        self.layer, self.dropout, dtype = layer, workload.dropout, adapter_dtype(layer)
        self.b = trained(build, f"{layer.name}.vera_lambda_b", layer.out_features, dtype=dtype)
        self.d = trained(build, f"{layer.name}.vera_lambda_d", workload.rank, dtype=dtype)
        self.pair = shared.make(build, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        given = x.dtype
        result = self.layer.base(x)
        dtype = result.dtype
        if self.layer.clones_result:
            result = ops.copy(result)
        a, b = self.pair
        columns = Tensor(a.tape, a.storage, (a.shape[0], self.layer.in_features), a.dtype)
        rows = Tensor(b.tape, b.storage, (self.layer.out_features, b.shape[1]), b.dtype)
        x = ops.cast(x, self.d.dtype)
        result = ops.add(
            result,
            ops.mul(
                self.b, products.linear(ops.mul(self.d, products.linear(ops.dropout(x, self.dropout), columns)), rows)
            ),
        )
        result = ops.cast(result, dtype)
        return ops.cast(result, given)


@method
class Vera(Method):
    """Vectors behind random projections that all layers share."""

    name = "vera"
    summary = "trained vectors behind a frozen random pair that all layers share (Kopiczko et al. 2024)"

    allows_wide_ranks = True
    has_layers = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Give each target its vectors."""
        layers = adapted_linears(model, workload, default=TARGETS.get(str(model.config.get("model_type"))))
        shared = Projections(layers, workload.rank)
        with upcast(model.build):
            for layer in layers:
                layer.adapter = VeraLinear(layer, model.build, workload, shared)
