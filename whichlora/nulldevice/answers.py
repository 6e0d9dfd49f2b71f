"""Teach Transformers, on the null device, what it would have read back from a real one.

A process on the null device reads zeros, "yes, all of them" and "no, none of them". Two questions need more than that:

- has generation reached its length limit? Here it ends there, and not before: no sequence meets its end token;
- how many tokens does each expert of a mixture get? Here all get as many (`even`), or as few as can be get all of them
  (`skewed`), as the environment variable NULLCUDA_ROUTING says.

Only the standard library: environments that lack the rest of this package load this file as whichlora_null.answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import control
from .imports import patch_on_import

ROUTINGS = ("even", "skewed")
_at_limit = False


def install() -> None:
    """Patch Transformers now or, where it is not imported yet, as soon as it is; does nothing without a null device."""
    if not control.is_null_device():
        return
    patch_on_import(_PATCHES)


def tokens_per_expert(tokens: int, experts_per_token: int, experts: int, *, routing: str = "even") -> list[int]:
    """Return how many tokens each expert gets, for those that get any; the sum is tokens x experts per token."""
    if routing == "skewed":
        return [tokens] * experts_per_token
    share, rest = divmod(tokens * experts_per_token, experts)
    counts = [share + (expert < rest) for expert in range(experts)]
    return [count for count in counts if count]


def _patch_stopping_criteria(module: ModuleType) -> None:
    """Answer the next "has everybody finished?" with yes once the length limit is reached."""
    ask = module.MaxLengthCriteria.__call__

    @functools.wraps(ask)
    def answer(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        global _at_limit
        result = ask(self, input_ids, *args, **kwargs)
        _at_limit = input_ids.shape[1] >= self.max_length
        if _at_limit:
            control.answer_bool(True)
        return result

    module.MaxLengthCriteria.__call__ = answer


def _patch_generation(module: ModuleType) -> None:
    """Answer beam search, which asks the other way round: whether anybody is unfinished."""
    name = "_beam_search_has_unfinished_sequences"
    ask = getattr(module.GenerationMixin, name, None)
    if ask is None:
        return

    @functools.wraps(ask)
    def answer(*args: Any, **kwargs: Any) -> Any:
        result = ask(*args, **kwargs)
        control.answer_bool(not _at_limit)
        return result

    is_static = isinstance(vars(module.GenerationMixin).get(name), staticmethod)
    setattr(module.GenerationMixin, name, staticmethod(answer) if is_static else answer)


def _patch_experts(module: ModuleType) -> None:
    """Answer the loop over experts, which asks first how many are hit and then how many tokens each of them got."""
    choose = module.ExpertsInterface.get_interface

    @functools.wraps(choose)
    def answer(self: Any, experts_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        chosen: Callable[..., Any] = choose(self, experts_implementation, default)
        return _with_routing(chosen) if chosen is default else chosen

    module.ExpertsInterface.get_interface = answer


def _with_routing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def routed(experts: Any, hidden_states: Any, top_k_index: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, experts_per_token = top_k_index.shape
        routing = os.environ.get("NULLCUDA_ROUTING", "even")
        counts = tokens_per_expert(tokens, experts_per_token, experts.num_experts, routing=routing)
        control.answer_counts([len(counts), *counts])
        return forward(experts, hidden_states, top_k_index, *args, **kwargs)

    return routed


def _patch_blocks(module: ModuleType) -> None:
    """Answer the loop of blocks whose experts are layers of their own (Transformers before 5.0)."""
    for name in ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"):
        if name in vars(module):
            _patch_block(vars(module)[name])


def _patch_block(block: Any) -> None:
    forward = block.forward
    # from 4.52 on it asks first how many experts are hit
    asks_first = any(word.startswith("expert_hit") for word in forward.__code__.co_varnames)

    @functools.wraps(forward)
    def routed(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.experts, "__getitem__"):
            tokens, routing = hidden_states.shape[:-1].numel(), os.environ.get("NULLCUDA_ROUTING", "even")
            counts = tokens_per_expert(tokens, self.top_k, self.num_experts, routing=routing)
            rest = [0] * (self.num_experts - len(counts))
            control.answer_counts([len(counts), *counts] if asks_first else [*counts, *rest])
        return forward(self, hidden_states, *args, **kwargs)

    block.forward = routed


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.generation.stopping_criteria": _patch_stopping_criteria,
    "transformers.generation.utils": _patch_generation,
    "transformers.integrations.moe": _patch_experts,
    "transformers.models.mixtral.modeling_mixtral": _patch_blocks,
    "transformers.models.qwen2_moe.modeling_qwen2_moe": _patch_blocks,
    "transformers.models.qwen3_moe.modeling_qwen3_moe": _patch_blocks,
}
