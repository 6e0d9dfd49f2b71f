"""Attention kernels as PyTorch picks them, with what each allocates and keeps for backward.

Sizes state aten/src/ATen/native/transformers/cuda (flash_api.cpp, attention.cu, attention_backward.cu) and
transformers/integrations/sdpa_attention.py, eager_attention_forward (5.23): B batch, H heads, K key-value heads, T query
tokens, S key tokens, E head width.
"""

from __future__ import annotations

from functools import cache
from math import ceil

from . import ops, products
from .errors import Unsupported
from .stack import (
    BOOL_MASKS,
    GROUPED_EFFICIENT,
    GROUPED_SDPA,
    NO_PACKED_MASK,
    NO_PREFILL_MASK,
    SEARCHES_PACKED,
    Stack,
)
from .tape import BF16, BOOL, FP16, FP32, INT64, Dtype, Kernel, Tensor

#: Attention by the flash-attn library, as a workload names it.
FLASH_ATTENTION_2 = "flash_attention_2"


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def search_packed(like: Tensor, batch: int, tokens: int) -> None:
    """Look for several sequences in one row, as Transformers does without a mask (masking_utils.find_packed_sequence_indices)."""
    new, shape = like.tape.new, (batch, tokens)
    extended = new((batch, tokens + 1), INT64)
    steps = new(shape, INT64)
    del extended
    starts, sums = new(shape, BOOL), new(shape, INT64)
    converted = new(shape, INT64)
    like.tape.launch(4 * steps.bytes)
    del converted, starts, sums, steps


def causal_mask(
    like: Tensor,
    *,
    batch: int,
    queries: int,
    keys: int,
    padded: bool,
    kind: str,
    needed: bool = False,
    first: bool = False,
) -> Tensor | None:
    """Make the mask that Transformers hands to every layer: none for unpadded sdpa, bool for sdpa, float for eager.

    `needed` says that one is made though all keys are seen, `first` that the queries are the first of a cache made
    beforehand; flash attention is told of padding only.
    """
    padded = padded or (needed and _told_by_samples(like, queries))
    if kind == FLASH_ATTENTION_2:
        return _padding(like, batch, keys, padded=padded)
    if kind == "sdpa" and not padded and not needed and (queries in (1, keys) or _is_prefill(like, first)):
        return None
    joined = [(True, 1), (False, batch)] if padded else []
    return _mask_of(_joined_flags(like, batch, queries, keys, joined), like, kind)


def _is_prefill(like: Tensor, first: bool) -> bool:
    return first and like.tape.stack.does(NO_PREFILL_MASK)


def windowed_mask(
    like: Tensor,
    *,
    batch: int,
    queries: int,
    keys: int,
    window: int,
    padded: bool,
    kind: str,
    needed: bool = False,
    first: bool = False,
) -> Tensor | None:
    """Make the mask of layers that see `window` tokens: as `causal_mask`, but never none once the keys fill the window."""
    if kind == FLASH_ATTENTION_2:
        return _padding(like, batch, keys, padded=padded)
    padded = padded or (needed and _told_by_samples(like, queries))
    seen = queries in (1, keys) or _is_prefill(like, first)
    if kind == "sdpa" and not padded and not needed and seen and keys < window:
        return None
    joined = [(True, 1), (True, 1)] + ([(False, 1), (False, batch)] if padded else [])
    return _mask_of(_joined_flags(like, batch, queries, keys, joined), like, kind)


def searches_packed(like: Tensor, batch: int, tokens: int) -> bool:
    """Look for several sequences in one row where the stack does so; say whether a mask is made of what is found."""
    if like.tape.stack.does(SEARCHES_PACKED):
        search_packed(like, batch, tokens)
    return makes_packed_mask(like.tape.stack)


def makes_packed_mask(stack: Stack) -> bool:
    """Say whether training without a mask makes one all the same: which tokens are of one sequence, in every sample."""
    return stack.does(SEARCHES_PACKED) and not stack.does(NO_PACKED_MASK)


def _told_by_samples(like: Tensor, queries: int) -> bool:
    """Say whether a mask that is needed differs between samples: one made of a search for packed sequences does."""
    return queries > 1 and makes_packed_mask(like.tape.stack)


def _padding(like: Tensor, batch: int, keys: int, *, padded: bool) -> Tensor | None:
    return like.tape.new((batch, keys), BOOL) if padded else None


