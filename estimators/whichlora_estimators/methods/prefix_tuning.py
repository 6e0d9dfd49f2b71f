"""Prefix tuning as PEFT runs it (peft/tuners/prefix_tuning/model.py, get_prompt in peft_model.py; read in 0.21).

One fp32 row for each virtual token holds its keys and values for all layers; a pass begins with a cache made of them.

# B batch, P virtual tokens, L layers, K key-value heads, E head width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import ops
from ..errors import Unsupported
from ..families.base import Cache, Config, Context, Decoder, Model
from ..tape import FP32, Tensor, View
from ..workload import Workload
from .base import Method, method, trained
from .prompts import VIRTUAL_TOKENS, decoder_of, longer_masks, token_numbers


class Prefix:
    """A table [P, L * 2 * K * E]."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.layers = model, len(model.blocks)
        self.heads, self.head_dim = key_value_shape(model.config)
        width = self.layers * 2 * self.heads * self.head_dim
        self.table = trained(model.build, "prompt_encoder.embedding", VIRTUAL_TOKENS, width, dtype=FP32)

    @contextmanager
    def __call__(self, inputs: Sequence[Tensor], context: Context) -> Iterator[Sequence[Tensor]]:
        """Yield the inputs with a longer mask, the cache in the context."""
        ids, labels, *masks = inputs
        masks = longer_masks(masks)
        context.cache = self._cache(ids.shape[0])
        try:
            yield [ids, labels, *masks]
        finally:
            context.cache = None

    def _cache(self, batch: int) -> Cache:
        states = ops.embedding(token_numbers(self.model, batch), self.table)
        states = ops.cast(states, self.model.embed.dtype)
        cache = Cache()
        for index, pair in enumerate(self._layers(states)):
            keys, values = _unbound(pair)
            cache.update(index, keys, values)
        return cache

    def _layers(self, states: Tensor) -> list[Tensor]:
        """View [B, P, L * 2 * K * E] as L tensors [2, B, K, P, E]; backward joins their gradients, then reorders them."""
        shape = (2, states.shape[0], self.heads, VIRTUAL_TOKENS, self.head_dim)
        views = [Tensor(states.tape, states.storage, shape, states.dtype) for _ in range(self.layers)]
        whole = states.shape

        def backward(grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
            tape, dtype = states_tape, next(g.dtype for g in grads if g is not None)
            joined = tape.new(whole, dtype)
            tape.launch(2 * joined.bytes)
            return (ops.copy(joined),)

        states_tape = states.tape
        node = states.tape.record(views[0], (states,), (), backward, outputs=self.layers)
        for nr, view in enumerate(views):
            view.node, view.nr = node, nr
        return views


def _unbound(pair: Tensor) -> tuple[Tensor, Tensor]:
    """View [2, ...] as two tensors; backward stacks their gradients."""
    first, second = (Tensor(pair.tape, pair.storage, pair.shape[1:], pair.dtype) for _ in range(2))
    shape = pair.shape

    def backward(grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        given = next(g for g in grads if g is not None)
        stacked = given.tape.new(shape, given.dtype)
        given.tape.launch(2 * stacked.bytes)
        return (View(stacked, shape),)

    node = pair.tape.record(first, (pair,), (), backward, outputs=2)
    second.node, second.nr = node, 1
    return first, second


def key_value_shape(c: Config) -> tuple[int, int]:
    """Return how many heads of which width keys and values have, as PEFT reads it from a config (peft/utils/other.py)."""
    heads = int(c.get("num_attention_heads") or c.count("n_head"))
    width = int(c.get("hidden_size") or c.count("n_embd"))
    return int(c.get("num_key_value_heads") or heads), int(c.get("head_dim") or width // heads)


@method
class PrefixTuning(Method):
    """Learned keys and values before those of the input."""

    name = "prefix-tuning"
    summary = f"learned keys and values of {VIRTUAL_TOKENS} tokens in every layer (Li & Liang 2021)"
    has_rank = False

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table."""
        if workload.checkpointing:
            todo = "Set checkpointing to false: PEFT refuses it, since checkpointed layers use no cache."
            raise Unsupported("prefix tuning with checkpointing", value=True, todo=todo)
        model.prompt = Prefix(decoder_of(model, self.name))
