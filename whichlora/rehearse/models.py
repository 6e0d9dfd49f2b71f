"""The model of a workload, built by Transformers on the device without a checkpoint, quantised as loading would.

Facts: transformers 5.23 (integrations/bitsandbytes.py), bitsandbytes 0.50 (nn/modules.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.workload import Workload

#: The dtype of the weights that are not quantised.
DTYPES = {
    "bf16-true": "bfloat16",
    "fp16-true": "float16",
    "bf16-mixed": "float32",
    "fp16-mixed": "float32",
    "fp32": "float32",
}
# Under quantisation "mixed" says that the step runs under autocast; the weights are those of a 16-bit load.
_QUANTIZED_DTYPES = DTYPES | {"bf16-mixed": "bfloat16", "fp16-mixed": "float16"}
AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq-cls": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
FOUR_BIT = ("nf4", "fp4")
_HEADS = ["score", "classifier"]  # what PEFT trains a copy of cannot be quantised


def build_model(workload: Workload, device: str) -> Any:
    """Return the model with all of its weights on the device, their values undefined.

    Raises WhichloraError for a config that Transformers does not know.
    """
    import torch
    import transformers

    config = make_config(workload)
    if workload.attention != "sdpa":  # which Transformers takes by itself where the model has it, else eager attention
        config._attn_implementation = workload.attention
    auto = getattr(transformers, AUTO_CLASSES[workload.task])
    dtype = getattr(torch, dtype_name(workload))
    kind = {"dtype" if hasattr(config, "dtype") else "torch_dtype": dtype}  # `dtype` since 4.56
    kept = _kept_whole(workload, auto, config)
    with torch.device(device if workload.quantization == "none" and not kept else "meta"):
        model = auto.from_config(config, **kind)
    for name, module in model.named_modules():
        if kept.intersection(name.split(".")):
            module.float()
    if workload.quantization != "none":
        _quantize(model, workload, dtype, device)
    elif kept:
        _place(model, device)
    return model


def _kept_whole(workload: Workload, auto: Any, config: Any) -> set[str]:
    """Return the names of modules that `from_pretrained` keeps in fp32 in a model in fp16. A model that trains is made here."""
    if workload.phase == "train" or dtype_name(workload) != "float16":
        return set()
    model = auto._model_mapping.get(type(config), None)
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def dtype_name(workload: Workload) -> str:
    """Return the dtype of the weights that are not quantised, as PyTorch spells it."""
    return (DTYPES if workload.quantization == "none" else _QUANTIZED_DTYPES)[workload.precision]


def make_config(workload: Workload) -> Any:
    """Return Transformers' configuration of the model. Raises BadValue or WhichloraError for one that it does not know."""
    import transformers

    fields = {key: value for key, value in workload.config.items() if not key.startswith("_")}
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise BadValue("config without model_type", value=model_type, todo="Give the whole config.json of a model.")
    try:
        config = transformers.AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        version = transformers.__version__
        raise WhichloraError(
            f"transformers {version} has no such model_type", value=model_type, todo=f"{error}"[:200]
        ) from error
    if workload.task == "seq-cls" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # without one, only a single sample can be classified
    return config


def quantization_config(workload: Workload, dtype: Any) -> Any:
    """Return Transformers' settings of a workload's quantization."""
    transformers: Any = import_module("transformers")
    if workload.quantization not in FOUR_BIT:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=workload.quantization,
        bnb_4bit_use_double_quant=workload.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _quantize(model: Any, workload: Workload, dtype: Any, device: str) -> None:
    """Let Transformers choose the layers, quantise these one by one, then put everything that is left on the device."""
    library: Any = import_module("transformers.integrations.bitsandbytes")
    bnb: Any = import_module("bitsandbytes")
    library.replace_with_bnb_linear(
        model,
        modules_to_not_convert=list({*_HEADS, *_not_converted(model)}),
        quantization_config=quantization_config(workload, dtype),
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _quantized(module, workload, dtype, device))
    _place(model, device)
    model.is_loaded_in_4bit = workload.quantization in FOUR_BIT
    model.is_loaded_in_8bit = not model.is_loaded_in_4bit
    model.quantization_method = "bitsandbytes"


def _not_converted(model: Any) -> list[str]:
    """Return the names, or last names, of what loading leaves as it is: heads, what is tied, what is kept in fp32."""
    base: Any = import_module("transformers.quantizers.base")
    find = getattr(base, "get_keys_to_not_convert", None)  # elsewhere before 5.0
    if find is None:
        find = import_module("transformers.integrations.bitsandbytes").get_keys_to_not_convert
    return [*find(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]


def _quantized(empty: Any, workload: Workload, dtype: Any, device: str) -> Any:
    """Return a quantised layer in an empty one's place; as in loading, the whole weight is there until it is done."""
    import torch

    weight = torch.empty(empty.out_features, empty.in_features, dtype=dtype, device=device)
    make = _four_bit if workload.quantization in FOUR_BIT else _eight_bit
    layer = make(weight, empty.bias is not None, workload)
    if empty.bias is not None:
        layer.bias = torch.nn.Parameter(torch.empty_like(empty.bias, dtype=dtype, device=device))
    return layer


def _four_bit(weight: Any, bias: bool, workload: Workload) -> Any:
    bnb: Any = import_module("bitsandbytes")
    how = {"quant_type": workload.quantization, "compress_statistics": workload.double_quantization}
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, **how)
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=weight.dtype, device="meta", **how)
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer, **how
    )
    return layer


def _eight_bit(weight: Any, bias: bool, workload: Workload) -> Any:
    """Return an 8-bit layer with outliers from 6.0 on, Transformers' default, and one scale a row."""
    import torch

    bnb: Any = import_module("bitsandbytes")
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
    codes = torch.empty_like(weight, dtype=torch.int8)
    stored = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=None, SCB=None)
    stored.CB, stored.SCB = stored.data, torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    layer.weight, layer.state.CB, layer.state.SCB = stored, stored.CB, stored.SCB
    return layer


def _place(model: Any, device: str) -> None:
    """Put everything that is not on the device yet there, and tie what is to be tied."""
    for module in model.modules():
        _leave_meta(module, device)
    model.tie_weights()


def _leave_meta(module: Any, device: str) -> None:
    import torch

    for name, parameter in list(module._parameters.items()):
        if parameter is not None and parameter.device.type == "meta":
            empty = torch.empty_like(parameter, device=device)
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None and buffer.device.type == "meta":
            module._buffers[name] = torch.empty_like(buffer, device=device)
