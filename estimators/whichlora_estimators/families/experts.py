"""Mixtures of experts: a router, the experts' stacked weights, and decoders whose blocks hold them.

All experts of a layer are one parameter [E, N, K] since transformers 5.0: bitsandbytes quantises no such thing, and PEFT's LoRA
reaches it only by name (mixture.py says what runs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .. import layers, mixture, ops, products
from ..layers import Build
from ..stack import JOINED_EXPERTS
from ..tape import INT64, Tensor
from .base import Config
from .llama import Block, GatedMlp

#: What PEFT's LoRA takes for the names that the experts' layers had before transformers 5 (its 0.19 to 0.21,
#: utils/transformers_weight_conversion.py), the router's among them.
QWEN_STACKS: Mapping[str, str] = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}


class Router:
    """Scores of all experts, their softmax in fp32, and the best of them."""

    def __init__(self, c: Config, build: Build, experts: int, *, converts: bool, shared: bool) -> None:
        self.scores = build.stack("mlp.gate.weight", experts, c.count("hidden_size"))
        self.chosen = c.count("num_experts_per_tok")
        #: Mixtral converts scores before the softmax, and leaves the weights in fp32.
        self.converts = converts
        #: Whether the chosen experts' weights are made to sum up to one.
        self.shared = shared

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores [N, E], and weights and places of the chosen experts [N, K]."""
        folding = self.scores.folding()
        scores = products.linear(x, folding.weight())
        weights, places = self.choose(scores)
        del folding
        return scores, weights, places

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and places of the chosen experts, [N, K] each."""
        probabilities = mixture.softmax_of_scores(scores, converts_first=self.converts)
        weights, places = mixture.largest(probabilities, self.chosen)
        if self.shared:
            weights = mixture.shares(weights)
        if not self.converts:
            weights = ops.cast(weights, scores.dtype)
        return weights, places


class LinearRouter(Router):
    """The router before transformers 5.0: a linear layer, which quantization packs and adapters find."""

    def __init__(self, c: Config, build: Build, experts: int, *, shared: bool, module: str) -> None:
        self.gate = build.linear(f"{module}.gate", c.count("hidden_size"), experts)
        self.chosen = c.count("num_experts_per_tok")
        self.converts, self.shared = False, shared

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores [N, E], and weights and places of the chosen experts [N, K]."""
        scores = self.gate(x)
        weights, places = self.choose(scores)
        return scores, ops.cast(weights, x.dtype), places


