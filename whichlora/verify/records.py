"""What one verification showed, beside what was predicted, and its form for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whichlora_calibration import Prediction
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement, TimeStats

from ..api import answer as prediction_answer

_PHASES = ("load", "forward", "backward", "optimizer", "prefill", "decode")
_TIMES = ("step", "prefill", "decode_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A number that was predicted and then measured, in the unit of its name."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted: above 1, it took more."""
        return self.measured / self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One workload that was run: what was measured, and the formula's prediction for the same card (None without one).

    `gpu` is the card of our GPU data, None on the host and for a card that the data lacks. `remembered` says that the
    store held the measurement already.
    """

    measurement: Measurement
    gpu: Gpu | None
    prediction: Prediction | None
    remembered: bool = False

    @property
    def workload(self) -> Workload:
        """What was run."""
        return self.measurement.workload

    @property
    def outcome(self) -> str:
        """Tell "ok", "oom" (memory ran out) or "failed"."""
        return self.measurement.outcome

    @property
    def device(self) -> str:
        """Tell where it ran: "cuda", "null" or "cpu"."""
        return self.measurement.device

    @property
    def process_bytes(self) -> int | None:
        """What nvidia-smi shows, or resident host memory; on the null device reserved bytes and our data's context."""
        reserved_bytes = self.measurement.reserved_peak_bytes
        if self.device == "null" and self.gpu is not None and reserved_bytes is not None:
            return reserved_bytes + context_bytes(self.gpu)
        return self.measurement.process_bytes

    @property
    def compared(self) -> Mapping[str, Compared]:
        """What was both predicted and measured, by its name. Nothing, where the workload did not run to its end."""
        if self.prediction is None or self.outcome != "ok" or self.device == "cpu":
            return {}
        found = self.prediction.estimate
        pairs = {
            "allocated_peak_bytes": (found.allocated_peak_bytes, self.measurement.allocated_peak_bytes),
            "reserved_peak_bytes": (found.reserved_peak_bytes, self.measurement.reserved_peak_bytes),
            "process_bytes": (found.process_bytes, self.process_bytes),
            **{name: (getattr(found.times, name), value) for name, value in self.typical_s.items()},
        }
        return {
            name: Compared(predicted=predicted, measured=measured)
            for name, (predicted, measured) in pairs.items()
            if predicted and measured is not None
        }

    @property
    def typical_s(self) -> Mapping[str, float]:
        """The times that one number stands for: median step, median prefill, mean decoded token."""
        measured = self.measurement
        times: dict[str, tuple[TimeStats | None, str]] = {
            "step_s": (measured.step, "median_s"),
            "prefill_s": (measured.prefill, "median_s"),
            "decode_s_per_token": (measured.decode_per_token, "mean_s"),
        }
        return {name: getattr(stats, which) for name, (stats, which) in times.items() if stats is not None}


def answer(verification: Verification) -> dict[str, Any]:
    """Flatten a verification for machines; `oom` or `error` says that it did not end well."""
    measured = verification.measurement
    environment = measured.environment
    failed = {} if measured.outcome == "ok" else {"error": measured.error}
    return {
        "id": measured.workload.id,
        "model": measured.workload.model,
        "on": measured.device,
        "gpu": environment.gpu,
        "gpu_name": environment.gpu_name,
        "outcome": measured.outcome,
        **({"oom": True} if measured.outcome == "oom" else {}),
        **failed,
        "trainable_params": measured.trainable_params,
        "weights_bytes": measured.weights_bytes,
        "model_bytes": measured.model_bytes,
        "allocated_peak_bytes": measured.allocated_peak_bytes,
        "reserved_peak_bytes": measured.reserved_peak_bytes,
        "process_bytes": verification.process_bytes,
        "phases": {
            name: {counter: getattr(peak, counter) for counter in ("allocated_peak_bytes", "reserved_peak_bytes")}
            for name, peak in sorted(measured.phase_peaks.items(), key=lambda item: _place(item[0]))
        },
        **dict(verification.typical_s),
        "times": {name: _times(stats) for name in _TIMES if (stats := getattr(measured, name)) is not None},
        "predicted": prediction_answer(verification.prediction) if verification.prediction else None,
        "ratio": {name: compared.ratio for name, compared in verification.compared.items()},
        "evidence": measured.evidence,
        "versions": dict(environment.versions),
        "measurement": measured.id,
        "remembered": verification.remembered,
    }


def _times(stats: TimeStats) -> dict[str, Any]:
    summary = {name: getattr(stats, name) for name in ("min_s", "mean_s", "median_s", "max_s")}
    return {**summary, "samples_s": list(stats.samples_s)}


def _place(phase: str) -> int:
    """Order phases as they come."""
    return _PHASES.index(phase) if phase in _PHASES else len(_PHASES)
