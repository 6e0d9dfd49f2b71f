"""Weightless checkpoints: every name, dtype and shape of a real one, and no bytes.

The safetensors files are sparse, so that only their headers take room on disk. `from_pretrained` runs the library's
real loading path on one, quantisation included; on the null device the holes are not read, since copies to it are
skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from whichlora_estimators.errors import BadValue, Unsupported, WhichloraError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SHARD_BYTES = 5_000_000_000  # Transformers' default before 5.0, which most checkpoints of the Hub were saved with
NO_FILES: Mapping[str, Path] = {}
_DTYPES = ("bfloat16", "float16", "float32")
# safetensors' names of dtypes: those that a model saved in one of _DTYPES may hold, integer buffers included.
_SAFETENSORS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomReport:
    """What was written: the files of weights, and their bytes: those of a real checkpoint, and those on this disk."""

    folder: Path
    shards: tuple[str, ...]
    tensors: int
    parameters: int
    weights_bytes: int
    disk_bytes: int


def write_phantom(
    model: str | Path | Mapping[str, Any] | PretrainedConfig,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    auto_class: str = "",
    files: Mapping[str, Path] = NO_FILES,
) -> PhantomReport:
    """Write a checkpoint without weights, cut into shards as `save_pretrained(max_shard_size=shard_bytes)` would.

    (But for mixtures of experts: Transformers 5 saves experts that it holds in one tensor in one shard, we one by one.)

    `model` is a Hub name, a folder or config.json, the content of one, or a configuration; `auto_class` names the class
    to save from (by default the one that the configuration names); `files` are copied beside the weights, by name.
    The folder is there when all of it is. Raises BadValue for a dtype that checkpoints are not saved in and for a folder
    that holds something, WhichloraError for what Transformers does not find or know, Unsupported for a configuration of
    weights that are quantised already.
    """
    if dtype not in _DTYPES:
        raise BadValue("no dtype that a checkpoint is saved in", value=dtype, todo=f"Give one of {', '.join(_DTYPES)}.")
    if shard_bytes < 1:
        raise BadValue("shards of no bytes", value=shard_bytes, todo="Give a size such as 5GB.")
    folder = Path(folder)
    workshop = _workshop(folder)
    try:
        skeleton = _skeleton(_config(model), dtype, auto_class)
        _save_configs(skeleton, workshop, dtype)
        report = _save_weights(skeleton, workshop, shard_bytes)
        for name, path in files.items():
            shutil.copyfile(path, workshop / name)
        workshop.chmod(0o755)  # temporary folders are their owner's alone
        workshop.replace(folder)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return dataclasses.replace(report, folder=folder)


def _workshop(folder: Path) -> Path:
    """Return a temporary folder beside the one that is asked for, which must not hold anything."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BadValue("there is something already", value=str(folder), todo="Name a new or an empty folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        todo = "Name a folder that you can write to."
        raise BadValue(f"cannot write there ({error.strerror})", value=str(folder), todo=todo) from error


def _config(model: str | Path | Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig

    try:
        if isinstance(model, PretrainedConfig):
            config = model
        elif isinstance(model, Mapping):
            fields = {key: value for key, value in model.items() if not key.startswith("_")}
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(str(model))
    except (KeyError, OSError, ValueError) as error:
        todo = "Give a Hub name, a folder with a config.json, or the content of one with its model_type."
        raise WhichloraError("Transformers finds no configuration there", value=str(model)[:200], todo=todo) from error
    if getattr(config, "quantization_config", None):
        raise Unsupported(
            "a checkpoint whose weights are quantised already is not known here",
            value=config.model_type,
            todo="Take out quantization_config to write its weights in 16 bit.",
        )
    return config


def _skeleton(config: PretrainedConfig, dtype: str, auto_class: str) -> PreTrainedModel:
    """Return the model on the meta device: of the class that the configuration names, else a language model."""
    import torch
    import transformers

    kind = {dtype_field(config): getattr(torch, dtype)}
    named = config.architectures[0] if config.architectures and not auto_class else ""
    model_class = getattr(transformers, named, None)
    with torch.device("meta"), _no_initial_values():
        if model_class is not None:
            return cast("PreTrainedModel", model_class._from_config(config, **kind))
        language = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        auto: Any = getattr(transformers, auto_class or language)
        return cast("PreTrainedModel", auto.from_config(config, **kind))


def _no_initial_values() -> contextlib.AbstractContextManager[None]:
    """Leave out random values, which cost seconds even where nothing is stored."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):  # since 5.0, before
        with contextlib.suppress(ImportError, AttributeError):
            return cast("contextlib.AbstractContextManager[None]", import_module(module).no_init_weights())
    return contextlib.nullcontext()


def dtype_field(config: PretrainedConfig) -> str:
    """Return what Transformers calls a model's dtype: `dtype` since 4.56."""
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"


def _save_configs(skeleton: PreTrainedModel, folder: Path, dtype: str) -> None:
    skeleton.config.architectures = [type(skeleton).__name__]
    setattr(skeleton.config, dtype_field(skeleton.config), dtype)
    skeleton.config.save_pretrained(folder)
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)


def _saved_tensors(skeleton: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what `save_pretrained` would save, by name: tied weights once, in the layout of the Hub's checkpoints."""
    skeleton.tie_weights()
    ignored = set(skeleton._keys_to_ignore_on_save or ())
    seen: set[int] = set()
    tensors = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if name not in ignored and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before Transformers 5 a model's names were those of its checkpoint
        return tensors
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(skeleton, tensors)
    # Experts are cut out of one tensor that the model holds: each is a tensor of its own in a checkpoint.
    return {name: tensor.new_empty(tensor.shape) for name, tensor in reverted.items()}


def _save_weights(skeleton: PreTrainedModel, folder: Path, shard_bytes: int) -> PhantomReport:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = _saved_tensors(skeleton)
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=shard_bytes)
    for file_name, names in split.filename_to_tensors.items():
        _write_sparse(folder / file_name, {name: tensors[name] for name in names})
    if split.is_sharded:
        metadata = {"total_parameters": skeleton.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return PhantomReport(
        folder=folder,
        shards=tuple(split.filename_to_tensors),
        tensors=len(tensors),
        parameters=skeleton.num_parameters(),
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        disk_bytes=sum(512 * (folder / name).stat().st_blocks for name in split.filename_to_tensors),
    )


def _write_sparse(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file: length of the header, header, and a hole of the size of all tensors in a row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = _SAFETENSORS[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