def _joined_flags(like: Tensor, batch: int, queries: int, keys: int, joined: list[tuple[bool, int]]) -> Tensor:
    """Allocate what is allowed: one comparison, or several joined one after the other (masking_utils.and_masks).

    Of each the list says whether it is a comparison of its own, and how many rows of the batch the result has.
    """
    tape = like.tape
    allowed = None if joined else tape.new((1, 1, queries, keys), BOOL)
    for compared, rows in joined:
        flags = tape.new((1, 1, queries, keys), BOOL) if compared else None
        allowed = tape.new((rows, 1, queries, keys), BOOL)
        tape.launch(3 * allowed.bytes)
        del flags
    assert allowed is not None
    return Tensor(tape, allowed.storage, (batch, 1, queries, keys), BOOL)


def _mask_of(allowed: Tensor, like: Tensor, kind: str) -> Tensor:
    if kind == "sdpa" and like.tape.stack.does(BOOL_MASKS):
        return allowed
    mask = like.tape.new(allowed.shape, like.dtype)
    like.tape.launch(mask.bytes + allowed.bytes)
    return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    kind: str,
    causal: bool = True,
    dropout: float = 0.0,
    softcap: bool = False,
    upcast: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attend [B, H, T, E] to keys and values [B, K, S, E]; returns [B, T, H * E] and, if eager, the probabilities.

    Transformers' layers hold on to the probabilities until they return, so recipes must too.
    """
    if kind == FLASH_ATTENTION_2:
        return flash_library(q, k, v, mask, dropout=dropout), None
    if kind == "eager":
        return eager(q, k, v, mask, dropout=dropout, softcap=softcap, upcast=upcast)
    return sdpa(q, k, v, mask, dropout=dropout, causal=causal), None


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    softcap: bool = False,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention as separate operators: scores, scale, (softcap,) mask, softmax in fp32, cast, product with the values."""
    groups = q.shape[1] // k.shape[1]
    k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    scores = ops.scale(compared(q, k))
    if softcap:
        scores = ops.scale(scores)
        scores = ops.activation_of_result(scores)
        scores = ops.scale(scores)
    if mask is not None:
        scores = ops.add(scores, mask)
    if upcast:
        scores = ops.cast(ops.softmax(scores, FP32), q.dtype)
    else:  # two statements: the scores die before the conversion
        scores = ops.softmax(scores)
        scores = ops.cast(scores, v.dtype)
    scores = ops.dropout(scores, dropout)
    return heads_last(products.matmul(scores, v)), scores


def compared(q: Tensor, k: Tensor) -> Tensor:
    """Multiply queries with keys: [B, H, T, S], for attention that a family writes in its own operators."""
    return products.matmul(q, products.transpose(k))


def weighted(scores: Tensor, v: Tensor) -> Tensor:
    """Multiply probabilities [B, H, T, S] with values."""
    return products.matmul(scores, v)


def heads_last(out: Tensor) -> Tensor:
    """Bring [B, H, T, E] to [B, T, H * E]: a copy unless the kernel wrote it in that order."""
    batch, heads, tokens, width = out.shape
    together = heads > 1 and tokens > 1
    if together and not out.strided:
        out = ops.copy(out)
    joined = Tensor(out.tape, out.storage, (batch, tokens, heads * width), out.dtype)
    out.tape.record(joined, (out,), (), lambda g: (_split_heads(g, heads, together),))
    return joined


