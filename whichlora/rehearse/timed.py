"""Step times of workloads by rehearsal: the real libraries on the null device, their kernels on the card's two lanes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from whichlora_estimators.gpus import Gpu, find_gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import workload_to_json

from .adapters import check
from .lanes import variables
from .pool import Pool
from .records import EVIDENCE
from .rehearsals import TIMEOUT_S, environment_of

_WORKER = "whichlora.rehearse.timed_worker"
#: Between which multiples of a rehearsed time measured ones are to be expected: PEFT's published runs of 15 methods of training
#: a Llama-3.2-3B on an L40S took 0.94 to 1.14 times what benchmarks/peft_step.py shows on the null device; and some more, since
#: that card's host was known from these runs.
MEASURED_OVER_REHEARSED = (0.85, 1.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRehearsal:
    """Seconds of one workload on a card that is not there, by name: a step, or a prefill and a decoded token."""

    workload: Workload
    gpu: Gpu
    times: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    evidence: str = EVIDENCE

    def interval_s(self, name: str) -> tuple[float, float]:
        """Bound a time by how rehearsed times of published runs compared with the measured ones."""
        low, high = MEASURED_OVER_REHEARSED
        return self.times[name] * low, self.times[name] * high


def rehearse_times(
    workloads: Iterable[Workload], gpu: str | Gpu, *, jobs: int = 1, timeout_s: float = TIMEOUT_S
) -> Iterator[TimedRehearsal]:
    """Time workloads on a card that is not there, in the order of the input.

    Memory is not limited: what does not fit is timed as well. Raises WhichloraError for a workload that no library runs,
    or where something is not installed.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    asked = list(workloads)
    for workload in asked:
        check(workload)
    given = environment_of(card, limited=False) | variables(card)
    done: dict[int, TimedRehearsal] = {}
    with Pool(given, module=_WORKER, jobs=max(1, min(jobs, len(asked))), timeout_s=timeout_s) as pool:
        answers = pool.answers((i, {"workload": workload_to_json(workload)}) for i, workload in enumerate(asked))
        for number in range(len(asked)):
            while number not in done:
                place, content = next(answers)
                done[place] = _timed(asked[place], card, content)
            yield done.pop(number)


def _timed(workload: Workload, gpu: Gpu, answer: Mapping[str, Any]) -> TimedRehearsal:
    times = {name: statistics.median(seconds) for name, seconds in answer.get("times", {}).items() if seconds}
    return TimedRehearsal(workload=workload, gpu=gpu, times=times, error=answer.get("error", ""))


def answer(timed: TimedRehearsal) -> dict[str, Any]:
    """Flatten a timed rehearsal for machines."""
    head = {
        "id": timed.workload.id,
        "model": timed.workload.model,
        "gpu": timed.gpu.slug,
        "method": timed.workload.method,
    }
    if timed.error:
        return {**head, "error": timed.error}
    shown: dict[str, Any] = {f"{name}_s": seconds for name, seconds in timed.times.items()}
    shown |= {f"{name}_s_interval": list(timed.interval_s(name)) for name in timed.times}
    return {**head, **shown, "evidence": timed.evidence}
