"""The config of `whichlora pick`: YAML in, validated records out.

Every message names the key, its value and what is allowed. Memory limits in `*_gb` are 10⁹ bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whichlora_calibration import CURRENT, Choice
from whichlora_estimators.errors import BadValue, UnknownName
from whichlora_estimators.gpus import Gpu, find_gpu, gpu_from_fields
from whichlora_estimators.methods import find_method
from whichlora_estimators.models import default_models
from whichlora_estimators.optimizers import find_optimizer
from whichlora_estimators.quantization import find_quantization
from whichlora_estimators.stack import NEWEST_STACK, Stack, parse_stack
from whichlora_estimators.units import GB
from whichlora_estimators.workload import ATTENTIONS, PRECISIONS

from .data.lengths import Lengths
from .data.spec import KEYS as DATA_KEYS
from .data.spec import DataSpec, data_from_fields
from .finetune.settings import Training, training_from_fields
from .slurm.settings import Cluster, cluster_from_fields

#: What the choice goes by, in this order, unless the config says otherwise (see docs/pick.md for each).
POLICY = ("model", "weights", "method", "rank", "batch", "time")
Targets = str | tuple[str, ...]
#: Parameters above which fine-tuning checkpoints activations unless told otherwise.
CHECKPOINTING_ABOVE = 1_000_000_000
#: Names that join a method and a quantization.
JOINED_METHODS = {"qlora": ("lora", "nf4"), "qdora": ("dora", "nf4"), "qlora-fa": ("lora-fa", "nf4")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1:
    """Inference: the grid to try and the limits that a model must keep to be fine-tuned at all.

    A model is kept if `any` configuration of the grid satisfies the limits, or only if `all` do (`satisfy`).
    """

    batch_sizes: tuple[int, ...] = (1,)
    prefill_lengths: tuple[int, ...] = (512,)
    tokens_to_generate: tuple[int, ...] = (128,)
    num_runs: int = 1
    time_per_token_s: float | None = None
    peak_memory_bytes: int | None = None
    quantization: str = "none"
    satisfy: str = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage2:
    """Fine-tuning: micro-batches to try, how many of them to accumulate to a step, and the limits.

    A step learns from batch size times accumulation samples; more than `useful_batch` are of no use (None: any number is).
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    accumulations: tuple[int, ...] = (1,)
    useful_batch: int | None = None
    total_time_s: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodChoice:
    """A method and how the frozen weights are stored."""

    method: str
    quantization: str = "none"

    @property
    def label(self) -> str:
        """The name that practitioners use: `qlora` for lora on nf4."""
        for name, pair in JOINED_METHODS.items():
            if pair == (self.method, self.quantization):
                return name
        return self.method if self.quantization == "none" else f"{self.method} + {self.quantization}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft:
    """How far limits might be moved if it were worth it: each one set is tried by itself, and its gain is told."""

    memory_bytes: int | None = None
    total_time_s: float | None = None
    time_per_token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PickConfig:
    """What to choose among, and under which constraints.

    The tuples from `methods` to `checkpointing` are alternatives, best-liked first; the search combines them all. `lengths`
    are those of the data set's samples under each model's tokenizer, once they are measured; `samples` is None without one.
    """

    gpu: Gpu
    models: tuple[str, ...]
    tokenizers: tuple[str, ...] = ()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    methods: tuple[MethodChoice, ...] = (MethodChoice(method="lora"), MethodChoice(method="lora", quantization="nf4"))
    ranks: tuple[int, ...] = (16,)
    targets: tuple[Targets, ...] = ("all-linear",)
    attentions: tuple[str, ...] = ("sdpa",)
    optimizers: tuple[str, ...] = ("adamw",)
    checkpointing: tuple[bool | None, ...] = (None,)
    dropout: float = 0.0
    seq_len: int = 1024
    samples: int | None = None
    epochs: int = 1
    precision: str = "bf16-true"
    policy: tuple[str, ...] = POLICY
    soft: Soft = Soft()
    correction: Choice = CURRENT
    data: DataSpec | None = None
    lengths: Mapping[str, Lengths] = field(default_factory=dict)
    stack: Stack = NEWEST_STACK
    training: Training = field(default_factory=Training)
    cluster: Cluster = field(default_factory=Cluster)


