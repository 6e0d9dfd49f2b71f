"""The library behind `whichlora rehearse`: workloads and a card in, what the real step took on it out."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from whichlora.nulldevice.stack import find_stack
from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import PhasePeak, Store, environment_from_json, workload_to_json

from . import breakdown
from .adapters import check
from .cards import find_card
from .pool import Pool
from .records import Rehearsal
from .stored import card_fields, environment_here, measurement, remembered

TIMEOUT_S = 600.0
_WORKER = "whichlora.rehearse.worker"
_NEEDED = ("torch", "transformers", "peft")


def rehearse(
    workloads: Iterable[Workload],
    gpu: str | Gpu,
    *,
    jobs: int | None = None,
    timeout_s: float = TIMEOUT_S,
    alloc_conf: str | None = None,
    routing: str = "even",
    explain: bool = False,
    store: Store | None = None,
    on_done: Callable[[Rehearsal], None] | None = None,
) -> Iterator[Rehearsal]:
    """Run workloads on a card that is not there and yield what each took, in the order of the input.

    `gpu` may be "unlimited". `jobs` is how many processes work at a time (default: one a processor); `on_done` hears of
    each rehearsal at once, whatever its place. What runs out of memory or fails is a rehearsal too. What a
    `store` holds from the same card and libraries is not run again; what is run is put there as soon as it is done.
    `explain` adds what is live at each peak.
    Raises WhichloraError before the first one for a workload that no library runs, or where something is not installed.
    """
    card = find_card(gpu) if isinstance(gpu, str) else gpu
    asked = list(workloads)
    for workload in asked:
        check(workload)
    count = _checked(jobs, timeout_s)
    need(_NEEDED)
    if any(_wants_bitsandbytes(workload) for workload in asked):
        need(("bitsandbytes",))
    settings = "" if routing == "even" else f"routing={routing}"
    settings += f" alloc_conf={alloc_conf}" if alloc_conf else ""
    plan = _Plan(asked=asked, gpu=card, store=store, settings=settings.strip(), explain=explain, on_done=on_done)
    variables = _environment(card, alloc_conf=alloc_conf, routing=routing)
    return plan.run(Pool(variables, module=_WORKER, jobs=min(count, len(asked)), timeout_s=timeout_s))


def need(packages: Iterable[str]) -> None:
    """Raise WhichloraError unless the packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        todo = 'Install them: pip install "whichlora[gpu]" (on Linux; no GPU is needed).'
        raise WhichloraError(
            "a rehearsal runs the real libraries, and some are not installed", value=missing, todo=todo
        )


def _checked(jobs: int | None, timeout_s: float) -> int:
    if jobs is not None and jobs < 1:
        raise BadValue("jobs must be positive", value=jobs, todo="Give 1 or more.")
    if not timeout_s > 0:
        raise BadValue("timeout must be a positive time", value=timeout_s, todo="Give seconds.")
    if hasattr(os, "sched_getaffinity"):  # Linux: the processors that this process may use
        return jobs or len(os.sched_getaffinity(0))
    return jobs or os.cpu_count() or 1


def _wants_bitsandbytes(workload: Workload) -> bool:
    trains = workload.phase == "train"
    return workload.quantization != "none" or (trains and workload.optimizer.startswith(("paged", "adamw-8bit")))


def _environment(gpu: Gpu, *, alloc_conf: str | None, routing: str) -> dict[str, str]:
    from whichlora.nulldevice import environment

    variables = environment(gpu, context_bytes=context_bytes(gpu), alloc_conf=alloc_conf, routing=routing)
    # One thread for what the host computes: as many workers as processors run beside each other.
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return variables | quiet | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be rehearsed on which card, and who wants to know."""

    asked: list[Workload]
    gpu: Gpu
    store: Store | None
    settings: str
    explain: bool
    on_done: Callable[[Rehearsal], None] | None

    def run(self, pool: Pool) -> Iterator[Rehearsal]:
        """Yield every rehearsal in its place: the stored ones, and those that the pool makes."""
        done = self._stored()
        for rehearsal in done.values():
            self._tell(rehearsal)
        jobs = [
            (i, {"workload": workload_to_json(workload), "explain": self.explain})
            for i, workload in enumerate(self.asked)
            if i not in done
        ]
        with pool:
            answers = pool.answers(jobs)
            for number in range(len(self.asked)):
                while number not in done:
                    self._take(next(answers), done)
                yield done.pop(number)

    def _take(self, answer: tuple[int, Mapping[str, Any]], done: dict[int, Rehearsal]) -> None:
        number, content = answer
        done[number] = _rehearsal(self.asked[number], self.gpu, content)
        if self.store:
            self.store.add([measurement(done[number], settings=self.settings)])
        self._tell(done[number])

    def _stored(self) -> dict[int, Rehearsal]:
        if self.store is None or self.explain:  # the store keeps no breakdowns
            return {}
        here = environment_here(self.gpu, cuda_version=find_stack().cuda_version)
        return remembered(self.store, self.asked, self.gpu, here, settings=self.settings)

    def _tell(self, rehearsal: Rehearsal) -> None:
        if self.on_done:
            self.on_done(rehearsal)


def _rehearsal(workload: Workload, gpu: Gpu, answer: Mapping[str, Any]) -> Rehearsal:
    peaks = answer.get("peaks", {}).items()
    return Rehearsal(
        workload=workload,
        gpu=gpu,
        outcome=answer["outcome"],
        error=answer["error"],
        phase=answer.get("phase", ""),
        phases={
            name: PhasePeak(allocated_peak_bytes=allocated, reserved_peak_bytes=reserved)
            for name, (allocated, reserved) in peaks
        },
        environment=dataclasses.replace(environment_from_json(answer["environment"]), **card_fields(gpu)),
        breakdown=breakdown.from_json(found) if (found := answer.get("breakdown")) else None,
        **answer.get("counts", {}),
    )
