"""Attention kernels as PyTorch picks them, with what each allocates and keeps for backward.

Sizes state aten/src/ATen/native/transformers/cuda (flash_api.cpp, attention.cu, attention_backward.cu) and
transformers/integrations/sdpa_attention.py, eager_attention_forward (5.23): B batch, H heads, K key-value heads, T query
tokens, S key tokens, E head width.
"""

from __future__ import annotations

from . import ops
from .tape import BF16, BOOL, FP16, FP32, INT64, Dtype, Tensor


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def causal_mask(like: Tensor, *, batch: int, queries: int, keys: int, padded: bool, kind: str) -> Tensor | None:
    """Make the mask that Transformers hands to every layer: none for unpadded sdpa, bool for sdpa, float for eager."""
    tape = like.tape
    if kind == "sdpa" and not padded:
        return None
    rows = batch if padded else 1
    allowed = tape.new((rows, 1, queries, keys), BOOL)
    tape.launch(allowed.bytes)
    if kind == "sdpa":
        return allowed
    mask = tape.new((rows, 1, queries, keys), like.dtype)
    tape.launch(mask.bytes + allowed.bytes)
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
) -> Tensor:
    """Attend [B, H, T, E] to keys and values [B, K, S, E]; returns [B, T, H * E]."""
    if kind == "eager":
        return eager(q, k, v, mask, dropout=dropout, softcap=softcap, upcast=upcast)
    return sdpa(q, k, v, mask, dropout=dropout)


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0, softcap: bool = False, upcast: bool = True
) -> Tensor:
    """Attention as separate operators: scores, scale, (softcap,) mask, softmax in fp32, cast, product with the values."""
    groups = q.shape[1] // k.shape[1]
    k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    scores = ops.scale(ops.matmul(q, k.view(*k.shape[:-2], k.shape[-1], k.shape[-2])))
    if softcap:
        scores = ops.scale(scores)
        scores = ops.activation_of_result(scores)
        scores = ops.scale(scores)
    if mask is not None:
        scores = ops.add(scores, mask)
    scores = ops.cast(ops.softmax(scores, FP32 if upcast else None), q.dtype)
    scores = ops.dropout(scores, dropout)
    return _heads_last(ops.matmul(scores, v), strided=True)


def _heads_last(out: Tensor, *, strided: bool) -> Tensor:
    """Bring [B, H, T, E] to [B, T, H * E]: a copy unless the kernel wrote it in that order."""
    batch, heads, tokens, width = out.shape
    if strided and heads > 1 and tokens > 1:
        out = ops.copy(out)
    return out.view(batch, tokens, heads * width)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0) -> Tensor:
    """scaled_dot_product_attention: flash for 16 bit without mask, memory-efficient otherwise, math where neither can."""
    if q.tape.autocast is not None:
        q, k, v = (ops.cast(t, q.tape.autocast) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    grouped = groups > 1 and mask is None and q.shape[-1] == v.shape[-1] <= 256
    if groups > 1 and not grouped:
        if q.shape[2] == 1:
            q = q.view(q.shape[0], k.shape[1], groups, q.shape[-1])
        else:
            k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    half = q.dtype in (BF16, FP16)
    if half and mask is None and q.shape[-1] <= 256:
        return _heads_last(flash(q, k, v), strided=False)
    if grouped:
        return math_attention(q, k, v)
    return _heads_last(efficient(q, k, v, mask), strided=False)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2: keeps q, k, v, the output and fp32 log-sum-exp; backward accumulates dq in fp32."""
    batch, heads, queries, width = q.shape
    keys, kv_heads = k.shape[2], k.shape[1]
    tape, dtype = q.tape, q.dtype
    padded = _round_up(width, 8)
    if padded != width:
        q, k, v = (_pad(t, padded) for t in (q, k, v))
    out = tape.new((batch, heads, queries, padded), dtype)
    lse = tape.new((batch, heads, queries), FP32)
    seed, offset = tape.new((2,), INT64), tape.new((1,), INT64)
    _launch(out, batch * heads, queries, keys, padded)

    def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        new = tape.new
        dq, dk, dv = (new(t.shape, dtype) for t in (q, k, v))
        rows = _round_up(queries, 128)
        softmax_d = new((batch, heads, rows), FP32)
        accumulator = new((batch, rows, heads, _round_up(padded, 32)), FP32)
        expanded = (new((batch, keys, heads, padded), dtype), new((batch, keys, heads, padded), dtype))
        if kv_heads == heads:
            expanded = (dk, dv)
        _launch(dq, batch * heads, queries, keys, padded, products=5)
        del softmax_d, accumulator, expanded
        return dq, dk, dv

    tape.record(out, (q, k, v), (q, k, v, out.detach(), lse, seed, offset), backward)
    return out if padded == width else ops.slice_last(out, 0, width)


def _pad(x: Tensor, width: int) -> Tensor:
    out = x.tape.new((*x.shape[:-1], width), x.dtype)
    narrow = x.shape
    x.tape.launch(x.bytes + out.bytes)
    x.tape.record(out, (x,), (), lambda g: (Tensor(g.tape, g.storage, narrow, g.dtype),))
    return out


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Memory-efficient attention: a bool mask becomes a float one per layer, its last dimension padded to a multiple of 16."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    tape, dtype = q.tape, q.dtype
    bias = None if mask is None else _mask_bias(mask, dtype)
    seed, offset = tape.new((1,), INT64), tape.new((1,), INT64)
    out = tape.new((batch, heads, queries, v.shape[-1]), dtype)
    lse = tape.new((batch, heads, _round_up(queries, 32)), FP32) if tape.grad_enabled and _any_node(q, k, v) else None
    _launch(out, batch * heads, queries, keys, width)

    def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = (tape.new(t.shape, t.dtype) for t in (q, k, v))
        delta = tape.new((batch, heads, _round_up(queries, 32)), FP32)
        _launch(dq, batch * heads, queries, keys, width, products=5)
        del delta
        return dq, dk, dv

    tape.record(out, (q, k, v), (q, k, v, bias, out.detach(), lse, seed, offset), backward)
    return out


def _any_node(*tensors: Tensor) -> bool:
    return any(tensor.node is not None for tensor in tensors)


def _mask_bias(mask: Tensor, dtype: Dtype) -> Tensor:
    rows, heads, queries, keys = mask.shape
    bias = mask.tape.new((rows, heads, queries, keys), dtype)
    mask.tape.launch(mask.bytes + bias.bytes)
    aligned = _round_up(keys, 16)
    if aligned == keys:
        return bias
    padded = mask.tape.new((rows, heads, queries, aligned), dtype)
    mask.tape.launch(bias.bytes + padded.bytes)
    return padded


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fallback of separate operators, which keeps T x S probabilities; grouped keys and values are repeated first."""
    groups = q.shape[1] // k.shape[1]
    k, v = ops.repeat_heads(k, groups), ops.repeat_heads(v, groups)
    scores = ops.matmul(ops.scale(q), ops.scale(k.view(*k.shape[:-2], k.shape[-1], k.shape[-2])))
    if q.shape[2] > 1:
        allowed = q.tape.new((q.shape[2], k.shape[2]), scores.dtype)
        scores = ops.add(scores, allowed)
    return _heads_last(ops.matmul(ops.softmax(scores), v), strided=True)


def _launch(out: Tensor, batch: int, queries: int, keys: int, width: int, *, products: int = 2) -> None:
    """Count a fused kernel as its matrix products: T x E x S each, nothing but its inputs and output moved."""
    ops.matmul_kernel(out, batch, queries, keys, width * products // 2)