def read_config(path: Path) -> PickConfig:
    """Read a YAML (or JSON) file. Raises WhichloraError for an unreadable file and for any key or value not allowed."""
    return config_from_fields(read_fields(path), folder=path.parent)


def read_fields(path: Path) -> dict[str, Any]:
    """Read the keys of a YAML (or JSON) file. Raises BadValue where it cannot be read, or is none."""
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue("cannot read the config file", value=str(path), todo=f"{error}.") from None
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise BadValue("not a YAML file", value=str(path), todo=f"Mend it: {what}.") from None
    if not isinstance(fields, dict):
        raise BadValue("the config must be a mapping of keys", value=str(path), todo="See examples/first.yaml.")
    return fields


def config_from_fields(fields: Mapping[str, Any], *, folder: Path | None = None) -> PickConfig:
    """Validate a config given as nested mappings; files of its data set are looked for from `folder` on."""
    _check_keys(fields, _TOP_KEYS, "")
    stage1 = _section(fields, "stage1_profile", _STAGE1_KEYS)
    stage2 = _section(fields, "stage2_profile", _STAGE2_KEYS)
    dataset = _section(fields, "dataset", ("samples", *DATA_KEYS))
    samples = _optional(dataset, "samples", "dataset.samples", _whole)
    data = data_from_fields(dataset, samples=samples)
    models = tuple(_texts(stage1, "model_names", "stage1_profile.model_names") or ()) or default_models()
    config = {
        "gpu": _gpu(fields.get("gpu")),
        "models": models,
        "tokenizers": tuple(_texts(stage1, "tokenizers", "stage1_profile.tokenizers") or ()),
        "stage1": _stage1(stage1),
        "stage2": _stage2(stage2),
        "samples": samples,
        "data": None if data is None else data.located(folder),
        "training": training_from_fields(_section(fields, "finetune", Training.__dataclass_fields__)),
        "cluster": cluster_from_fields(_section(fields, "slurm", Cluster.__dataclass_fields__)),
        "soft": _soft(_section(fields, "soft", ("memory_gb", "total_time_mins", "time_per_token_ms"))),
    }
    for key, read in _PLAIN_KEYS.items():
        if fields.get(key) is not None:
            config[_RENAMED.get(key, key)] = read(fields[key], key)
    _check_tokenizers(config["tokenizers"], models)
    return _check_time(PickConfig(**config))


def _stage1(section: Mapping[str, Any]) -> Stage1:
    default = Stage1()
    name = "stage1_profile."
    satisfy = str(section.get("satisfy", default.satisfy))
    if satisfy not in ("any", "all"):
        raise UnknownName("value of stage1_profile.satisfy", satisfy, ("any", "all"), todo="Allowed: any, all.")
    quantization = str(section.get("quantization") or "none")
    find_quantization(quantization)
    return Stage1(
        batch_sizes=_wholes(section, "batch_size", name) or default.batch_sizes,
        prefill_lengths=_wholes(section, "prefill_length", name) or default.prefill_lengths,
        tokens_to_generate=_wholes(section, "tokens_to_generate", name) or default.tokens_to_generate,
        num_runs=_optional(section, "num_runs", name + "num_runs", _whole) or default.num_runs,
        time_per_token_s=_scaled(section, "time_per_token_ms", name, 1e-3),
        peak_memory_bytes=_memory(section, name),
        quantization=quantization,
        satisfy=satisfy,
    )


