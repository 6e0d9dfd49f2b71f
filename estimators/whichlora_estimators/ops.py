"""The operators that model code calls, as PyTorch runs them on CUDA: what each allocates, saves and moves.

Formulas of backward state tools/autograd/derivatives.yaml and FunctionsManual.cpp of PyTorch (read in 2.14): also the
temporaries, since a peak often falls on one. Under autocast the operators of its bf16 and fp32 lists cast their inputs
(aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from .tape import BOOL, FP16, FP32, Dtype, Node, Shape, Tensor, View


def promote(a: Dtype, b: Dtype) -> Dtype:
    """Return the dtype of an elementwise result of two tensors with dimensions."""
    return a if a.rank >= b.rank else b


def _broadcast(a: Shape, b: Shape) -> Shape:
    if a == b:
        return a
    if len(a) < len(b):
        a, b = b, a
    b = (1,) * (len(a) - len(b)) + b
    return tuple(max(x, y) if x and y else 0 for x, y in zip(a, b, strict=True))


def _pointwise(tape_of: Tensor, shape: Shape, dtype: Dtype, reads: int) -> Tensor:
    out = tape_of.tape.new(shape, dtype)
    out.strided = tape_of.strided
    tape_of.tape.launch(reads + out.bytes)
    return out


def _elementwise(a: Tensor, b: Tensor) -> Tensor:
    """Allocate the result of two tensors: in the memory order of the first that is not broadcast."""
    shape = _broadcast(a.shape, b.shape)
    return _pointwise(a if a.shape == shape else b, shape, promote(a.dtype, b.dtype), a.bytes + b.bytes)


def empty_like(x: Tensor) -> Tensor:
    """Allocate a tensor of the same shape, dtype and memory order."""
    out = x.tape.new(x.shape, x.dtype)
    out.strided = x.strided
    return out


def _like(g: Tensor) -> Tensor:
    return _pointwise(g, g.shape, g.dtype, g.bytes)


def fitted(g: Tensor, shape: Shape) -> Tensor:
    """Bring a gradient to another shape: summed to a smaller one, put among zeros in a larger one."""
    out = _pointwise(g, shape, g.dtype, g.bytes)
    if g.numel < out.numel:
        g.tape.launch(2 * g.bytes)  # zeros first, then the copy
    out.strided = False
    return out


def cast(x: Tensor, dtype: Dtype) -> Tensor:
    """Convert to another dtype: a copy, or `x` itself where it has that dtype."""
    if x.dtype is dtype:
        return x
    out = _pointwise(x, x.shape, dtype, x.bytes)
    if out.strided and x.storage is not None and x.tape.sizes[x.storage.index] < x.bytes:
        out.strided = False  # a repeated view becomes an ordinary tensor
    original = x.dtype
    x.tape.record(out, (x,), (), lambda g: (cast(g, original),))
    return out


def copy(x: Tensor) -> Tensor:
    """Copy, as clone() and contiguous() of a strided view do; the gradient passes through."""
    out = _like(x)
    out.strided = False
    x.tape.record(out, (x,), (), lambda g: (g,))
    return out


def reshape(x: Tensor, *shape: int) -> Tensor:
    """View under another shape as a step of its own: the gradient is a view too."""
    seen, before = Tensor(x.tape, x.storage, shape, x.dtype), x.shape
    x.tape.record(seen, (x,), (), lambda g: (View(g, before),))
    return seen


def add(a: Tensor, b: Tensor) -> Tensor:
    """Add elementwise; nothing is saved."""
    out = _elementwise(a, b)
    need_a, need_b = a.node is not None, b.node is not None
    a.tape.record(out, (a, b), (), lambda g: (g if need_a else None, g if need_b else None))
    return out


def add_into(total: Tensor, term: Tensor, *, of_view: bool = False) -> Tensor:
    """Add elementwise into the first tensor, whatever the dtype of the other.

    `of_view` says that the first tensor is a view, whose gradient autograd copies (CopySlices) behind the view taken anew.
    """
    out = Tensor(total.tape, total.storage, total.shape, total.dtype)
    out.strided = total.strided
    total.tape.launch(2 * total.bytes + term.bytes)
    need_total, need_term = total.node is not None, term.node is not None

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        of_total, of_term = (_like(g), _like(g)) if of_view else (g, g)
        return of_total if need_total else None, of_term if need_term else None

    total.tape.record(out, (total, term), (), backward)
    return _seen_anew(out) if of_view else out


def _seen_anew(x: Tensor) -> Tensor:
    """View a tensor as autograd does by strides: its gradient goes into zeros."""
    seen = Tensor(x.tape, x.storage, x.shape, x.dtype)
    x.tape.record(seen, (x,), (), lambda g: (_like(g),))
    return seen


def scale(x: Tensor) -> Tensor:
    """Multiply by, or divide by, a Python number; nothing is saved."""
    out = _like(x)
    x.tape.record(out, (x,), (), lambda g: (_like(g),))
    return out


def scale_in_place(x: Tensor) -> Tensor:
    """Multiply or divide by a Python number in place; the gradient is a new tensor."""
    out = x.view(*x.shape)
    out.strided = x.strided
    x.tape.launch(2 * x.bytes)
    x.tape.record(out, (x,), (), lambda g: (_like(g),))
    return out


def add_in_place(a: Tensor, b: Tensor) -> Tensor:
    """Add `b` of the same shape to `a`; the gradient goes to both."""
    out = a.view(*a.shape)
    out.strided = a.strided
    a.tape.launch(2 * a.bytes + b.bytes)
    a.tape.record(out, (a, b), (), lambda g: (g, g))
    return out


def shift(x: Tensor) -> Tensor:
    """Add a Python number; the gradient passes through."""
    out = _like(x)
    x.tape.record(out, (x,), (), lambda g: (g,))
    return out


def negate(x: Tensor) -> Tensor:
    """Negate; nothing is saved."""
    return scale(x)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply elementwise, each factor saved where the other one wants a gradient."""
    out = _elementwise(a, b)
    need_a, need_b, shape = a.node is not None, b.node is not None, out.shape

    def backward(g: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> tuple[Tensor | None, ...]:
        if g.shape != shape:  # of the rows of a batch
            g = View(g, shape)
        grad_b = _elementwise(g, other_b) if need_b and other_b is not None else None
        return (_elementwise(g, other_a) if need_a and other_a is not None else None), grad_b

    a.tape.record(out, (a, b), (b if need_a else None, a if need_b else None), backward)
    return out


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide elementwise by a tensor of one element; its gradient goes through four tensors of the size of `a`."""
    out = _elementwise(a, b)
    need_a, need_b = a.node is not None, b.node is not None

    def backward(g: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_b = None
        if need_b and a is not None:
            factors = [_like(g) for _ in range(3)]  # a / b, that by b again, and minus the gradient
            grad_b = _like(g)
            del factors
        return (_like(g) if need_a else None), grad_b

    a.tape.record(out, (a, b), (a if need_b else None, b if need_a else None), backward)
    return out


def square(x: Tensor) -> Tensor:
    """Raise to the power 2, with PowBackward's three temporaries."""
    x = _fp32_under_autocast(x)
    out = _like(x)

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        power = _like(x)
        doubled = _like(power)
        return (_pointwise(g, g.shape, g.dtype, g.bytes + doubled.bytes),)

    x.tape.record(out, (x,), (x,), backward)
    return out


def mean_last(x: Tensor) -> Tensor:
    """Average over the last dimension, kept with size 1."""
    out = _pointwise(x, (*x.shape[:-1], 1), x.dtype, x.bytes)
    shape = x.shape
    x.tape.record(out, (x,), (), lambda g: (_pointwise(g, shape, g.dtype, g.bytes),))
    return out


def rsqrt(x: Tensor) -> Tensor:
    """Inverse square root; its result is saved."""
    x = _fp32_under_autocast(x)
    out = _like(x)

    def backward(g: Tensor, result: Tensor) -> tuple[Tensor | None, ...]:
        scaled = _like(g)
        cubed = _like(result)
        return (_pointwise(g, g.shape, g.dtype, scaled.bytes + cubed.bytes),)

    x.tape.record(out, (x,), (out.detach(),), backward)
    return out


def activation(x: Tensor) -> Tensor:
    """SiLU, GELU (exact or tanh) as one kernel: the input is saved."""
    out = _like(x)
    x.tape.record(out, (x,), (x,), lambda g, x: (_pointwise(g, g.shape, g.dtype, g.bytes + x.bytes),))
    return out


def activation_of_result(x: Tensor) -> Tensor:
    """ReLU, tanh, sigmoid: the result is saved, not the input."""
    out = _like(x)
    x.tape.record(out, (x,), (out.detach(),), lambda g, y: (_pointwise(g, g.shape, g.dtype, g.bytes + y.bytes),))
    return out


def erf(x: Tensor) -> Tensor:
    """Error function: the input is saved; backward squares, negates, exponentiates and scales it, all of which live on."""
    out = _like(x)

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        factors = [_like(x) for _ in range(4)]
        grad = _pointwise(g, g.shape, g.dtype, g.bytes + x.bytes)
        del factors
        return (grad,)

    x.tape.record(out, (x,), (x,), backward)
    return out


def clip(x: Tensor) -> Tensor:
    """Clip to a range of numbers: the input is saved; backward makes two masks, one into the other, and a zero."""
    out = _like(x)

    def backward(g: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        masks = [_pointwise(x, x.shape, BOOL, x.bytes) for _ in range(2)]
        zero = x.tape.new((1,), g.dtype)
        grad = _like(g)
        del masks, zero
        return (grad,)

    x.tape.record(out, (x,), (x,), backward)
    return out


def dropout(x: Tensor, p: float) -> Tensor:
    """Drop with probability `p` while a gradient is recorded: a byte a element of mask is saved; p = 0 is no operator."""
    if p == 0 or not (x.tape.grad_enabled or x.tape.drops):
        return x
    mask = _pointwise(x, x.shape, BOOL, 0)
    out = _like(x)

    def backward(g: Tensor, mask: Tensor) -> tuple[Tensor | None, ...]:
        return (_pointwise(g, g.shape, g.dtype, g.bytes + mask.bytes),)

    x.tape.record(out, (x,), (mask,), backward, saves_results=True)
    return out


def slice_last(x: Tensor, start: int, stop: int) -> Tensor:
    """View columns `start:stop` of the last dimension; backward fills a gradient of the whole width (none for all of it)."""
    if stop - start == x.shape[-1]:
        return x
    out = Tensor(x.tape, x.storage, (*x.shape[:-1], stop - start), x.dtype)
    out.strided = x.strided
    shape = x.shape
    x.tape.record(out, (x,), (), lambda g: (fitted(g, shape),))
    return out


def split_last(x: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """View the last dimension in parts; backward concatenates the parts' gradients, zeros where one has none."""
    outs = [Tensor(x.tape, x.storage, (*x.shape[:-1], width), x.dtype) for width in widths]

    def backward(grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        dtype = next(g.dtype for g in grads if g is not None)
        parts = [g if g is not None else x_new(outs_shape, dtype) for g, outs_shape in zip(grads, shapes, strict=True)]
        joined = _pointwise(parts[0], shape, dtype, sum(part.bytes for part in parts))
        joined.strided = False
        return (joined,)

    shape, shapes, x_new = x.shape, [out.shape for out in outs], x.tape.new
    node = x.tape.record(outs[0], (x,), (), backward, outputs=len(widths))
    for nr, out in enumerate(outs):
        out.node, out.nr = node, nr
    return outs


def split_fused(x: Tensor, parts: int) -> list[Tensor]:
    """View a projection fused head by head, [B, H, T, parts * E], in its parts; backward joins their gradients."""
    outs = split_last(x, (x.shape[-1] // parts,) * parts)
    for out in outs:
        out.strided = x.strided
    return outs


def concat(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate along `dim`; the gradients are views."""
    first = parts[0]
    dtype = first.dtype
    for part in parts[1:]:
        dtype = promote(dtype, part.dtype)
    size = sum(part.shape[dim] for part in parts)
    shape = list(first.shape)
    shape[dim] = size
    out = _pointwise(first, tuple(shape), dtype, sum(part.bytes for part in parts))
    out.strided = False
    shapes = [part.shape for part in parts]
    needed = [part.node is not None for part in parts]

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(_part(g, shape) if need else None for shape, need in zip(shapes, needed, strict=True))

    first.tape.record(out, tuple(parts), (), backward)
    return out


def _part(g: Tensor, shape: Shape) -> View:
    view = View(g, shape)
    view.strided = g.strided
    return view


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeat each key-value head (dimension 1 of B, H, T, D) for its group of query heads: a copy, none for 1.

    One head for all queries is repeated as a view, which is not in memory order where the batch is larger than 1.
    """
    if times == 1:
        return x
    batch, heads, length, width = x.shape
    if heads == 1:
        out = Tensor(x.tape, x.storage, (batch, times, length, width), x.dtype)
        out.strided = True
    else:
        out = _pointwise(x, (batch, heads * times, length, width), x.dtype, x.bytes)
        out.strided = False
    shape = x.shape

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        grad = _pointwise(g, shape, g.dtype, g.bytes)
        grad.strided = False
        return (grad,)

    x.tape.record(out, (x,), (), backward)
    return out


def softmax(x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """Softmax over the last dimension in `dtype`, under autocast in fp32 unless told; its result is saved.

    Only from fp16 to fp32 the kernel converts on the way.
    """
    if x.tape.autocast is not None:
        dtype = dtype or FP32
    if dtype is not None and not (x.dtype is FP16 and dtype is FP32):
        x = cast(x, dtype)
    out = _pointwise(x, x.shape, dtype or x.dtype, x.bytes)
    original = x.dtype

    def backward(g: Tensor, result: Tensor) -> tuple[Tensor | None, ...]:
        grad = _pointwise(g, g.shape, original, g.bytes + result.bytes)
        _like(g)  # the kernel wants the product of gradient and result beside it
        return (grad,)

    x.tape.record(out, (x,), (out.detach(),), backward)
    return out


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of `weight` [V, D]; a dense gradient of the whole table where it trains."""
    out = _pointwise(weight, (*ids.shape, weight.shape[-1]), weight.dtype, ids.bytes)
    shape, dtype = weight.shape, weight.dtype
    weight.tape.record(out, (weight,), (ids,), lambda g, ids: (_pointwise(g, shape, dtype, g.bytes),))
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """torch.nn.LayerNorm: one kernel, saving the input and fp32 mean and inverse deviation per row."""
    if x.tape.autocast is not None:
        x = cast(x, FP32)
        weight = weight and cast(weight, FP32)
        bias = bias and cast(bias, FP32)
    tape = x.tape
    out = _like(x)
    rows = (*x.shape[:-1], 1)
    mean, rstd = tape.new(rows, FP32), tape.new(rows, FP32)
    inputs = (x, weight, bias)
    needs = tuple(t is not None and t.node is not None for t in inputs)

    def backward(g: Tensor, x: Tensor, weight: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _pointwise(g, x.shape, x.dtype, g.bytes + x.bytes) if needs[0] else None
        grad_w = tape.new(weight.shape, weight.dtype) if weight is not None and needs[1] else None
        grad_b = tape.new(weight.shape, weight.dtype) if weight is not None and needs[2] else None
        if grad_w is not None or grad_b is not None:
            tape.launch(g.bytes + x.bytes)
        return grad_x, grad_w, grad_b

    tape.record(out, inputs, (x, weight, mean, rstd), backward, saves_results=True)
    return out


def layer_norm_of_view(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm of a view that is not in memory order: the kernels work on copies of it, and of the gradient."""
    x = _fp32_under_autocast(x)
    copied = x.tape.new(x.shape, x.dtype)
    out = layer_norm(x, weight, bias)
    del copied
    out.strided = False
    if isinstance(out.node, Node):
        of_copy = out.node.backward

        def backward(g: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
            copies = [g.tape.new(g.shape, each.dtype) for each in (saved[0], g) if each.strided]
            grads = of_copy(g, *saved)
            del copies
            return grads

        out.node.backward = backward
    return out


def single_heads(x: Tensor) -> list[Tensor]:
    """View each head of [B, H, T, E] alone, [B, 1, T, E]; backward concatenates the heads' gradients."""
    batch, heads, tokens, width = shape = x.shape
    outs = [Tensor(x.tape, x.storage, (batch, 1, tokens, width), x.dtype) for _ in range(heads)]

    def backward(given: list[Tensor | None] | Tensor) -> tuple[Tensor | None, ...]:
        grads = given if isinstance(given, list) else [given]  # a list only of several
        first = next(g for g in grads if g is not None)
        return (_pointwise(first, shape, first.dtype, first.bytes * heads),)

    node = x.tape.record(outs[0], (x,), (), backward, outputs=heads)
    for nr, out in enumerate(outs):
        out.node, out.nr = node, nr
    return outs


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over rows of [N, V]: the log-softmax is saved, and backward makes two more of its size.

    Autocast leaves the log-softmax in the dtype of the logits and casts what the loss reads to fp32.
    """
    tape, shape = logits.tape, logits.shape
    log_probs = _pointwise(
        logits, shape, logits.dtype, 3 * logits.bytes
    )  # a long row is read once each for max, sum, result
    tape.record(
        log_probs,
        (logits,),
        (log_probs.detach(),),
        lambda g, result: (_pointwise(g, g.shape, g.dtype, g.bytes + result.bytes),),
    )
    log_probs = _fp32_under_autocast(log_probs)
    loss, weight = tape.new((1,), log_probs.dtype), tape.new((1,), log_probs.dtype)
    tape.launch(labels.bytes)

    def backward(g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (_pointwise(g, shape, g.dtype, 0),)

    tape.record(loss, (log_probs,), (log_probs.detach(), labels, weight), backward)
    return loss


def _fp32_under_autocast(x: Tensor) -> Tensor:
    return x if x.tape.autocast is None else cast(x, FP32)
