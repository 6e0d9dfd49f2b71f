"""What recipes are made of: the parameters of a model under construction, linear layers, norms, rotary embedding.

# B batch, T tokens, D width, H heads, K key-value heads, E head width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from . import ops, products
from .errors import Unsupported
from .tape import FP16, FP32, INT64, Dtype, Leaf, Shape, Tape, Tensor


@dataclass(slots=True, kw_only=True)
class Parameter:
    """A named weight on the tape; `owner` is the module class that decides how loading and preparation treat it."""

    name: str
    tensor: Tensor
    quantized: bool = False

    @property
    def trainable(self) -> bool:
        """Say whether it takes a gradient."""
        return isinstance(self.tensor.node, Leaf)


class Linear:
    """A linear layer [..., in] -> [..., out] that a method may adapt and a quantization may store differently."""

    #: PEFT clones the result of 4-bit layers before it adds to it.
    clones_result = False
    #: Whether the bias is added by an operator of its own, behind the product.
    adds_bias = False
    #: Whether the weight lies in memory as [in, out].
    transposed = False

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name = name
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor | None = weight
        self.bias = bias
        self.adapter: Callable[[Tensor], Tensor] | None = None

    @property
    def quantized(self) -> bool:
        """Say whether the weight is stored in fewer bits than it computes in."""
        return False

    @property
    def compute_dtype(self) -> Dtype | None:
        """Return the dtype that the layer computes in, none for integers."""
        return self.weight.dtype if self.weight is not None else None

    def base(self, x: Tensor) -> Tensor:
        """Apply the layer as the model defines it."""
        assert self.weight is not None
        if self.adds_bias and self.bias is not None:
            return ops.add(products.linear(x, self.weight), self.bias)
        return products.linear(x, self.weight, self.bias)

    def result_is_view(self, dimensions: int) -> bool:
        """Say whether `base` returns a view: a matrix with the bias added, seen as the batch that it was."""
        return self.bias is not None and not self.adds_bias and dimensions > products.MATRIX

    def copy_packed(self) -> list[Tensor]:
        """Copy the stored weight where it is packed in blocks, as PEFT does before it looks into one."""
        return []

    def dequantized(self) -> Tensor:
        """Return the weight in its compute dtype (the weight itself where it is not quantized)."""
        assert self.weight is not None
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer with its adapter, if it has one."""
        return self.base(x) if self.adapter is None else self.adapter(x)


class Embedding:
    """A table [V, D] of which integers take rows; PEFT's LoRA may adapt what is taken.

    `scaled` says that the module multiplies the rows by a number.
    """

    def __init__(self, name: str, weight: Tensor, *, scaled: bool = False) -> None:
        self.name, self.weight, self.scaled = name, weight, scaled
        self.adapter: Callable[[Tensor], Tensor] | None = None

    def base(self, ids: Tensor) -> Tensor:
        """Take rows as the model defines it."""
        rows = ops.embedding(ids, self.weight)
        return ops.scale(rows) if self.scaled else rows

    def __call__(self, ids: Tensor) -> Tensor:
        """Take rows, with the adapter's update if there is one."""
        return self.base(ids) if self.adapter is None else self.adapter(ids)