def _stage2(section: Mapping[str, Any]) -> Stage2:
    name = "stage2_profile."
    return Stage2(
        batch_sizes=_wholes(section, "batch_size", name) or Stage2().batch_sizes,
        accumulations=_wholes(section, "accumulation", name) or Stage2().accumulations,
        useful_batch=_optional(section, "useful_batch", f"{name}useful_batch", _whole),
        total_time_s=_scaled(section, "total_time_mins", name, 60.0),
        peak_memory_bytes=_memory(section, name),
    )


def _soft(section: Mapping[str, Any]) -> Soft:
    memory = _scaled(section, "memory_gb", "soft.", float(GB))
    return Soft(
        memory_bytes=None if memory is None else int(memory),
        total_time_s=_scaled(section, "total_time_mins", "soft.", 60.0),
        time_per_token_s=_scaled(section, "time_per_token_ms", "soft.", 1e-3),
    )


def _memory(section: Mapping[str, Any], name: str) -> int | None:
    scaled = _scaled(section, "peak_memory_gb", name, float(GB))
    return None if scaled is None else int(scaled)


def _scaled(section: Mapping[str, Any], key: str, name: str, unit: float) -> float | None:
    value = _optional(section, key, name + key, _positive)
    return None if value is None else value * unit


def _check_keys(fields: Mapping[str, Any], allowed: Iterable[str], section: str) -> None:
    for key in fields:
        if key not in allowed:
            where = f"key in {section}" if section else "config key"
            raise UnknownName(where, str(key), allowed, todo=f"Allowed: {', '.join(sorted(allowed))}.")


def _section(fields: Mapping[str, Any], key: str, allowed: Iterable[str]) -> Mapping[str, Any]:
    section = fields.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise BadValue(f"{key} must be a mapping", value=section, todo=f"Its keys: {', '.join(sorted(allowed))}.")
    _check_keys(section, allowed, key)
    return section


def _gpu(value: Any) -> Gpu:
    if value is None:
        raise BadValue("no gpu in the config", todo="Add `gpu: rtx-4090`, say; `whichlora gpus` lists the names.")
    if isinstance(value, dict):
        return gpu_from_fields(value)
    return find_gpu(str(value))


def _optional(section: Mapping[str, Any], key: str, name: str, read: Callable[[Any, str], Any]) -> Any:
    value = section.get(key)
    return None if value is None else read(value, name)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadValue(f"{name} must be a positive whole number", value=value, todo="Give 1 or more.")
    return value


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise BadValue(f"{name} must be a positive number", value=value, todo="Give a number above 0.")
    return float(value)


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise BadValue(f"{name} must be at least 0 and below 1", value=value, todo="Typical values: 0, 0.05, 0.1.")
    return float(value)


