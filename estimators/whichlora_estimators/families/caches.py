"""Keys and values of past tokens, as Transformers keeps them (cache_utils.py, read in 5.23)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from .. import ops
from ..tape import INT64, Tensor


class Cache:
    """Keys and values of past tokens, one pair of [B, K, S, E] a layer (transformers' DynamicCache)."""

    def __init__(self, *, plain: bool = False) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        #: Whether every layer keeps all tokens, whatever the model's config says.
        self.plain = plain
        #: Tokens that the first layer has seen.
        self.length = 0
        #: Layers that keep only the last tokens, and the window from which they see one token fewer.
        self.windows: Mapping[int, int] = {}
        #: What a layer is called on the tape.
        self.label: Callable[[int], str] = "layer {}".format

    #: Whether it is made for all tokens beforehand.
    fixed: ClassVar[bool] = False

    def keys(self, tokens: int, window: int | None = None) -> int:
        """Return how many keys new tokens are compared with, in a layer without or with a window."""
        past = self.length if window is None or self.plain else min(self.length, window - 1)
        return past + tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append by concatenation, a copy of the whole layer, and return what attention sees."""
        if layer == 0:
            self.length += k.shape[2]
        window = self.windows.get(layer)
        with k.tape.tagged("KV cache"):
            if layer not in self.layers:
                joined = ops.concat([k], 2), _like_keys(v, k)
            elif window is None:
                joined = self._appended(layer, k, v)
            else:
                past = self.layers[layer]
                joined = ops.concat([past[0], k], 2), ops.concat([past[1], v], 2)
        self.layers[layer] = joined if window is None else (_latest(joined[0], window), _latest(joined[1], window))
        return joined

    def skip(self, tokens: int) -> None:
        """Lengthen every layer at once, as that many decode steps do one by one."""
        self.length += tokens
        for layer in list(self.layers):
            keys, values = self.layers.pop(layer)
            window = self.windows.get(layer)
            keys.tape.cut(self.label(layer))
            with keys.tape.tagged("KV cache"):
                if window is None:
                    self.layers[layer] = _resized(keys, self.length), _resized(values, self.length)
                else:
                    longer = min(keys.shape[2] + tokens, window)
                    grown = _resized(keys, longer), _resized(values, longer)
                    self.layers[layer] = _latest(grown[0], window), _latest(grown[1], window)

    def end_step(self) -> None:
        """Let go of what the caller held while the model ran."""

    def _appended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers.pop(layer)
        longer = ops.concat([keys, k], 2)
        del keys  # given back before the values are copied
        return longer, ops.concat([values, v], 2)


class TupleCache(Cache):
    """The cache as a tuple of tensors, all new at every token: the caller holds the old one until it has the new one."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append, beside what was there."""
        if layer in self.layers:
            self.held.append(self.layers[layer])
        return super().update(layer, k, v)

    def end_step(self) -> None:
        """Let go of the tensors that were replaced."""
        self.held.clear()


class StaticCache(Cache):
    """Room for all tokens, made by a layer's first ones and filled in place (transformers' StaticCache).

    Layers with a window have room for that many tokens; full ones move theirs along.
    """

    fixed = True

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.seen: dict[int, int] = {}
        self.counts: list[Tensor] = []

    def keys(self, tokens: int, window: int | None = None) -> int:
        """Return how many keys new tokens are compared with: all that there is room for."""
        if window is None:
            return self.limit
        room = min(self.limit, window)
        if self.length >= room:
            return room + tokens - 1
        return max(room, self.length + tokens)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values in their places; return all that attention sees."""
        tape, tokens, window = k.tape, k.shape[2], self.windows.get(layer)
        if layer == 0:
            self.length += tokens
        room = self.limit if window is None else min(self.limit, window)
        with tape.tagged("KV cache"):
            if layer not in self.layers:
                self.layers[layer] = _resized(k, room), _resized(v, room)
                self.counts.append(tape.new((1,), INT64))
            past = self.seen.get(layer, 0)
            self.seen[layer] = past + tokens
            return self._written(layer, k, v, past, room)

    def _written(self, layer: int, k: Tensor, v: Tensor, past: int, room: int) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        tape, tokens = k.tape, k.shape[2]
        tape.launch(2 * (k.bytes + v.bytes))
        if past >= room and tokens == 1:
            moved = _resized(keys, room), _resized(values, room)
            tape.new((1,), INT64)
            del moved
        elif past + tokens > room:
            return (k, v) if not past else (_resized(k, past + tokens), _resized(v, past + tokens))
        else:
            numbers = tape.new((tokens,), INT64)
            tape.new((tokens,), INT64)
            del numbers
        return keys, values

    def skip(self, tokens: int) -> None:
        """Count tokens: there is room for them."""
        self.length += tokens
        self.seen = {layer: seen + tokens for layer, seen in self.seen.items()}


def _like_keys(v: Tensor, k: Tensor) -> Tensor:
    """Copy the first values behind an empty tensor of the keys' dtype: autocast may have made them narrower."""
    if ops.promote(k.dtype, v.dtype) is v.dtype:
        return ops.concat([v], 2)
    copied = ops.cast(v, k.dtype)
    copied.strided = False
    return copied


def _resized(x: Tensor, tokens: int) -> Tensor:
    return x.tape.new((*x.shape[:2], tokens, x.shape[3]), x.dtype)


def _latest(x: Tensor, window: int) -> Tensor:
    """View the tokens that the next one's window reaches; the storage stays whole until the next concatenation."""
    batch, heads, tokens, width = whole = x.shape
    seen = Tensor(x.tape, x.storage, (batch, heads, min(tokens, window - 1), width), x.dtype)
    x.tape.record(seen, (x,), (), lambda g: (ops.fitted(g, whole),))
    return seen
