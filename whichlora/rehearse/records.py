"""What one rehearsal showed, and its forms for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, PhasePeak

from .breakdown import Breakdown, to_json

EVIDENCE = "rehearsed"
LOAD = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One workload on a card that is not there. What is unknown is None.

    `outcome` is "ok", "oom" (the card ran out, in `phase`) or "failed" (for the reason in `error`). `phases` holds the
    peaks of each phase that was entered: load, then forward, backward and optimizer, or prefill and decode.
    `managed_peak_bytes` lie in managed memory (the state of paged optimizers), which may leave the card and which no
    other number holds. `breakdown` tells what was live at the allocated peak, where that was asked for. `stack` says
    under which requirements it ran, if not under what is installed here.
    """

    workload: Workload
    gpu: Gpu
    outcome: str
    error: str = ""
    phase: str = ""
    trainable_params: int | None = None
    weights_bytes: int | None = None
    model_bytes: int | None = None
    managed_peak_bytes: int | None = None
    phases: Mapping[str, PhasePeak] = field(default_factory=dict)
    stack: str = ""
    environment: Environment = field(default_factory=Environment, repr=False)
    breakdown: Breakdown | None = field(default=None, repr=False)

    @property
    def versions(self) -> Mapping[str, str]:
        """The version of every library that ran."""
        return self.environment.versions

    @property
    def allocated_peak_bytes(self) -> int | None:
        """`torch.cuda.max_memory_allocated()` over the steps; loading, which comes once, has a phase of its own."""
        return self._peak("allocated_peak_bytes")

    @property
    def reserved_peak_bytes(self) -> int | None:
        """`torch.cuda.max_memory_reserved()` over the steps, what loading left in the cache included."""
        return self._peak("reserved_peak_bytes")

    @property
    def process_bytes(self) -> int | None:
        """Reserved bytes and the CUDA context, which no rehearsal sees: it is that of our GPU data."""
        reserved_bytes = self.reserved_peak_bytes
        return None if reserved_bytes is None else reserved_bytes + context_bytes(self.gpu)

    @property
    def peak_phase(self) -> str | None:
        """The phase of the allocated peak."""
        peaks = {name: peak.allocated_peak_bytes or 0 for name, peak in self._steps().items()}
        return max(peaks, key=peaks.__getitem__) if peaks else None

    def _steps(self) -> dict[str, PhasePeak]:
        steps = {name: peak for name, peak in self.phases.items() if name != LOAD}
        return steps or dict(self.phases)

    def _peak(self, counter: str) -> int | None:
        seen = [value for peak in self._steps().values() if (value := getattr(peak, counter)) is not None]
        return max(seen, default=None)


def answer(rehearsal: Rehearsal) -> dict[str, Any]:
    """Flatten a rehearsal for machines; `oom` or `error` says that it did not end well."""
    failed = {} if rehearsal.outcome == "ok" else {"error": rehearsal.error, "phase": rehearsal.phase}
    return {
        "id": rehearsal.workload.id,
        "model": rehearsal.workload.model,
        "gpu": rehearsal.gpu.slug,
        "outcome": rehearsal.outcome,
        **({"oom": True} if rehearsal.outcome == "oom" else {}),
        **failed,
        "trainable_params": rehearsal.trainable_params,
        "weights_bytes": rehearsal.weights_bytes,
        "model_bytes": rehearsal.model_bytes,
        "allocated_peak_bytes": rehearsal.allocated_peak_bytes,
        "reserved_peak_bytes": rehearsal.reserved_peak_bytes,
        "process_bytes": rehearsal.process_bytes,
        "managed_peak_bytes": rehearsal.managed_peak_bytes,
        "peak_phase": rehearsal.peak_phase,
        "phases": {
            name: {
                "allocated_peak_bytes": peak.allocated_peak_bytes,
                "reserved_peak_bytes": peak.reserved_peak_bytes,
            }
            for name, peak in rehearsal.phases.items()
        },
        **({"breakdown": to_json(rehearsal.breakdown)} if rehearsal.breakdown else {}),
        **({"stack": rehearsal.stack} if rehearsal.stack else {}),
        "evidence": EVIDENCE,
        "versions": dict(rehearsal.versions),
    }
