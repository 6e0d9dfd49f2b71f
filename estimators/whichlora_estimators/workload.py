"""Everything that decides memory and time: model shape, method, setup. One record, and its JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadValue, UnknownName

PHASES = ("train", "generate")
TASKS = ("causal", "seq-cls", "token-cls", "masked-lm", "seq2seq")
PRECISIONS = ("bf16-true", "fp16-true", "bf16-mixed", "fp16-mixed", "fp32")
ATTENTIONS = ("sdpa", "eager")

_CHOICES = {"phase": PHASES, "task": TASKS, "precision": PRECISIONS, "attention": ATTENTIONS}
_COUNTS = ("rank", "batch_size", "seq_len", "target_len", "prefill_len", "decode_len")
_FLAGS = ("checkpointing", "padded", "last_logits_only", "kbit_preparation", "double_quantization")
_IGNORED = ("truth",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step or one generation.

    `seq_len` tokens a sample when training; `prefill_len` prompt tokens and `decode_len` new ones when generating.
    `padded` says that some of the batch is padding, so that a mask is passed. Raises BadValue or UnknownName.
    """

    model: str
    config: Mapping[str, Any] = field(repr=False)
    id: str = ""
    task: str = "causal"
    phase: str = "train"
    method: str = "lora"
    rank: int = 16
    targets: str | tuple[str, ...] | None = "all-linear"
    dropout: float = 0.0
    precision: str = "bf16-true"
    quantization: str = "none"
    double_quantization: bool = True
    kbit_preparation: bool = True
    checkpointing: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    batch_size: int = 1
    seq_len: int = 1024
    target_len: int | None = None
    padded: bool = False
    prefill_len: int = 1024
    decode_len: int = 1
    last_logits_only: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UnknownName(name, str(getattr(self, name)), allowed, todo=f"Allowed: {', '.join(allowed)}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "target_len" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadValue(f"{name} must be a positive whole number", value=value, todo="Give 1 or more.")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise BadValue(f"{name} must be true or false", value=getattr(self, name), todo="Give a boolean.")
        _check_dropout(self.dropout)
        _check_targets(self.targets)

    def with_(self, **changes: Any) -> Workload:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def workload_from_json(fields: Mapping[str, Any]) -> Workload:
    """Read one line of a workload file; unknown keys are errors, absent ones take their defaults.

    A null `quantization` means none; `config` holds the fields of config.json.
    """
    known = {f.name for f in dataclasses.fields(Workload)}
    given = {key: value for key, value in fields.items() if key not in _IGNORED}
    for key in given:
        if key not in known:
            raise UnknownName("workload field", key, known, todo=f"Fields: {', '.join(sorted(known))}.")
    for key in ("model", "config"):
        if key not in given:
            raise BadValue(f"workload without {key!r}", value=fields.get("id"), todo=f"Add {key!r} to the line.")
    if not isinstance(given["config"], Mapping):
        raise BadValue("config must be an object", value=given["config"], todo="Give the fields of config.json.")
    if given.get("quantization", "none") is None:
        given["quantization"] = "none"
    if isinstance(given.get("targets"), list):
        given["targets"] = tuple(given["targets"])
    return Workload(**given)


def _check_dropout(rate: object) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise BadValue("dropout must be at least 0 and below 1", value=rate, todo="Typical values: 0, 0.05, 0.1.")


def _check_targets(targets: object) -> None:
    named = isinstance(targets, tuple) and bool(targets) and all(isinstance(name, str) for name in targets)
    if not named and targets is not None and targets != "all-linear":
        todo = 'Give "all-linear", a list of module names, or nothing for the default of PEFT.'
        raise BadValue("targets name no layers", value=targets, todo=todo)
