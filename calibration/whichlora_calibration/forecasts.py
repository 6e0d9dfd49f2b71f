"""What the formula says of workloads on cards, kept for the next time: laying out a step is what calibration waits for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import whichlora_estimators
from whichlora_estimators.estimate import Estimate, estimate
from whichlora_estimators.files import write_whole
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.stack import Stack, stack_of
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement
from whichlora_profiles_db.canonical import content_hash
from whichlora_profiles_db.measurement import measurement_content
from whichlora_profiles_db.workload_form import content_id, workload_content

#: Workloads whose hashes are remembered at a time.
IDENTITIES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The formula's numbers of a workload on a card, by target, and its features; `total_bytes` of the card."""

    predicted: Mapping[str, float]
    features: Mapping[str, float]
    total_bytes: int


class Identities:
    """Hashes of measurements and workloads; the workload objects that measurements share are hashed once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Workload, Mapping[str, Any], str]] = {}

    def _of(self, workload: Workload) -> tuple[Workload, Mapping[str, Any], str]:
        found = self._known.get(id(workload))
        if found is None:
            if len(self._known) >= IDENTITIES:
                self._known.clear()
            content = workload_content(workload)
            # It holds the workload, so that no other object gets its address.
            found = self._known[id(workload)] = (workload, content, content_id(content))
        return found

    def workload(self, workload: Workload) -> str:
        """Return the workload's id."""
        return self._of(workload)[2]

    def measurement(self, measurement: Measurement) -> str:
        """Return the measurement's id."""
        return content_hash(measurement_content(measurement, self._of(measurement.workload)[1]))


class Forecasts:
    """Predicts each workload once a card; with a `folder`, what was predicted is kept there as long as the formula stays.

    Two processes may use one folder: the last to save wins, and what the other predicted is predicted again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else folder / f"forecasts-{formula_hash()[:16]}.json"
        self._known: dict[str, Any] = {}
        self._new = 0
        self.identities = Identities()
        if self._file is not None and self._file.exists():
            try:
                self._known = json.loads(self._file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                self._known = {}  # a damaged cache is none

    def of(self, workload: Workload, gpu: str, versions: Mapping[str, str] | None = None) -> Forecast:
        """Return a forecast, under these library versions. Raises WhichloraError for what has no formula."""
        stack, named = _stack(tuple((versions or {}).items()))
        key = f"{self.identities.workload(workload)} {gpu} {named}".rstrip()
        if key not in self._known:
            forecast = forecast_of(estimate(workload, find_gpu(gpu), stack=stack))
            self._known[key] = [dict(forecast.predicted), dict(forecast.features), forecast.total_bytes]
            self._new += 1
        predicted, features, total_bytes = self._known[key]
        return Forecast(predicted=predicted, features=features, total_bytes=total_bytes)

    def save(self) -> None:
        """Write what is new, whole or not at all."""
        if self._file is None or not self._new:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole({self._file: json.dumps(self._known)})
        self._new = 0


@lru_cache(maxsize=1024)
def _stack(versions: tuple[tuple[str, str], ...]) -> tuple[Stack, str]:
    stack = stack_of(dict(versions))
    return stack, ",".join(f"{name}=={version}" for name, version in stack.versions)


def forecast_of(found: Estimate) -> Forecast:
    """Return an estimate's numbers by target, and what corrections may hang on."""
    times = {
        "step": found.times.step_s,
        "prefill": found.times.prefill_s,
        "decode": found.times.decode_s_per_token,
    }
    predicted = {
        "allocated": float(found.allocated_peak_bytes),
        "reserved": float(found.reserved_peak_bytes),
        "process": float(found.process_bytes),
        **{name: seconds for name, seconds in times.items() if seconds},
    }
    return Forecast(predicted=predicted, features=features_of(found), total_bytes=found.gpu.total_bytes)


def features_of(found: Estimate) -> dict[str, float]:
    """Return what may explain a miss of memory: shares of the peak, and how the step runs. All are without units."""
    workload, parts, live = found.workload, found.peak.components, max(found.peak.live_bytes, 1)
    return {
        "activation share": parts.get("activations", 0) / live,
        "logits share": parts.get("logits and loss", 0) / live,
        "fragmentation": found.reserved_peak_bytes / live - 1,
        "four bit": float(workload.quantization in ("nf4", "fp4")),
        "checkpointing": float(workload.checkpointing),
        "generation": float(workload.phase == "generate"),
    }


def time_features(workload: Workload, predicted_s: float) -> dict[str, float]:
    """Return what may explain a miss of a time: how the step runs, and its size. All are without units."""
    tokens = workload.batch_size * (workload.seq_len if workload.phase == "train" else workload.prefill_len)
    return {
        "four bit": float(workload.quantization in ("nf4", "fp4")),
        "int8": float(workload.quantization == "int8"),
        "checkpointing": float(workload.checkpointing),
        "log tokens": math.log10(tokens),
        "log seconds": math.log10(predicted_s),
    }


@cache
def unseen_times() -> Mapping[str, Mapping[str, float]]:
    """Return seconds of published runs by the formula had it been fitted without their chips: by measurement, by target.

    The shipped constants of the roofline were fitted on these very runs, so that theirs would be no forecasts.
    """
    text = resources.files(__package__).joinpath("data/unseen_times.json").read_text(encoding="utf-8")
    times: Mapping[str, Mapping[str, float]] = json.loads(text)["seconds"]
    return times


@cache
def formula_hash() -> str:
    """Hash the estimators' code and data: what was predicted by others is not this formula's."""
    digest = hashlib.sha256()
    root = Path(str(whichlora_estimators.__file__)).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
