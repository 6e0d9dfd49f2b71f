"""The launches of each operator that PyTorch runs on a card that computes nothing: what they move, what they multiply.

Operators are seen where PyTorch dispatches them, forward and backward alike; how many kernels each of them launches is
the null device's count. So whatever a script calls is seen, whether or not the operators below are known by name: one
that is not moves its inputs and its results once.

# m x n result, k summed over; all of it `batch` times
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from whichlora_estimators.quantization import PYTHON_OF_4BIT
from whichlora_estimators.tape import Kernel

#: dtypes that tensor cores or fp32 units multiply, as the roofline spells them.
DTYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp32",
    "torch.int8": "int8",
}
#: Operators that write their first argument without reading it.
_WRITES_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_")
#: Operators that look up as much as they return, not all that they are given.
_LOOKS_UP = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index", "aten::nll_loss_forward")

#: From the tensors given, the tensors made and all arguments to the launch that does the work.
Describe = Callable[[list[Any], list[Any], tuple[Any, ...]], "Kernel | None"]


def kernels_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, launches: int) -> list[Kernel]:
    """Return the launches of an operator by its name ("aten::mm"), as many as were counted; the first does the work."""
    if not launches:
        return []
    given, made = list(_tensors((*args, *kwargs.values()))), list(_tensors((result,)))
    if name == "bitsandbytes::gemm_4bit":
        return _four_bit_kernels(given, made, args, launches)
    known = _KNOWN.get(name)
    kernel = known(given, made, args) if known and given and made else None
    if kernel is not None:
        return [kernel, *[Kernel(1)] * (launches - 1)]
    first_bytes = sum(_bytes(tensor) for tensor in _tensors(args[:1]))
    moved = _moved_bytes(name, given, made, first_bytes)
    return [Kernel(moved // launches)] * launches


def _four_bit_kernels(given: list[Any], made: list[Any], args: tuple[Any, ...], launches: int) -> list[Kernel]:
    """Tell a product that reads the packed weight, one launch, from one behind a dequantization."""
    x, out = args[0], made[0]
    k, n = x.shape[-1], out.shape[-1]
    rows, width = x.numel() // k, x.element_size()
    packed_bytes, dtype = n * k // 2, DTYPES.get(str(x.dtype), "fp32")
    host = [Kernel(0)] * PYTHON_OF_4BIT
    if launches == 1:
        return [*host, Kernel(packed_bytes + _bytes(x) + _bytes(out), 1, rows, n, k, dtype)]
    whole = n * k * width
    product = Kernel(whole + _bytes(x) + _bytes(out), 1, rows, n, k, dtype)
    scales = [Kernel(n * k // 64 * 8)] * (launches - 2)
    return [*host, *scales, Kernel(packed_bytes + whole), product]


def tensors_in(values: Iterable[Any]) -> int:
    """Count tensors on the card, those in lists too."""
    return sum(1 for _ in _tensors(values))


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif hasattr(value, "element_size") and hasattr(value, "device") and value.device.type == "cuda":
            yield value


def _bytes(tensor: Any) -> int:
    """Return what a tensor's elements take, repeated ones (of an expanded view) once."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _moved_bytes(name: str, given: list[Any], made: list[Any], first_bytes: int) -> int:
    written = sum(_bytes(tensor) for tensor in made)
    if name in _LOOKS_UP:
        return 2 * written
    if name in _WRITES_ONLY:
        given = given[1:]
    if name.startswith("aten::_foreach") and not made:  # in place: the first list is written too
        written = first_bytes
    read = {(tensor.data_ptr(), tensor.numel()): _bytes(tensor) for tensor in given}
    return written + sum(read.values())


def _product(a: Any, b: Any, made: list[Any]) -> Kernel:
    """Describe [.., M, K] x [.., K, N]."""
    batch = a.shape[0] if a.dim() == 3 else 1
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    moved = _bytes(a) + _bytes(b) + sum(_bytes(tensor) for tensor in made)
    return Kernel(moved, batch, m, n, k, DTYPES.get(str(a.dtype), "fp32"))


def _mm(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
    return _product(args[0], args[1], made)


def _linear(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
    """Describe x [.., K] times a weight [N, K]."""
    x, weight = args[0], args[1]
    moved = sum(_bytes(tensor) for tensor in (*given, *made))
    k = x.shape[-1]
    return Kernel(moved, 1, x.numel() // k, weight.shape[0], k, DTYPES.get(str(x.dtype), "fp32"))


def _matmul(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
    """Describe [.., M, K] times [.., K, N] of any dimensions."""
    a, b = args[0], args[1]
    if b.dim() <= 2:
        moved = sum(_bytes(tensor) for tensor in (*given, *made))
        n = b.shape[1] if b.dim() == 2 else 1
        return Kernel(moved, 1, a.numel() // a.shape[-1], n, a.shape[-1], DTYPES.get(str(a.dtype), "fp32"))
    m, k = a.shape[-2], a.shape[-1]
    moved = sum(_bytes(tensor) for tensor in (*given, *made))
    return Kernel(moved, a.numel() // (m * k), m, b.shape[-1], k, DTYPES.get(str(a.dtype), "fp32"))


def _addmm(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
    return _product(args[1], args[2], made)


def _attention(products: int, first: int, causal_at: int) -> Describe:
    """Describe fused attention of [B, H, T, E]: so many products of queries and keys, half of each where causal.

    Queries are argument number `first`; number `causal_at` says whether only earlier keys are seen.
    """

    def describe(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
        q, key = args[first], args[first + 1]
        batch, heads, queries, width = q.shape
        keys = key.shape[2]
        k = width * products
        moved = sum(_bytes(tensor) for tensor in (*given, *made))
        causal = len(args) > causal_at and args[causal_at] is True
        return Kernel(moved, batch * heads, queries, keys, k // 2 if causal else k, DTYPES[str(q.dtype)], True)

    return describe


def _int8_product(given: list[Any], made: list[Any], args: tuple[Any, ...]) -> Kernel | None:
    """Describe x [.., K] times a weight [N, K] in int8."""
    a, b = args[0], args[1]
    moved = _bytes(a) + _bytes(b) + sum(_bytes(tensor) for tensor in made)
    return Kernel(moved, 1, a.numel() // a.shape[-1], b.shape[0], a.shape[-1], "int8")


_KNOWN: dict[str, Describe] = {
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::baddbmm": _addmm,
    "aten::_addmm_activation": _addmm,
    "aten::_scaled_dot_product_flash_attention": _attention(2, 0, 4),
    "aten::_scaled_dot_product_flash_attention_backward": _attention(5, 1, 11),
    "aten::_scaled_dot_product_efficient_attention": _attention(2, 0, 6),
    "aten::_scaled_dot_product_efficient_attention_backward": _attention(5, 1, 11),
    "aten::scaled_dot_product_attention": _attention(2, 0, 5),
    "bitsandbytes::int8_linear_matmul": _int8_product,
    "bitsandbytes::int8_linear_matmul.out": _int8_product,
}