class Experts:
    """down(act(gate(x)) * up(x)) of each token's experts, weighted and summed."""

    def __init__(self, c: Config, build: Build, experts: int, inner: int) -> None:
        width = c.count("hidden_size")
        self.gate_up = build.stack("mlp.experts.gate_up_proj", experts, 2 * inner, width)
        self.down = build.stack("mlp.experts.down_proj", experts, width, inner)
        self.count = experts
        for stack in (self.gate_up, self.down):
            stack.idle_elements = stack.weight.numel // experts * (experts - c.count("num_experts_per_tok"))
        self.activation = layers.find_activation(c.get("hidden_act", "silu"))

    def __call__(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Map [N, D] to [N, D]."""
        down = self.down.folding()
        gate_up = self.gate_up.folding()
        return self._grouped(x, places, weights, gate_up, down)

    def _grouped(
        self, x: Tensor, places: Tensor, weights: Tensor, gate_up: layers.Folding, down: layers.Folding
    ) -> Tensor:
        routed = mixture.Routed(places, self.count)
        rows = mixture.take_rows(x, routed.source(), (*routed.pairs, x.shape[1]))
        flat = ops.reshape(weights, *routed.pairs)
        row_weights = mixture.take_rows(flat, routed.order, routed.pairs)
        routed.count()
        out = mixture.grouped(rows, gate_up.weight())
        out = self._gated(out)
        out = mixture.grouped(out, down.weight())
        weighted = ops.mul(out, ops.reshape(row_weights, *routed.pairs, 1))
        weighted = mixture.take_rows(weighted, routed.back(), weighted.shape)
        total = mixture.summed(weighted, x.shape[0])
        return ops.cast(total, x.dtype)

    def _gated(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = ops.split_last(gate_up, (half, half))
        return ops.mul(self.activation(gate), up)


class SingleExperts:
    """Experts as they were before transformers 5.0: three linear layers each, and each expert runs on its own tokens.

    Tokens are taken to spread evenly: what one expert holds at a time, and the peak of a block, depends on it.
    """

    def __init__(
        self, c: Config, build: Build, experts: int, inner: int, *, module: str, names: tuple[str, str, str]
    ) -> None:
        width = c.count("hidden_size")
        sizes = {names[0]: (width, inner), names[1]: (width, inner), names[2]: (inner, width)}
        self.layers = [
            {name: build.linear(f"{module}.experts.{index}.{name}", *sizes[name]) for name in sorted(names, key=_order)}
            for index in range(experts)
        ]
        self.gate, self.up, self.down = names
        self.activation = layers.find_activation(c.get("hidden_act", "silu"))

    def __call__(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Map [N, D] to [N, D]."""
        tape = x.tape
        total = tape.new(x.shape, x.dtype)
        mask = tape.new((*places.shape, len(self.layers)), INT64)
        for expert, count in zip(self.layers, mixture.rows_by_expert(places.numel, len(self.layers)), strict=True):
            if not count:
                continue
            index = tape.new((2, count), INT64)
            rows = mixture.take_rows(x, index, (count, x.shape[1]))
            out = self._run(expert, rows)
            out = ops.mul(out, mixture.take_rows(weights, index, (count, 1)))
            total = mixture.add_rows(total, ops.cast(out, x.dtype), index)
        del mask
        return total

    def _run(self, expert: dict[str, layers.Linear], x: Tensor) -> Tensor:
        gated = self.activation(expert[self.gate](x))
        return expert[self.down](ops.mul(gated, expert[self.up](x)))


def _order(name: str) -> str:
    """Sort Mixtral's names by their number, Qwen's as they stand: gate, up, down."""
    return {"gate_proj": "1", "up_proj": "2", "down_proj": "3"}.get(name, name)


class Mixture:
    """A router and its experts, with Qwen 2's expert for all tokens where there is one."""

    def __init__(self, c: Config, build: Build) -> None:
        self.router, self.experts = self.make(c, build)

    def make(self, c: Config, build: Build) -> tuple[Router, Experts | SingleExperts]:
        """Make router and experts in the order of Qwen 3."""
        if not build.tape.stack.does(JOINED_EXPERTS):
            return self.make_single(c, build)
        experts = self.make_experts(c, build)
        return self.make_router(c, build), experts

    def make_single(self, c: Config, build: Build) -> tuple[Router, SingleExperts]:
        """Make Qwen's router and experts of before transformers 5.0."""
        count, inner = c.count("num_experts"), c.count("moe_intermediate_size")
        router = LinearRouter(c, build, count, shared=c.flag("norm_topk_prob"), module="mlp")
        names = "gate_proj", "up_proj", "down_proj"
        return router, SingleExperts(c, build, count, inner, module="mlp", names=names)

    def make_router(self, c: Config, build: Build) -> Router:
        """Make Qwen's router."""
        return Router(c, build, c.count("num_experts"), converts=False, shared=c.flag("norm_topk_prob"))

    def make_experts(self, c: Config, build: Build) -> Experts:
        """Make Qwen's experts."""
        return Experts(c, build, c.count("num_experts"), c.count("moe_intermediate_size"))

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        flat = ops.reshape(x, x.numel // x.shape[-1], x.shape[-1])
        scores, weights, places = self.router(flat)
        out = self.experts(flat, places, weights)
        del scores
        return ops.reshape(out, *x.shape)


class SharedMixture(Mixture):
    """Qwen 2: one more expert takes all tokens, weighted by a gate of its own."""

    def make(self, c: Config, build: Build) -> tuple[Router, Experts | SingleExperts]:
        """Make the router first, and the shared expert behind the others."""
        made: tuple[Router, Experts | SingleExperts]
        if build.tape.stack.does(JOINED_EXPERTS):
            made = self.make_router(c, build), self.make_experts(c, build)
        else:
            made = self.make_single(c, build)
        self.shared = GatedMlp(c, build, name="mlp.shared_expert", inner_key="shared_expert_intermediate_size")
        self.gate = build.linear("mlp.shared_expert_gate", c.count("hidden_size"), 1)
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        flat = ops.reshape(x, x.numel // x.shape[-1], x.shape[-1])
        shared = self.shared(flat)
        scores, weights, places = self.router(flat)
        out = self.experts(flat, places, weights)
        shared = ops.mul(ops.activation_of_result(self.gate(flat)), shared)
        out = ops.add(out, shared)
        del scores
        return ops.reshape(out, *x.shape)


class SparseBlock(Block):
    """A Llama block with experts, in the layers that have them."""

    mixture: ClassVar[type[Mixture]] = Mixture

    def make_mlp(self, c: Config, build: Build, index: int) -> Callable[[Tensor], Tensor]:
        """Make experts in every `decoder_sparse_step`th layer but those of `mlp_only_layers`."""
        return self.mixture(c, build) if is_sparse(c, index) else GatedMlp(c, build)


def is_sparse(c: Config, index: int) -> bool:
    """Say whether a layer has experts."""
    dense: Any = c.get("mlp_only_layers") or ()
    return (index + 1) % int(c.get("decoder_sparse_step", 1)) == 0 and index not in dense


def sparse_kinds(c: Config, kinds: list[object]) -> list[object]:
    """Tell layers with experts from those without."""
    return [(kind, is_sparse(c, index)) for index, kind in enumerate(kinds)]
