"""What a config's `slurm` section says: how jobs are asked for, and what they run first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whichlora_estimators.errors import BadValue, UnknownName

_TEXTS = ("account", "partition", "qos", "memory", "python")
_LISTS = ("modules", "setup", "options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """How jobs are submitted.

    `time_margin` times the predicted time is asked for; `memory` is Slurm's `--mem`; `setup` are shell lines, run after
    `modules` are loaded; `options` are further lines of `#SBATCH`; `gpu_types` maps the cluster's names of GPU types to
    ours; `python` is the interpreter of the jobs (default: the one that wrote them); `at_once` is how many tasks of an
    array run at a time, at most.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    memory: str | None = None
    cpus: int = 4
    time_margin: float = 1.5
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    gpu_types: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    at_once: int = 8


def cluster_from_fields(fields: Mapping[str, Any]) -> Cluster:
    """Validate a config's `slurm` section. Raises BadValue or UnknownName."""
    known = tuple(Cluster.__dataclass_fields__)
    for key in fields:
        if key not in known:
            raise UnknownName("key in slurm", str(key), known, todo=f"Allowed: {', '.join(known)}.")
    return Cluster(**{key: _read(key, value) for key, value in fields.items() if value is not None})


def _read(key: str, value: Any) -> Any:
    name = f"slurm.{key}"
    if key in _TEXTS:
        if not isinstance(value, str | int) or isinstance(value, bool) or "\n" in str(value):
            raise BadValue(f"{name} must be one line of text", value=value, todo="As you would write it after sbatch.")
        return str(value)
    if key in _LISTS:
        lines = value if isinstance(value, list) else [value]
        if not all(isinstance(line, str) for line in lines):
            raise BadValue(f"{name} must be lines of text", value=value, todo="Give a list.")
        return tuple(lines)
    if key == "gpu_types":
        if not isinstance(value, dict):
            raise BadValue(f"{name} must be a mapping", value=value, todo="Example: {a100: a100-sxm-40gb}.")
        return {str(theirs): str(ours) for theirs, ours in value.items()}
    least = 1.0 if key == "time_margin" else 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise BadValue(f"{name} is out of range", value=value, todo="Give 1 or more.")
    return float(value) if key == "time_margin" else int(value)
