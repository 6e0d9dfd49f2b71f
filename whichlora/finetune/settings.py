"""What a config says of the training itself, and what a plan hands on about data, tokenizers and local models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whichlora_estimators.errors import BadValue, UnknownName

from ..data.spec import DataSpec

#: Where the config does not say: starting points, not promises. Whole models: Stanford Alpaca's README. Matrices beside
#: them: QLoRA (arXiv 2305.14314, table 9, 7B and 13B). Vectors and prompts: (IA)³ in T-Few (arXiv 2205.05638, section 3.5).
LEARNING_RATES = {"full": 2e-5, "matrices": 2e-4, "vectors": 3e-3}
_VECTORS = ("ia3", "vera", "prompt-tuning", "prefix-tuning", "p-tuning")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the chosen setup is trained; None: as `learning_rate_for` says, never clipped, or ten times an epoch."""

    learning_rate: float | None = None
    clip_grad_norm: float | None = 1.0
    scheduler: str = "linear"
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    save_steps: int | None = None
    eval_steps: int | None = None
    seed: int = 0
    max_steps: int | None = None

    def learning_rate_for(self, method: str) -> float:
        """Return the learning rate: the one given, or the usual one of the method's kind."""
        if self.learning_rate is not None:
            return self.learning_rate
        kind = "full" if method == "full" else "vectors" if method in _VECTORS else "matrices"
        return LEARNING_RATES[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model of the plan and its tokenizer come from: `path` is that of a local model, None for one of the Hub."""

    model: str
    path: str | None
    tokenizer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune:
    """What fine-tuning needs beside the choice; `data` is None where the config named no source."""

    data: DataSpec | None = None
    training: Training = Training()
    sources: tuple[ModelSource, ...] = ()

    def source(self, model: str) -> ModelSource:
        """Return where a model comes from; its own name where the plan does not say."""
        own = ModelSource(model=model, path=None, tokenizer=model)
        return next((source for source in self.sources if source.model == model), own)


def training_from_fields(fields: Mapping[str, Any]) -> Training:
    """Validate a config's `finetune` section. Raises BadValue or UnknownName."""
    for key in fields:
        if key not in _READERS:
            raise UnknownName("key in finetune", str(key), _READERS, todo=f"Allowed: {', '.join(_READERS)}.")
    given = {key: _READERS[key](f"finetune.{key}", value) for key, value in fields.items() if value is not None}
    if "clip_grad_norm" in fields and not fields["clip_grad_norm"]:
        given["clip_grad_norm"] = None
    return Training(**given)


def _number(low: float, *, above: bool) -> Any:
    def read(name: str, value: Any) -> float:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
        if not fine or value < low or (above and value == low):
            todo = f"Give a number {'above' if above else 'of at least'} {low:g}."
            raise BadValue(f"{name} is out of range", value=value, todo=todo)
        return float(value)

    return read


def _whole(low: int) -> Any:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise BadValue(f"{name} must be a whole number", value=value, todo=f"Give {low} or more.")
        return value

    return read


def _share(name: str, value: Any) -> float:
    found: float = _number(0, above=False)(name, value)
    if found >= 1:
        raise BadValue(f"{name} must be below 1", value=value, todo="Typical: 0.03.")
    return found


def _scheduler(name: str, value: Any) -> str:
    if value not in SCHEDULERS:
        raise UnknownName(f"value of {name}", str(value), SCHEDULERS, todo=f"Allowed: {', '.join(SCHEDULERS)}.")
    return str(value)


_READERS = {
    "learning_rate": _number(0, above=True),
    "clip_grad_norm": _number(0, above=False),
    "scheduler": _scheduler,
    "warmup_share": _share,
    "weight_decay": _number(0, above=False),
    "save_steps": _whole(1),
    "eval_steps": _whole(1),
    "seed": _whole(0),
    "max_steps": _whole(1),
}
