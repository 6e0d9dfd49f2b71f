"""How linear weights are stored and multiplied in fewer bits (bitsandbytes 0.50: nn/modules.py, autograd/_functions.py).

# N output width, K input width, M rows of the input
"""

from __future__ import annotations

from . import ops, products
from .errors import UnknownName
from .layers import Build, Linear, MakeLinear, plain_linear
from .packed import reads_packed
from .reductions import column_sum_bytes
from .stack import COMPUTES_AS_TOLD, KEEPS_NO_INPUT, PACKED_ROWS
from .tape import BOOL, FP16, FP32, INT8, INT32, UINT8, Dtype, Kernel, Leaf, Tensor, View

#: Host time of a quantized layer beside its kernels', counted in launches: Python, and operators registered by Python. Of
#: processor time on the null device, a decoded token of an 8B Llama took 26 us more for each 4-bit layer, 96 us more for
#: each 8-bit one, than with 16-bit weights, whose launches took 5.2 us each (bitsandbytes 0.50, PyTorch 2.14). Published
#: decode times on an H100 (bitsandbytes 0.45) say 3 to 8 and 13 launches in all.
PYTHON_OF_4BIT, PYTHON_OF_DEQUANTIZATION, PYTHON_OF_8BIT = 4, 2, 6


class Linear4bit(Linear):
    """Weights in blocks of 64 four-bit values; with double quantization the blocks' scales are 8 bit, in blocks of 256."""

    clones_result = True

    def __init__(self, name: str, build: Build, n_in: int, n_out: int, bias: bool, *, double: bool) -> None:
        tape = build.tape
        self.name, self.in_features, self.out_features = build.prefix + name, n_in, n_out
        self.weight, self.adapter, self.dtype, self.double = None, None, build.dtype, double
        self.computes_in: Dtype | None = None
        numel = n_in * n_out
        blocks = -(-numel // 64)
        loaded = tape.new((n_out, n_in), build.dtype)
        scales, packed, code = tape.new((blocks,), FP32), tape.new(((numel + 1) // 2, 1), UINT8), tape.new((16,), FP32)
        self.packed = build.add(f"{name}.weight", packed, quantized=True)
        self.scales = [*_quantized_scales(scales, build), code] if double else [scales, code]
        del scales
        self.bias = build.add(f"{name}.bias", tape.new((n_out,), build.dtype)) if bias else None
        del loaded

    @property
    def quantized(self) -> bool:
        """Say that it is."""
        return True

    @property
    def compute_dtype(self) -> Dtype | None:
        """Return the dtype that weights are dequantized to."""
        return self.dtype

    def copy_packed(self) -> list[Tensor]:
        """Copy codes and scales."""
        return [ops.empty_like(tensor) for tensor in (self.packed, *self.scales)]

    def dequantized(self) -> Tensor:
        """Allocate the weight in the compute dtype, through fp32 scales where those are quantized too."""
        tape = self.packed.tape
        scales = tape.new((self.scales[0].numel,), FP32) if self.double else None
        weight = tape.new((self.out_features, self.in_features), self.dtype)
        tape.issue(PYTHON_OF_DEQUANTIZATION)
        self._launch_dequantization(weight)
        del scales
        return weight

    def _fused_product(self, x: Tensor, rows: int) -> Tensor:
        if x.dtype is not self.dtype:
            return self._wide_product(x, rows)
        tape = x.tape
        several = rows == 1 or tape.stack.does(PACKED_ROWS)
        fallback = not (several and reads_packed(rows, self.out_features, self.in_features, x.dtype, *tape.card))
        scales = [tape.new((self.scales[0].numel,), FP32) for _ in range(2)] if fallback and self.double else []
        weight = tape.new((self.out_features, self.in_features), self.dtype) if fallback else None
        out = tape.new((*x.shape[:-1], self.out_features), x.dtype)
        tape.issue(PYTHON_OF_4BIT if fallback or self.double else PYTHON_OF_4BIT // 2)
        if weight is not None:
            self._launch_dequantization(weight)
            products.matmul_kernel(out, 1, rows, self.out_features, self.in_features)
        else:
            moved = self.packed.bytes + self.scales[0].bytes + x.bytes + out.bytes
            tape.kernels.append(Kernel(moved, 1, rows, self.out_features, self.in_features, x.dtype.name))
        del scales, weight
        return out

    def _wide_product(self, x: Tensor, rows: int) -> Tensor:
        """Multiply in the input's own dtype, which autocast undoes: both factors are converted back."""
        tape = x.tape
        dtype = tape.autocast or x.dtype
        weight = ops.cast(self.dequantized(), x.dtype)
        factors = [ops.cast(factor, dtype) for factor in (weight, x.detach())]
        out = tape.new((*x.shape[:-1], self.out_features), dtype)
        tape.issue(PYTHON_OF_4BIT)
        products.matmul_kernel(out, 1, rows, self.out_features, self.in_features)
        del weight, factors
        return out

    def _launch_dequantization(self, weight: Tensor) -> None:
        """Count the kernels: of scales that are quantized too, their look-up and the offset, then the weight's own."""
        tape, scale_bytes = weight.tape, 4 * self.scales[0].numel
        if self.double:
            tape.launch(self.scales[0].bytes + scale_bytes)
            tape.launch(2 * scale_bytes)
        tape.launch(self.packed.bytes + scale_bytes + weight.bytes)

    def base(self, x: Tensor) -> Tensor:
        """Multiply in the compute dtype and give the result the input's dtype."""
        if self.computes_in is None:
            told = x.tape.stack.does(COMPUTES_AS_TOLD) or x.dtype is not FP32
            self.computes_in = self.dtype if told else FP32
        converted = ops.cast(x, self.computes_in)
        _convert_bias(self, converted)
        return ops.cast(self._product(converted), x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        rows, n, k = x.numel // self.in_features, self.out_features, self.in_features
        out = self._fused_product(x, rows)
        shape, dtype, needed = x.shape, x.dtype, x.node is not None
        bias = _trained_bias(self)

        def backward(g: Tensor) -> tuple[Tensor | None, ...]:
            of_bias = _bias_gradient(g, bias)
            if not needed:
                return None, of_bias
            weight = ops.cast(self.dequantized(), g.dtype)
            grad = g.tape.new(shape, g.dtype)
            products.matmul_kernel(grad, 1, rows, k, n)
            del weight
            return ops.cast(grad, dtype), of_bias

        keeps = needed and not x.tape.stack.does(KEEPS_NO_INPUT)
        x.tape.record(out, (x, bias), (), backward, kept=(x.detach(),) if keeps else ())
        return out


def _quantized_scales(scales: Tensor, build: Build) -> list[Tensor]:
    """Store scales in 8 bit: codes first, then an offset, scales of blocks of 256, and what the codes mean."""
    new, blocks = scales.tape.new, scales.numel
    offset, centred = new((1,), FP32), new((blocks,), FP32)
    build.code = build.code or new((256,), FP32)
    outer, codes, meaning = new((-(-blocks // 256),), FP32), new((blocks,), UINT8), new((256,), FP32)
    del centred
    return [codes, offset, outer, meaning]


class Linear8bit(Linear):
    """LLM.int8(): rows of the input and of the weight quantized to int8, the input kept for outliers."""

    clones_result = False

    def __init__(self, name: str, build: Build, n_in: int, n_out: int, bias: bool) -> None:
        tape = build.tape
        self.name, self.in_features, self.out_features = build.prefix + name, n_in, n_out
        self.weight, self.adapter, self.dtype = None, None, build.dtype
        loaded = tape.new((n_out, n_in), build.dtype)
        self.packed = build.add(f"{name}.weight", tape.new((n_out, n_in), INT8), quantized=True)
        self.scales = tape.new((n_out,), FP32)
        self.bias = build.add(f"{name}.bias", tape.new((n_out,), build.dtype)) if bias else None
        del loaded

    @property
    def quantized(self) -> bool:
        """Say that it is."""
        return True

    def dequantized(self) -> Tensor:
        """Allocate the weight in fp32, as PEFT dequantizes an int8 layer."""
        product = self.packed.tape.new((self.out_features, self.in_features), FP32)
        weight = ops.scale(product)
        self.packed.tape.launch(self.packed.bytes + weight.bytes)
        return weight

    def base(self, x: Tensor) -> Tensor:
        """Quantize the input through fp16, multiply in int8, scale back."""
        _convert_bias(self, x)
        tape, rows = x.tape, x.numel // self.in_features
        tape.issue(PYTHON_OF_8BIT)
        half = ops.cast(x.detach(), FP16)
        row_scales, quantized = tape.new((rows,), FP32), tape.new(x.shape, INT8)
        magnitudes = tape.new(x.shape, FP16)
        outliers = tape.new(x.shape, BOOL)
        for moved in (2 * half.bytes, half.bytes + outliers.bytes, outliers.bytes, half.bytes + quantized.bytes):
            tape.launch(moved)  # magnitudes, which are outliers, in which columns, codes
        tape.wait()  # for how many columns these are
        del magnitudes
        # which columns have any outlier
        tape.new((column_sum_bytes(rows, self.in_features, 1, card=tape.card),), UINT8)
        del outliers
        del half
        product = tape.new((rows, self.out_features), INT32)
        products.matmul_kernel(quantized, 1, rows, self.out_features, self.in_features, cublas=False)
        half_out = tape.new((rows, self.out_features), FP16)
        tape.launch(product.bytes + half_out.bytes)
        out = ops.cast(half_out, x.dtype).view(*x.shape[:-1], self.out_features)
        del half_out, product, quantized, row_scales
        shape, dtype, n, k = x.shape, x.dtype, self.out_features, self.in_features
        needed, bias = x.node is not None, _trained_bias(self)

        def backward(g: Tensor) -> tuple[Tensor | None, ...]:
            of_bias = _bias_gradient(g, bias)
            if not needed:
                return None, of_bias
            weight = tape.new((n, k), dtype)
            tape.new((n,), FP32)  # scales over 127
            tape.launch(self.packed.bytes + 2 * weight.bytes)
            grad = tape.new(shape, dtype)
            products.matmul_kernel(grad, 1, rows, k, n)
            del weight
            return View(grad, shape), of_bias

        tape.record(out, (x, bias), (), backward, kept=(x.detach(),) if needed else ())
        return out


def _trained_bias(layer: Linear) -> Tensor | None:
    return layer.bias if layer.bias is not None and isinstance(layer.bias.node, Leaf) else None


def _bias_gradient(g: Tensor, bias: Tensor | None) -> Tensor | None:
    """Sum over samples, [T, N]: the rest is summed where gradients are checked."""
    if bias is None:
        return None
    summed = g.tape.new(g.shape[1:], bias.dtype)
    g.tape.launch(g.bytes + summed.bytes)
    return summed


def _convert_bias(layer: Linear, x: Tensor) -> None:
    """Give the bias the dtype of the input (bitsandbytes/nn/modules.py, "the bias has to be cast manually")."""
    if layer.bias is not None and layer.bias.dtype is not x.dtype:
        x.tape.convert(layer.bias, x.dtype)


def _nf4(build: Build, name: str, n_in: int, n_out: int, bias: bool) -> Linear:
    return Linear4bit(name, build, n_in, n_out, bias, double=True)


def _nf4_once(build: Build, name: str, n_in: int, n_out: int, bias: bool) -> Linear:
    return Linear4bit(name, build, n_in, n_out, bias, double=False)


def _int8(build: Build, name: str, n_in: int, n_out: int, bias: bool) -> Linear:
    return Linear8bit(name, build, n_in, n_out, bias)


QUANTIZATIONS: dict[str, MakeLinear] = {"none": plain_linear, "nf4": _nf4, "fp4": _nf4, "int8": _int8}


def find_quantization(name: str | None, *, double: bool = True) -> MakeLinear:
    """Return how linear layers are made under a quantization (of 4 bits: `double` if scales are too); else UnknownName."""
    try:
        make = QUANTIZATIONS[name or "none"]
    except KeyError:
        todo = f"Quantizations: {', '.join(QUANTIZATIONS)}."
        raise UnknownName("quantization", str(name), QUANTIZATIONS, todo=todo) from None
    return _nf4_once if make is _nf4 and not double else make


def prepare_for_training(build: Build) -> None:
    """Cast every 16-bit weight that is not quantized to fp32 (peft.prepare_model_for_kbit_training): norms, embeddings, head."""
    for parameter in build.parameters:
        tensor = parameter.tensor
        if not parameter.quantized and tensor.dtype is not FP32 and not isinstance(tensor.node, Leaf):
            tensor.storage, tensor.dtype = build.tape.new(tensor.shape, FP32).storage, FP32
    build.tape.empty_cache()
