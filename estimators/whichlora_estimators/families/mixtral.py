"""Mixtral: Mistral with eight experts in place of each MLP (transformers/models/mixtral, 5.23)."""

from __future__ import annotations

from collections.abc import Callable

from ..layers import Build
from ..stack import JOINED_EXPERTS
from ..tape import Tensor
from .base import Config, Context, Positions, family
from .experts import Experts, LinearRouter, Mixture, Router, SingleExperts, SparseBlock
from .llama import Mistral


class MixtralMixture(Mixture):
    """The router's weights stay in fp32 and always sum up to one."""

    def make(self, c: Config, build: Build) -> tuple[Router, Experts | SingleExperts]:
        """Make the router, then the experts."""
        count = c.count("num_local_experts")
        if not build.tape.stack.does(JOINED_EXPERTS):
            module = "block_sparse_moe"
            single = LinearRouter(c, build, count, shared=True, module=module)
            names = "w1", "w3", "w2"
            return single, SingleExperts(c, build, count, c.count("intermediate_size"), module=module, names=names)
        router = Router(c, build, count, converts=True, shared=True)
        return router, Experts(c, build, count, c.count("intermediate_size"))


class MixtralBlock(SparseBlock):
    """A block whose MLP is a mixture."""

    mixture = MixtralMixture


@family("mixtral")
class Mixtral(Mistral):
    """Mistral without a window, unless the config has one."""

    defaults = {
        **Mistral.defaults,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    aliases = {"num_experts": "num_local_experts"}
    stack_names = {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    }

    def block(self, c: Config, build: Build, index: int) -> Callable[[Tensor, Positions, Context], Tensor]:
        """Make one layer."""
        return MixtralBlock(c, build, index, norm=self.norm)
