"""Prefix tuning as PEFT runs it (peft/tuners/prefix_tuning/model.py, get_prompt in peft_model.py; read in 0.21).

One fp32 row for each virtual token holds its keys and values for all layers, or an MLP makes them of a narrow one; a pass begins
with a cache made of them.

# B batch, P virtual tokens, L layers, K key-value heads, E head width, H width of the MLP inside
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import ops
from ..errors import Unsupported
from ..families.base import Config, Context, Decoder, Model
from ..families.caches import Cache
from ..layers import Linear
from ..tape import FP32, INT64, Tensor
from ..workload import Workload
from .base import Method, method, trained
from .prompts import check_task, encoder_layer, longer_masks

#: Models whose output names no cache where the config says `use_cache: false`; that of others holds on to the given one.
WITHOUT_CACHE = ("gemma", "gpt2", "mistral", "phi3", "qwen2", "qwen3", "starcoder2")


class Prefix:
    """A table [P, L * 2 * K * E]; projected, one [P, K * E] and an MLP K * E to H to L * 2 * K * E, H being K * E unless told."""

    #: Tasks that PEFT runs it for.
    tasks = ("causal", "seq-cls", "token-cls", "seq2seq")

    def __init__(self, model: Model, workload: Workload) -> None:
        check_task(model, workload.method, self.tasks)
        self.model, self.layers, self.virtual = model, model.config.count(model.layers_key), workload.num_virtual_tokens
        self.heads, self.head_dim = key_value_shape(model.config)
        #: Whether what the model returns holds on to the cache.
        kind = model.config.get("model_type")
        self.returned = model.build.task in ("causal", "seq2seq") or (
            model.build.task == "seq-cls" and isinstance(model, Decoder)
        )
        self.returned &= kind not in WITHOUT_CACHE
        #: Gemma's cache is made for its config; others from slices of the prefix, without windows.
        self.of_config = str(model.config.get("model_type")).startswith(("gemma2", "gemma3_text"))
        narrow = self.heads * self.head_dim
        whole, inner, build = self.layers * 2 * narrow, workload.encoder_hidden_size or narrow, model.build
        width = narrow if workload.prefix_projection else whole
        self.table = trained(build, "prompt_encoder.embedding", self.virtual, width, dtype=FP32)
        self.projection: tuple[Linear, Linear] | None = None
        if workload.prefix_projection:
            first = encoder_layer(build, "transform.0", narrow, inner)
            self.projection = first, encoder_layer(build, "transform.2", inner, whole)

    @contextmanager
    def __call__(self, inputs: Sequence[Tensor], context: Context) -> Iterator[Sequence[Tensor]]:
        """Yield the inputs with a longer mask, the cache in the context."""
        ids, labels, *masks = inputs
        masks = longer_masks(masks, self.virtual)
        context.cache = self._cache(ids.shape[0])
        yield [ids, labels, *masks]
        if not self.returned:
            context.cache = None

    def _encoded(self, batch: int) -> Tensor:
        """Look the virtual tokens up, [B, P, L * 2 * K * E], through the MLP if there is one."""
        numbers = self.model.build.tape.new((batch, self.virtual), INT64)  # brought to the device
        rows = ops.embedding(numbers, self.table)
        if self.projection is None:
            return rows
        first, last = self.projection
        return last(ops.activation_of_result(first(rows)))

    def _cache(self, batch: int) -> Cache:
        states = ops.cast(self._encoded(batch), self.model.embed.dtype)
        cache = Cache(plain=not self.of_config)
        if self.of_config:
            cache.windows = getattr(self.model, "windows", {})
        one = (batch, self.heads, self.virtual, self.head_dim)
        if self.model.build.task == "seq2seq":
            return self._for_decoder(states, cache, one)
        permuted = _viewed(states, (self.layers * 2, *one))  # from [B, P, L * 2 * K * E]
        for index, pair in enumerate(_parts(permuted, [(2, *one)] * self.layers)):
            keys, values = _parts(pair if self.of_config else _viewed(pair, pair.shape), [one, one])
            cache.update(index, keys, values)
        return cache

    def _for_decoder(self, states: Tensor, cache: Cache, one: tuple[int, ...]) -> Cache:
        """Fill the self-attention cache of an encoder-decoder; a cache of as much for the other attention is dropped."""
        tape, shape = states.tape, states.shape
        twice = tape.new((*shape[:-1], 2 * shape[-1]), states.dtype)
        tape.launch(2 * twice.bytes)
        tape.record(twice, (states,), (), lambda g: (ops.empty_like(states_like),))
        states_like = Tensor(tape, None, shape, states.dtype)
        permuted = _viewed(twice, (self.layers * 4, *one))
        dropped = Cache(plain=True)
        pairs = _parts(permuted, [(4, *one)] * self.layers)
        for index, four in enumerate(pairs):
            pair = _viewed(four, (2, *one))
            keys, values = _parts(_viewed(pair, pair.shape), [one, one])
            cache.update(2 * index, keys, values)
        for index, four in enumerate(pairs):
            keys, values = _parts(_viewed(four, (2, *one)), [one, one])
            dropped.update(index, keys, values)
        return cache


def _parts(x: Tensor, parts: list[tuple[int, ...]]) -> list[Tensor]:
    """View a tensor in parts of its first dimension; backward joins their gradients."""
    tape, shape = x.tape, x.shape
    views = [Tensor(tape, x.storage, part, x.dtype) for part in parts]

    def backward(given: list[Tensor | None] | Tensor) -> tuple[Tensor | None, ...]:
        grads = given if isinstance(given, list) else [given]  # a list only of several
        joined = tape.new(shape, next(g.dtype for g in grads if g is not None))
        tape.launch(2 * joined.bytes)
        return (joined,)

    node = tape.record(views[0], (x,), (), backward, outputs=len(parts))
    for nr, view in enumerate(views):
        view.node, view.nr = node, nr
    return views


def _viewed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Permute, or slice from end to end as DynamicCache does; either way backward copies the gradient."""
    view, whole = Tensor(x.tape, x.storage, shape, x.dtype), x.shape

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        copied = g.tape.new(whole, g.dtype)
        g.tape.launch(g.bytes + copied.bytes)
        return (copied,)

    x.tape.record(view, (x,), (), backward)
    return view


def key_value_shape(c: Config) -> tuple[int, int]:
    """Return how many heads of which width keys and values have, as PEFT reads it from a config (peft/utils/other.py)."""
    heads = int(c.get("num_attention_heads") or c.get("n_head") or c.count("num_heads"))
    width = int(c.get("hidden_size") or c.get("n_embd") or c.count("d_model"))
    return int(c.get("num_key_value_heads") or heads), int(c.get("head_dim") or width // heads)


@method
class PrefixTuning(Method):
    """Learned keys and values before those of the input."""

    name = "prefix-tuning"
    summary = "learned keys and values of virtual tokens in every layer (Li & Liang 2021)"
    has_rank = False
    has_bias = False
    allows_checkpointing = False
    has_encoder = has_projection = True

    def adapt(self, model: Model, workload: Workload) -> None:
        """Make the table."""
        if workload.checkpointing:
            todo = "Set checkpointing to false: PEFT refuses it, since checkpointed layers use no cache."
            raise Unsupported("prefix tuning with checkpointing", value=True, todo=todo)
        model.prompt = Prefix(model, workload)