class Stack:
    """A weight outside of linear layers: all experts' [E, N, K], or a router's [N, K]. Quantization leaves it as it is.

    An adapter makes the weight that is used anew in every pass: `folding` starts one, and its `weight` is that weight.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight
        #: How many elements a token does not meet.
        self.idle_elements = 0
        self.adapter: Callable[[], Folding] | None = None

    def folding(self) -> Folding:
        """Start a pass."""
        return Folding(self.weight) if self.adapter is None else self.adapter()


class Folding:
    """The weight of a stack during one pass."""

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored

    def weight(self) -> Tensor:
        """Return the weight that is used."""
        return self.stored


MakeLinear = Callable[["Build", str, int, int, bool], Linear]


def plain_linear(build: Build, name: str, n_in: int, n_out: int, bias: bool) -> Linear:
    """Make a layer whose weight is stored in the dtype of the model."""
    weight = build.parameter(f"{name}.weight", n_out, n_in)
    return Linear(build.prefix + name, weight, build.parameter(f"{name}.bias", n_out) if bias else None)


@dataclass(slots=True)
class Build:
    """A model under construction: where recipes get their parameters and layers from."""

    tape: Tape
    dtype: Dtype
    trainable: bool
    make_linear: MakeLinear = plain_linear
    #: Which head the model gets, where its architecture has several.
    task: str = "causal"
    #: Whether it is as `from_pretrained` loads it, which keeps some weights of a model in fp16 in fp32.
    loaded: bool = False
    #: What stands before the names of what is made now: the module that it belongs to.
    prefix: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    #: Linear layers that "all-linear" stands for, and output heads.
    linears: list[Linear] = field(default_factory=list)
    heads: list[Linear] = field(default_factory=list)
    #: Tables of embeddings, which PEFT's LoRA adapts where they are named.
    embeddings: list[Embedding] = field(default_factory=list)
    #: Weights that are no linear layer's, which PEFT's LoRA may adapt all the same.
    stacks: list[Stack] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    #: Weights that stay beside copies of them that train.
    originals: list[Tensor] = field(default_factory=list)
    #: Tensors that come on the device behind all the layers that loading packs.
    waiting: list[Tensor] = field(default_factory=list)
    #: What the 8-bit codes of scales mean, once for all layers.
    code: Tensor | None = None
    #: Makes the copies of modules that train whole, if any are still to be made.
    saving: Callable[[], None] | None = None
    #: What methods add to the loss.
    penalties: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def parameter(self, name: str, *shape: int) -> Tensor:
        """Allocate a weight in the dtype of the model."""
        tensor = self.place(shape, self.dtype)
        if self.trainable:
            tensor.node = Leaf()
        self.parameters.append(Parameter(name=self.prefix + name, tensor=tensor))
        return tensor

    @contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """Name what is made inside as parts of a module."""
        before, self.prefix = self.prefix, f"{self.prefix}{module}."
        yield
        self.prefix = before

    def add(self, name: str, tensor: Tensor, *, quantized: bool = False) -> Tensor:
        """Count a tensor that somebody else allocated among the parameters."""
        self.parameters.append(Parameter(name=self.prefix + name, tensor=tensor, quantized=quantized))
        return tensor

    def linear(self, name: str, n_in: int, n_out: int, *, bias: bool = False) -> Linear:
        """Make a linear layer of a block: quantization and methods may change it."""
        layer = self.make_linear(self, name, n_in, n_out, bias)
        self.linears.append(layer)
        return layer

    def kept_linear(self, name: str, n_in: int, n_out: int, *, bias: bool = False) -> Linear:
        """Make a linear layer of a block that loading never quantizes, nor has in fp16."""
        dtype = self.dtype
        if self.loaded and dtype is FP16:
            self.dtype = FP32
        layer = plain_linear(self, name, n_in, n_out, bias)
        self.dtype = dtype
        self.linears.append(layer)
        return layer

    def embedding(self, name: str, rows: int, width: int, *, scaled: bool = False) -> Embedding:
        """Make a table of embeddings."""
        return self.shared_embedding(name, self.parameter(f"{name}.weight", rows, width), scaled=scaled)

    def shared_embedding(self, name: str, weight: Tensor, *, scaled: bool = False) -> Embedding:
        """Make a module that looks up in a table that is there."""
        self.embeddings.append(Embedding(self.prefix + name, weight, scaled=scaled))
        return self.embeddings[-1]

    def stack(self, name: str, *shape: int) -> Stack:
        """Make a weight that is no linear layer's."""
        self.stacks.append(Stack(self.prefix + name, self.parameter(name, *shape)))
        return self.stacks[-1]

    def head(self, name: str, n_in: int, n_out: int, *, bias: bool = False, tied: Tensor | None = None) -> Linear:
        """Make an output head: neither quantized nor adapted; `tied` shares the weight of the embedding."""
        if tied is None:
            head = plain_linear(self, name, n_in, n_out, bias)
        else:
            self.place((n_out, n_in), self.dtype)  # its own weight, which tying replaces
            head = Linear(self.prefix + name, tied, self.parameter(f"{name}.bias", n_out) if bias else None)
        self.heads.append(head)
        return head

    def buffer(self, *shape: int, dtype: Dtype = FP32) -> Tensor:
        """Allocate a tensor that is no parameter: rotary frequencies, position ids."""
        tensor = self.place(shape, dtype)
        self.buffers.append(tensor)
        return tensor

    def place(self, shape: Shape, dtype: Dtype) -> Tensor:
        """Allocate a tensor of the model; beside packed layers it gets its storage when all of them have theirs."""
        if self.make_linear is plain_linear:
            return self.tape.new(shape, dtype)
        self.waiting.append(Tensor(self.tape, None, shape, dtype))
        return self.waiting[-1]

    def save(self) -> None:
        """Make the copies of modules that train whole, once."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving()

    def settle(self) -> None:
        """Give every waiting tensor its storage."""
        for tensor in self.waiting:
            tensor.storage = self.tape.new(tensor.shape, tensor.dtype).storage
        self.waiting.clear()


class LayerNorm:
    """torch.nn.LayerNorm with its weight and bias."""

    def __init__(self, build: Build, name: str, width: int, *, affine: bool = True) -> None:
        self.weight = build.parameter(f"{name}.weight", width) if affine else None
        self.bias = build.parameter(f"{name}.bias", width) if affine else None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return ops.layer_norm(x, self.weight, self.bias)


def new_gelu(x: Tensor) -> Tensor:
    """GELU by tanh as separate operators (transformers/activations.py, NewGELUActivation)."""
    return ops.mul(ops.scale(x), ops.shift(ops.activation_of_result(_gelu_argument(x))))


def _gelu_argument(x: Tensor) -> Tensor:
    return ops.scale(ops.add(x, ops.scale(ops.square(x))))  # cubed really: the same operator with another exponent


def _fast_gelu(x: Tensor) -> Tensor:
    return ops.mul(ops.scale(x), ops.shift(ops.activation_of_result(_fast_gelu_argument(x))))


def _fast_gelu_argument(x: Tensor) -> Tensor:
    return ops.mul(ops.scale(x), ops.shift(ops.mul(ops.scale(x), x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return ops.mul(x, ops.activation_of_result(ops.scale(x)))


def _python_gelu(x: Tensor) -> Tensor:
    return ops.mul(ops.scale(x), ops.shift(ops.erf(ops.scale(x))))


def _clipped_gelu(x: Tensor) -> Tensor:
    return ops.clip(ops.activation(x))


def _squared_relu(x: Tensor) -> Tensor:
    applied = ops.activation_of_result(x)
    return ops.square(applied)


def _unchanged(x: Tensor) -> Tensor:
    return x


#: Activations by the names of Transformers' ACT2FN.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": ops.activation,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": new_gelu,
    "gelu_fast": _fast_gelu,
    "gelu_new": new_gelu,
    "gelu_python": _python_gelu,
    "gelu_python_tanh": new_gelu,
    "gelu_pytorch_tanh": ops.activation,
    "hardswish": ops.activation,
    "leaky_relu": ops.activation,
    "linear": _unchanged,
    "mish": ops.activation,
    "quick_gelu": _quick_gelu,
    "relu": ops.activation_of_result,
    "relu2": _squared_relu,
    "relu6": ops.activation,
    "sigmoid": ops.activation_of_result,
    "silu": ops.activation,
    "swish": ops.activation,
    "tanh": ops.activation_of_result,
}


def find_activation(name: object) -> Callable[[Tensor], Tensor]:
    """Return an activation by its name in Transformers; Unsupported otherwise."""
    try:
        return ACTIVATIONS[str(name)]
    except KeyError:
        todo = f"Modelled: {', '.join(sorted(ACTIVATIONS))}."
        raise Unsupported("activation function", value=name, todo=todo) from None


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise as Llama does: in fp32, the weight applied after the cast back (LlamaRMSNorm and its many copies)."""
    dtype = x.dtype
    x = ops.cast(x, FP32)
    variance = _mean_square(x)
    x = ops.mul(x, _inverse_root(variance))
    return ops.mul(weight, ops.cast(x, dtype))


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise as Gemma does: (1 + weight) applied in fp32, then the cast back (GemmaRMSNorm)."""
    dtype = x.dtype
    out = _gemma_normalised(ops.cast(x, FP32))
    out = ops.mul(out, ops.shift(ops.cast(weight, FP32)))
    return ops.cast(out, dtype)


def _gemma_normalised(x: Tensor) -> Tensor:
    return ops.mul(x, ops.rsqrt(ops.shift(_mean_square(x))))


def _mean_square(x: Tensor) -> Tensor:
    return ops.mean_last(ops.square(x))


def _inverse_root(variance: Tensor) -> Tensor:
    return ops.rsqrt(ops.shift(variance))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, E] by position: x cos + rotate_half(x) sin, each product and the halves' concatenation a tensor."""
    straight = ops.mul(x, cos)
    turned = ops.mul(_rotate_half(x), sin)
    return ops.add(straight, turned)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = ops.slice_last(x, 0, half), ops.slice_last(x, half, x.shape[-1])
    return ops.concat([ops.negate(second), first], -1)


def partial_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first columns of each head, as many as `cos` has, and put the rest behind them."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return rotary(x, cos, sin)
    turned, passed = ops.slice_last(x, 0, width), ops.slice_last(x, width, x.shape[-1])
    return ops.concat([rotary(turned, cos, sin), passed], -1)


def rotary_tables(
    x: Tensor, tokens: int, width: int, *, batch: int = 1, dtype: Dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Make cos and sin [B or 1, T, E] in `dtype`, by default that of `x`, through fp32, without gradient."""
    tape = x.tape
    shape = (batch, 1, tokens, width)
    freqs = tape.new((batch, tokens, width // 2), FP32)
    angles = tape.new(shape, FP32)
    cos = ops.scale(tape.new(shape, FP32))
    sin = ops.scale(tape.new(shape, FP32))
    tape.launch(freqs.bytes + angles.bytes)
    return ops.cast(cos, dtype or x.dtype), ops.cast(sin, dtype or x.dtype)


def token_ids(tape: Tape, *shape: int) -> Tensor:
    """Allocate integer inputs."""
    return tape.new(shape, INT64)


def elements(shape: Shape) -> int:
    """Count the elements of a shape."""
    return prod(shape)
