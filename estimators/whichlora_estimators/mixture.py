"""What a mixture of experts computes beside its products: choosing experts, bringing tokens in their order and back.

States transformers/integrations/moe.py (grouped_mm_experts_forward, the default of every device) and the routers of
models/mixtral, qwen2_moe and qwen3_moe, read in 5.23, with the operators of PyTorch 2.14 under them. Every size follows from the
number of tokens and of experts per token: how evenly the tokens spread does not matter.

# N tokens, E experts, K experts a token, S = N K pairs, D width, I inner width, R rank
"""

from __future__ import annotations

from . import ops, products
from .tape import FP32, INT32, INT64, UINT8, Shape, Tensor, View

#: From here on PyTorch's own grouped product runs, which below falls back to one by one into zeros.
GROUPED_CAPABILITY = (8, 0)
#: Workspace of the running sum over experts.
_SCAN_BYTES = 1023


def take_rows(x: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """Take rows of `x` by integers; backward adds them up into zeros, with the indices sorted beside."""
    tape, whole = x.tape, x.shape
    out = tape.new(shape, x.dtype)
    tape.launch(2 * out.bytes + index.bytes)

    def backward(g: Tensor, index: Tensor) -> tuple[Tensor | None, ...]:
        grad = tape.new(whole, g.dtype)
        _sort_indices(index)
        tape.launch(2 * g.bytes + grad.bytes)
        return (grad,)

    tape.record(out, (x,), (index,), backward)
    return out


def add_rows(total: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Add rows [S, D] to those of `total` [N, D] that integers name, in place (index_add_)."""
    tape, shape = total.tape, rows.shape
    out = total.view(*total.shape)
    tape.launch(2 * rows.bytes + rows.bytes)
    need_total, need_rows = total.node is not None, rows.node is not None

    def backward(g: Tensor, index: Tensor) -> tuple[Tensor | None, ...]:
        taken = tape.new(shape, g.dtype) if need_rows else None
        return g if need_total else None, taken

    tape.record(out, (total, rows), (index,), backward)
    return out


def rows_by_expert(pairs: int, experts: int) -> list[int]:
    """Return how many of `pairs` rows each expert gets where all get as many."""
    share, rest = divmod(pairs, experts)
    return [share + (expert < rest) for expert in range(experts)]


def _sort_indices(index: Tensor) -> None:
    """Allocate what index_put_ does with accumulation (aten/src/ATen/native/cuda/Indexing.cu)."""
    new, shape = index.tape.new, index.shape
    wrapped = new(shape, INT64)
    linear = new(shape, INT64)
    del wrapped
    ordered, origin = new(shape, INT64), new(shape, INT64)
    counted = new(shape, INT64)
    index.tape.launch(6 * index.bytes)
    del counted, origin, ordered, linear


def largest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row [N, E] and where they are, [N, K] each (topk)."""
    tape, shape = probabilities.tape, probabilities.shape
    values = tape.new((shape[0], count), probabilities.dtype)
    places = tape.new(values.shape, INT64)
    tape.launch(probabilities.bytes + values.bytes + places.bytes)

    def backward(g: Tensor, places: Tensor) -> tuple[Tensor | None, ...]:
        return (ops.fitted(g, shape),)

    tape.record(values, (probabilities,), (places,), backward, saves_results=True)
    return values, places


def shares(weights: Tensor) -> Tensor:
    """Divide each row [N, K] by its sum, in place: autograd keeps a copy of what was there."""
    tape = weights.tape
    rows = (weights.shape[0], 1)
    total = tape.new(rows, weights.dtype)
    tape.record(total, (weights,), (), lambda g: (Tensor(tape, g.storage, weights_shape, g.dtype),))
    weights_shape = weights.shape
    learned = weights.node is not None and tape.grad_enabled
    before = ops.empty_like(weights.detach()) if learned else None
    out = Tensor(tape, weights.storage, weights.shape, weights.dtype)
    tape.launch(2 * weights.bytes)

    def backward(g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factors = [ops.empty_like(g) for _ in range(3)]
        of_total = ops.empty_like(g)
        del factors
        of_weights = ops.empty_like(g)
        return of_weights, of_total

    tape.record(out, (weights, total), (before, total), backward)
    return out


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows [S, I], sorted by expert, with each expert's weight of [E, D, I]: [S, D]."""
    x = ops.cast(x, weight.dtype)
    tape, shape_x, shape_w = x.tape, x.shape, weight.shape
    out = tape.new((shape_x[0], shape_w[1]), x.dtype)
    _launch(out, shape_x[0], shape_w)
    need_x, need_w = x.node is not None, weight.node is not None
    fast = tape.compute_capability >= GROUPED_CAPABILITY

    def backward(g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        early_x = None if fast else tape.new(shape_x, g.dtype)  # the fallback makes both, wanted or not
        grad_w = tape.new(shape_w, g.dtype) if need_w or not fast else None
        grad_x = tape.new(shape_x, g.dtype) if need_x and fast else early_x
        for grad in (grad_x, grad_w):
            if grad is not None:
                _launch(grad, shape_x[0], shape_w)
        return grad_x if need_x else None, grad_w if need_w else None

    keep_x, keep_w = need_w or not fast, need_x or not fast
    tape.record(out, (x, weight), (x if keep_x else None, weight if keep_w else None), backward)
    return out


def _launch(out: Tensor, rows: int, weight: Shape) -> None:
    """Count a product for each expert that has rows; even routing gives each as many."""
    busy = min(weight[0], rows)
    products.matmul_kernel(out, busy, -(-rows // busy), *weight[1:], cublas=False)


def folded(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Add the products of [E, D, R] and [E, R, I] to a weight [E, D, I] (baddbmm); the first lies in another memory order."""
    tape = weight.tape
    out = tape.new(weight.shape, weight.dtype)
    tape.new(up.shape, up.dtype)  # a copy in order
    (experts, n, rank), k = up.shape, down.shape[2]
    products.matmul_kernel(out, experts, n, k, rank)
    need_up, need_down = up.node is not None, down.node is not None
    shape_up, shape_down = up.shape, down.shape

    def backward(g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_up = grad_down = None
        if need_up:
            product = tape.new(shape_up, g.dtype)
            products.matmul_kernel(product, experts, n, rank, k)
            grad_up = ops.scale(product)
            del product
        if need_down:
            product = tape.new(shape_down, g.dtype)
            tape.new(shape_up, g.dtype)
            products.matmul_kernel(product, experts, rank, k, n)
            grad_down = ops.scale(product)
        return None, grad_up, grad_down

    tape.record(out, (weight, up, down), (None, up if need_down else None, down if need_up else None), backward)
    return out


def by_expert(weight: Tensor, experts: int) -> Tensor:
    """View B of all experts, [D, R E], as [E, D, R]; the gradient is copied back into order."""
    width, ranks = shape = weight.shape
    seen = Tensor(weight.tape, weight.storage, (experts, width, ranks // experts), weight.dtype)
    weight.tape.record(seen, (weight,), (), lambda g: (ops.fitted(g, shape),))
    return seen


class Routed:
    """Tokens in the order of their experts: what stays alive until the experts are done."""

    def __init__(self, places: Tensor, experts: int) -> None:
        new, pairs = places.tape.new, (places.numel,)
        self.ids, self.order = new(pairs, INT64), new(pairs, INT64)
        counted = new(pairs, INT64)
        places.tape.launch(8 * self.ids.bytes)
        del counted
        self.pairs = pairs
        self.experts = experts

    def count(self) -> None:
        """Count the rows of each expert."""
        new = self.order.tape.new
        self.converted = new(self.pairs, INT32)
        self.counts = new((self.experts,), INT32)
        self.offsets = new((self.experts,), INT32)
        new((_SCAN_BYTES,), UINT8)

    def source(self) -> Tensor:
        """Return which token each row is of."""
        return self.order.tape.new(self.pairs, INT64)

    def back(self) -> Tensor:
        """Return where each pair's row is."""
        new = self.order.tape.new
        inverse = new(self.pairs, INT64)
        new(self.pairs, INT64)
        return inverse


def summed(x: Tensor, tokens: int) -> Tensor:
    """Sum the K rows of each token: [S, D] to [N, D], in fp32 under autocast; the gradient is written out K times."""
    shape = x.shape
    out = x.tape.new((tokens, shape[1]), x.dtype if x.tape.autocast is None else FP32)
    x.tape.launch(x.bytes + out.bytes)
    dtype, tape = x.dtype, x.tape

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        if shape[0] == tokens:  # of one row a view is enough
            return (View(g, shape),)
        grad = tape.new(shape, dtype)
        tape.launch(g.bytes + grad.bytes)
        return (grad,)

    tape.record(out, (x,), (), backward)
    return out


def softmax_of_scores(scores: Tensor, *, converts_first: bool) -> Tensor:
    """Return fp32 probabilities [N, E] of router scores; Mixtral converts the scores in a step of its own."""
    return ops.softmax(ops.cast(scores, FP32)) if converts_first else ops.softmax(scores, FP32)