def _split_heads(g: Tensor, heads: int, together: bool) -> Tensor:
    batch, tokens, width = g.shape
    seen = Tensor(g.tape, g.storage, (batch, heads, tokens, width // heads), g.dtype)
    seen.strided = together
    return seen


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """scaled_dot_product_attention: flash for 16 bit without mask, memory-efficient otherwise, math where neither can."""
    groups = q.shape[1] // k.shape[1]
    shared = mask is None and q.tape.stack.does(GROUPED_SDPA)
    grouped = groups > 1 and shared and q.shape[-1] == v.shape[-1] <= 256
    if groups > 1 and not grouped:
        if q.shape[2] == 1:
            return _packed(q, k, v, mask, dropout=dropout)
        k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    return heads_last(fused(q, k, v, mask, dropout=dropout, causal=causal))


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float) -> Tensor:
    """Attend one query token [B, H, 1, E]: heads that share a key become its queries, and the result is put in order."""
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    out = fused(q.view(batch, kv_heads, heads // kv_heads, width), k, v, mask, dropout=dropout)
    if out.strided and kv_heads > 1:
        out = ops.copy(out)
    return out.view(batch, 1, heads * width)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """Run the kernel that PyTorch picks, on inputs that autocast may cast first; the caller holds what was cast.

    What is behind the queries in a cache that is made beforehand is left out, as no mask says that it is unseen.
    """
    queries = q.shape[2]
    if causal and mask is None and 1 < queries < k.shape[2]:
        k, v = _first_keys(k, queries), _first_keys(v, queries)
    if q.tape.autocast is not None:
        if mask is not None and mask.dtype is not BOOL:
            mask = ops.cast(mask, q.tape.autocast)
        v, k, q = (ops.cast(t, q.tape.autocast) for t in (v, k, q))  # from the last argument to the first
    half, ampere = q.dtype in (BF16, FP16), q.tape.compute_capability >= (8, 0)
    if half and ampere and mask is None and _flash_takes(q, dropout, learns=any(t.node for t in (q, k, v))):
        return flash(q, k, v, dropout=dropout, causal=causal)
    grouped = q.shape[1] != k.shape[1] and not q.tape.stack.does(GROUPED_EFFICIENT)
    if (q.dtype is BF16 and not ampere) or grouped:
        return math_attention(q, k, v, mask, dropout=dropout)
    return efficient(q, k, v, mask, causal=causal)


def _first_keys(x: Tensor, count: int) -> Tensor:
    return Tensor(x.tape, x.storage, (*x.shape[:2], count, x.shape[3]), x.dtype)


#: Cards on whose shared memory flash attention's backward of the widest heads is too large (sdp_utils.cpp, 2.14).
_SMALL_SHARED_MEMORY = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
_WIDE_HEAD, _WIDER_HEAD = 192, 224


def _flash_takes(q: Tensor, dropout: float, *, learns: bool) -> bool:
    """Say whether PyTorch lets the flash kernel have heads of this width."""
    width = q.shape[-1]
    if width <= _WIDE_HEAD or not learns or q.tape.compute_capability not in _SMALL_SHARED_MEMORY:
        return width <= 256
    return _WIDER_HEAD < width <= 256 and not dropout


def flash_library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0) -> Tensor:
    """Attend by the flash-attn library: PyTorch's own flash kernel, which was taken from it, and copies where some is padding.

    States transformers/modeling_flash_attention_utils.py (5.23); no rehearsal has confirmed it. Raises Unsupported.
    """
    tape = q.tape
    if tape.flash_repeats:
        groups = q.shape[1] // k.shape[1]
        k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    if tape.autocast is not None:
        q, k, v = (ops.cast(t, tape.autocast) for t in (q, k, v))
    if q.dtype is FP32 or tape.compute_capability < (8, 0):
        todo = "Choose a 16-bit precision and a card from compute capability 8.0 on, or sdpa."
        raise Unsupported("flash_attention_2 in fp32 or on an older card", value=q.dtype.name, todo=todo)
    if mask is None:
        return heads_last(flash(q, k, v, dropout=dropout))
    q, k, v = _gathered(q), _gathered(k), _gathered(v)
    out = _gathered(flash(q, k, v, dropout=dropout))
    return heads_last(out)


def _gathered(x: Tensor) -> Tensor:
    """Copy the rows of tokens that are no padding, or put them back among zeros; nearly all of them are none."""
    out = ops.empty_like(x)
    x.tape.launch(2 * x.bytes)
    x.tape.record(out, (x,), (), lambda g: (ops.empty_like(g),))
    return out


def flash(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """FlashAttention 2: keeps q, k, v, the output and fp32 log-sum-exp; backward accumulates dq in fp32."""
    batch, heads, queries, width = q.shape
    keys, kv_heads = k.shape[2], k.shape[1]
    tape, dtype = q.tape, q.dtype
    padded = _round_up(width, 8)
    if padded != width:
        q, k, v = (_pad(t, padded) for t in (q, k, v))
    out = tape.new((batch, heads, queries, padded), dtype)
    out.strided = q.strided
    lse = tape.new((batch, heads, queries), FP32)
    seed, offset = tape.new((2,), INT64), tape.new((1,), INT64)
    splits = (
        1
        if dropout
        else _flash_splits(batch, heads, kv_heads, queries, keys, padded, _FLASH_BLOCKS * tape.multiprocessors)
    )
    if splits > 1:
        lse_parts = tape.new((splits, *lse.shape), FP32)
        out_parts = tape.new((splits, *lse.shape, _round_up(padded, 32 if padded <= 128 else 64)), FP32)
        tape.launch(lse_parts.bytes + out_parts.bytes + out.bytes)  # what puts the parts together
        del lse_parts, out_parts
    causal = causal and queries == keys
    moved = q.bytes + k.bytes + v.bytes + out.bytes
    _launch(out, moved, batch * heads, keys, causal=causal)

    def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        new = tape.new
        # the kernel wants its output in the memory order of [B, T, H, E]
        copied = None if q.strided or heads == 1 or queries == 1 else new(q.shape, dtype)
        dq, dk, dv = ops.empty_like(q), ops.empty_like(k), ops.empty_like(v)
        rows = _round_up(queries, 128)
        softmax_d = new((batch, heads, rows), FP32)
        accumulator = new((batch, rows, heads, _round_up(padded, 32) if padded <= _WIDE_HEAD else 256), FP32)
        expanded = [new((batch, keys, heads, padded), dtype) for _ in range(2)] if kv_heads != heads else []
        _launch(dq, 2 * moved, batch * heads, keys, products=5, causal=causal)
        del expanded, accumulator, softmax_d, copied
        return dq, dk, dv

    tape.record(out, (q, k, v), (q, k, v, out.detach(), lse, seed, offset), backward)
    return out if padded == width else ops.slice_last(out, 0, width)


#: Blocks that run at a time on a multiprocessor, by whose number the flash kernel splits long keys.
_FLASH_BLOCKS = 2


@cache
def _flash_splits(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, room: int) -> int:
    """Return into how many parts the forward kernel splits the keys, each with an fp32 output (flash_api.cpp, 2.14).

    It takes the fewest parts with which the last wave of blocks is nearly as full as with the best number of parts.
    """
    if queries == 1 and heads > kv_heads:
        heads, queries = kv_heads, heads // kv_heads  # a group of heads that share a key becomes queries
    blocks = batch * heads * -(-queries // 64)
    if blocks >= 0.8 * room:
        return 1
    of_keys = -(-keys // (256 if width <= 64 else 128 if width <= 128 else 64))
    waves = {n: blocks * n / room for n in range(1, min(128, room, of_keys) + 1)}
    full = {n: w / ceil(w) for n, w in waves.items() if n == 1 or -(-of_keys // n) != -(-of_keys // (n - 1))}
    return next(n for n, share in full.items() if share >= 0.85 * max(full.values()))


def _pad(x: Tensor, width: int) -> Tensor:
    out = x.tape.new((*x.shape[:-1], width), x.dtype)
    narrow = x.shape
    x.tape.launch(x.bytes + out.bytes)
    x.tape.record(out, (x,), (), lambda g: (ops.fitted(g, narrow),))
    return out


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = True) -> Tensor:
    """Memory-efficient attention: a bool mask becomes a float one per layer, its last dimension padded to a multiple of 8."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    tape, dtype = q.tape, q.dtype
    bias = None if mask is None else _mask_bias(mask, batch, dtype)
    learned = bias is not None and bias.node is not None
    seed, offset = tape.new((1,), INT64), tape.new((1,), INT64)
    out = tape.new((batch, heads, queries, v.shape[-1]), dtype)
    out.strided = True
    lse = tape.new((batch, heads, _round_up(queries, 32)), FP32) if tape.grad_enabled and _any_node(q, k, v) else None
    wide = dtype is not FP32 and v.shape[-1] > 128  # such heads are summed up in memory, not in registers
    accumulator = tape.new(out.shape, FP32) if wide else None
    causal = causal and mask is None and queries == keys
    moved = q.bytes + k.bytes + v.bytes + out.bytes
    _launch(out, moved, batch * heads, keys, causal=causal)
    del accumulator

    def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        new = tape.new
        dq, dk, dv = (new(t.shape, t.dtype) for t in (q, k, v))
        dq.strided = dk.strided = dv.strided = True
        grouped = k.shape[1] != heads
        expanded = [new((batch, heads, keys, width), dtype) for _ in range(2)] if grouped else []
        dbias = _narrowed(new((batch, heads, queries, _round_up(keys, 16)), dtype), keys) if learned else None
        delta = _output_dot_gradient(g, batch, heads, queries)
        workspace = new((batch * heads * _workspace_elements(dtype, queries, keys, width, batch * heads),), FP32)
        _launch(dq, 2 * moved, batch * heads, keys, products=5, causal=causal)
        del delta, workspace, expanded
        return dq, dk, dv, dbias

    tape.record(out, (q, k, v, bias), (q, k, v, bias, out.detach(), lse, seed, offset), backward)
    return out


def _narrowed(x: Tensor, width: int) -> Tensor:
    return Tensor(x.tape, x.storage, (*x.shape[:-1], width), x.dtype)


def _output_dot_gradient(g: Tensor, batch: int, heads: int, queries: int) -> Tensor:
    """Return the row sums of output times gradient: by a kernel of its own in 16 bit, by separate operators in fp32."""
    rows = (batch, heads, queries)
    if g.dtype is not FP32:
        return g.tape.new(rows, FP32)
    product = ops.scale(g.detach())
    summed = g.tape.new(rows, FP32)
    delta = g.tape.new(rows, FP32)
    del summed, product
    return delta


def _workspace_elements(dtype: Dtype, queries: int, keys: int, width: int, heads: int) -> int:
    """Count the fp32 elements a head's backward accumulates gradients in (measured over widths and lengths, torch 2.14).

    Blocks of queries with a header of 4 each; wide 16-bit heads also accumulate the gradients of keys and values, 64 keys
    in each of the splits that leave 200 blocks to all `heads` of the batch (attention_backward.cu, num_splits_key).
    """
    if width <= 64:
        return -(-queries // 64) * (64 * 64 + 4)
    if dtype is not FP32 and width <= 128:
        return -(-queries // 128) * (128 * 128 + 4)
    elements = -(-queries // 128) * -(-width // 64) * (128 * 64 + 4)
    if dtype is not FP32:
        splits = 1 if heads >= 256 and keys <= 128 else max(1, min(-(-keys // 64), 200 // heads))
        elements += 2 * 64 * _round_up(width, 128) * splits
    return elements


def _any_node(*tensors: Tensor) -> bool:
    return any(tensor.node is not None for tensor in tensors)


def _mask_bias(mask: Tensor, batch: int, dtype: Dtype) -> Tensor:
    rows, keys = mask.shape[0], mask.shape[-1]
    bias = ops.cast(mask, dtype)
    aligned = _round_up(keys, 8)
    if aligned != keys:
        bias = ops.slice_last(_pad(bias, aligned), 0, keys)
    if bias.node is not None and rows != batch:
        bias = _repeated(bias, batch)
    return bias


def _repeated(bias: Tensor, batch: int) -> Tensor:
    """View a learned bias once per sample; its gradient is summed over the batch."""
    shape = bias.shape
    out = Tensor(bias.tape, bias.storage, (batch, *shape[1:]), bias.dtype)
    bias.tape.record(out, (bias,), (), lambda g: (ops.fitted(g, shape),))
    return out


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0) -> Tensor:
    """Attend by separate operators in fp32, the fallback, which keeps T x S probabilities; returns [B, H, T, E]."""
    dtype, groups, tape = q.dtype, q.shape[1] // k.shape[1], q.tape
    bias = None if mask is None else ops.cast(mask, dtype)
    given = q, k, v = ops.cast(q, FP32), ops.cast(k, FP32), ops.cast(v, FP32)
    autocast, tape.autocast = tape.autocast, None
    q = ops.scale(q)
    if mask is None and q.shape[2] > 1:
        bias = _causal_bias(q, k.shape[2])
    if groups > 1:
        k, v = _interleaved(k, groups), _interleaved(v, groups)
    weights = _safe_softmax(products.matmul(q, products.transpose(ops.scale(k))))  # the mask is added in place
    weights = ops.dropout(weights, dropout)
    returned = ops.cast(weights.detach(), dtype)
    out = ops.cast(products.matmul(weights, v), dtype)
    tape.autocast = autocast
    del bias, returned, given
    return out


def _interleaved(x: Tensor, times: int) -> Tensor:
    """Copy each key-value head for its group of query heads, a single one too."""
    batch, heads, tokens, width = shape = x.shape
    out = x.tape.new((batch, heads * times, tokens, width), x.dtype)
    x.tape.launch(x.bytes + out.bytes)
    x.tape.record(out, (x,), (), lambda g: (ops.fitted(g, shape),))
    return out


def _causal_bias(q: Tensor, keys: int) -> Tensor:
    """Make a float mask [T, S] by way of two of booleans."""
    new, shape = q.tape.new, (q.shape[2], keys)
    ones = new(shape, BOOL)
    seen = new(shape, BOOL)
    del ones
    bias = new(shape, q.dtype)
    del seen
    return bias


def _safe_softmax(scores: Tensor) -> Tensor:
    """Softmax, and a look for rows that are masked entirely."""
    weights = ops.softmax(scores)
    weights.tape.new(weights.shape, BOOL)
    return weights


def _launch(out: Tensor, operands: int, heads: int, keys: int, *, products: int = 2, causal: bool) -> None:
    """Count a fused kernel: `operands` bytes moved and the products of all `heads`, half of each where causal."""
    queries, width = out.shape[-2:]
    k = width * products
    kernel = Kernel(operands, heads, queries, keys, k // 2 if causal else k, out.dtype.name, True)
    out.tape.kernels.append(kernel)
