"""Matrix products as PyTorch runs them on CUDA: what each allocates, saves and moves, and what autocast casts for it.

Sources as in ops.py; the order of gradients, and which of them are views, is that of the products' formulas there.
"""

from __future__ import annotations

from . import ops
from .tape import Kernel, Leaf, Shape, Tensor, View


def matmul_kernel(out: Tensor, batch: int, m: int, n: int, k: int, *, cublas: bool = True) -> None:
    """Record the launch of a (batched) matrix product of m x k and k x n; PyTorch's first one allocates a workspace."""
    moved = batch * (m * k + k * n + m * n) * out.dtype.bytes
    if cublas and out.tape.workspace_due:
        out.tape.allocate_workspace()
    out.tape.kernels.append(Kernel(moved, batch, m, n, k, out.dtype.name))


#: Dimensions of a matrix.
MATRIX = 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply [..., K] by a weight [N, K]: the weight is saved where x wants a gradient, x where the weight does."""
    given = x, weight, bias  # alive until the call returns, as arguments are
    if x.tape.autocast is not None:
        bias = bias and _autocast(bias)  # from the last argument to the first
        weight = _autocast(weight)
        x = _autocast(x)
    n, k = weight.shape
    m = x.numel // k
    out = x.tape.new((*x.shape[:-1], n), x.dtype)
    matmul_kernel(out, 1, m, n, k)
    need_x, need_w, need_b = (t is not None and t.node is not None for t in (x, weight, bias))
    shape_x, with_bias = x.shape, bias is not None

    def backward(g: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_w = _weight_gradient(g, n, k) if need_w and not with_bias else None
        grad_x = _input_gradient(g, shape_x, n) if need_x else None
        if need_w and with_bias:
            grad_w = _weight_gradient(g, n, k)
        return grad_x, grad_w, g if need_b else None  # the bias's is summed where gradients are checked

    x.tape.record(out, (x, weight, bias), (x if need_w else None, weight if need_x else None), backward)
    del given
    return out


def _weight_gradient(g: Tensor, n: int, k: int) -> Tensor:
    grad = g.tape.new((n, k), g.dtype)
    matmul_kernel(grad, 1, n, k, g.numel // n)
    return View(grad, grad.shape)


def _input_gradient(g: Tensor, shape: Shape, n: int) -> Tensor:
    grad = g.tape.new(shape, g.dtype)
    matmul_kernel(grad, 1, g.numel // n, shape[-1], n)
    return grad if len(shape) <= MATRIX else View(grad, shape)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply [..., M, K] by [..., K, N], batch for batch; what lies in another memory order is copied first."""
    if a.tape.autocast is not None:
        b = _autocast(b)
        a = _autocast(a)
    left, right = _batched(a), _batched(b)
    m, k = a.shape[-2:]
    n = b.shape[-1]
    batch = a.numel // (m * k)
    out = a.tape.new((*a.shape[:-1], n), a.dtype)
    matmul_kernel(out, batch, m, n, k)
    need_a, need_b = a.node is not None, b.node is not None
    shape_a, shape_b = a.shape, b.shape

    def backward(g: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_a = grad_b = None
        if need_b:
            grad_b = g.tape.new(shape_b, g.dtype)
            matmul_kernel(grad_b, batch, k, n, m)
        if need_a:
            grad_a = g.tape.new(shape_a, g.dtype)
            matmul_kernel(grad_a, batch, m, k, n)
        return grad_a, grad_b

    a.tape.record(out, (left, right), (left if need_b else None, right if need_a else None), backward)
    seen = Tensor(a.tape, out.storage, out.shape, out.dtype)
    a.tape.record(seen, (out,), (), lambda g: (ops.copy(g) if g.strided and g.shape[0] > 1 else g,))
    return seen


def _batched(x: Tensor) -> Tensor:
    """Make batch and heads one dimension, as a batched product needs: a copy where memory order forbids a view."""
    return ops.copy(x) if x.strided and x.shape[0] > 1 else x


def turned(weight: Tensor) -> Tensor:
    """View a weight as its transpose is viewed, which autocast does not know for one: the shape stays, for `linear`."""
    seen = Tensor(weight.tape, weight.storage, weight.shape, weight.dtype)
    weight.tape.record(seen, (weight,), (), lambda g: (View(g, g.shape),))
    return seen


def transpose(x: Tensor) -> Tensor:
    """View [..., M, N] as [..., N, M]."""
    seen = Tensor(x.tape, x.storage, (*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
    seen.strided = x.strided
    shape = x.shape
    x.tape.record(seen, (x,), (), lambda g: (_turned_back(g, shape),))
    return seen


def _turned_back(g: Tensor, shape: Shape) -> Tensor:
    """View the gradient of a transpose, column by column: heads of it can be joined without a copy."""
    view = View(g, shape)
    view.strided = True
    return view


def _autocast(x: Tensor) -> Tensor:
    """Cast an input of a matrix product as autocast does: a trained weight is cast once and kept until autocast ends."""
    tape = x.tape
    target = tape.autocast
    if target is None or x.dtype is target or x.dtype.rank < target.rank:
        return x
    if not isinstance(x.node, Leaf):
        return ops.cast(x, target)
    kept = tape.autocast_weights.get(id(x))
    if kept is None:
        kept = tape.autocast_weights[id(x)] = ops.cast(x, target)
    return kept