def _list(value: Any, name: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadValue(f"{name} is an empty list", value=value, todo="Give at least one value, or leave the key out.")
    return values


def _wholes(section: Mapping[str, Any], key: str, name: str) -> tuple[int, ...] | None:
    if section.get(key) is None:
        return None
    return _whole_tuple(section[key], name + key)


def _whole_tuple(value: Any, name: str) -> tuple[int, ...]:
    return tuple(sorted({_whole(each, name) for each in _list(value, name)}))


def _texts(section: Mapping[str, Any], key: str, name: str) -> list[str] | None:
    if section.get(key) is None:
        return None
    values = _list(section[key], name)
    for value in values:
        if not isinstance(value, str) or not value:
            raise BadValue(f"{name} must hold names", value=value, todo="Give Hugging Face ids or local folders.")
    return values


def _each(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    """Accept one value or a list of alternatives."""

    def read_all(value: Any, name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(read(each, name) for each in _list(value, name)))

    return read_all


def _one_of(allowed: tuple[str, ...]) -> Callable[[Any, str], str]:
    def read(value: Any, name: str) -> str:
        if value not in allowed:
            raise UnknownName(f"value of {name}", str(value), allowed, todo=f"Allowed: {', '.join(allowed)}.")
        return str(value)

    return read


def _optimizer(value: Any, name: str) -> str:
    return find_optimizer(str(value)).name


def _checkpointing(value: Any, name: str) -> bool | None:
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise BadValue(f"{name} must be true, false or auto", value=value, todo="auto: on above 1B parameters.")
    return value


def _targets(value: Any, name: str) -> tuple[Targets, ...]:
    """Read one set of targets (a list of names, or all-linear), or a list of alternative sets."""
    values = _list(value, name)
    if any(isinstance(each, list) or each == "all-linear" for each in values):
        return tuple(dict.fromkeys(_target_set(each, name) for each in values))
    return (_target_set(values, name),)


def _target_set(value: Any, name: str) -> Targets:
    if value == "all-linear":
        return "all-linear"
    names = _list(value, name)
    if not all(isinstance(each, str) and each for each in names):
        raise BadValue(f"{name} must hold module names", value=value, todo="Example: [q_proj, v_proj].")
    return tuple(names)


def _policy(value: Any, name: str) -> tuple[str, ...]:
    names = tuple(_one_of(POLICY)(each, name) for each in _list(value, name))
    if len(set(names)) < len(names):
        raise BadValue(f"{name} names something twice", value=list(names), todo=f"Default: {', '.join(POLICY)}.")
    return names


def _method(value: Any, name: str) -> MethodChoice:
    if isinstance(value, dict):
        _check_keys(value, ("method", "quantization"), name)
        method, quantization = str(value.get("method")), str(value.get("quantization") or "none")
    else:
        method, quantization = JOINED_METHODS.get(str(value), (str(value), "none"))
    find_quantization(quantization)
    return MethodChoice(method=find_method(method).name, quantization=quantization)


def _stack(value: Any, name: str) -> Stack:
    """Read library versions: a mapping of packages, or "package==version, …"."""
    if isinstance(value, Mapping):
        value = ",".join(f"{package}=={version}" for package, version in value.items())
    return parse_stack(str(value))


_PLAIN_KEYS: dict[str, Callable[[Any, str], Any]] = {
    "methods": _each(_method),
    "ranks": _whole_tuple,
    "targets": _targets,
    "dropout": _share,
    "seq_len": _whole,
    "epochs": _whole,
    "precision": _one_of(PRECISIONS),
    "attention": _each(_one_of(ATTENTIONS)),
    "optimizer": _each(_optimizer),
    "checkpointing": _each(_checkpointing),
    "policy": _policy,
    "stack": _stack,
}
#: Keys that take one value or several, and the fields that hold them.
_RENAMED = {"attention": "attentions", "optimizer": "optimizers"}
_TOP_KEYS = ("gpu", "stage1_profile", "stage2_profile", "dataset", "soft", "finetune", "slurm", *_PLAIN_KEYS)
_STAGE1_KEYS = (
    "model_names",
    "tokenizers",
    "batch_size",
    "prefill_length",
    "tokens_to_generate",
    "num_runs",
    "time_per_token_ms",
    "peak_memory_gb",
    "quantization",
    "satisfy",
)
_STAGE2_KEYS = ("batch_size", "accumulation", "useful_batch", "total_time_mins", "peak_memory_gb")


def _check_tokenizers(tokenizers: tuple[str, ...], models: tuple[str, ...]) -> None:
    if tokenizers and len(tokenizers) != len(models):
        todo = f"Give one for each of the {len(models)} models, in their order, or leave the key out."
        raise BadValue("stage1_profile.tokenizers does not match model_names", value=list(tokenizers), todo=todo)


def _check_time(config: PickConfig) -> PickConfig:
    if config.stage2.total_time_s is not None and config.samples is None and config.data is None:
        todo = "Add `dataset: {samples: 10000}`, say: the number of samples an epoch trains on; or its source."
        raise BadValue("stage2_profile.total_time_mins needs the size of the data set", todo=todo)
    return config
