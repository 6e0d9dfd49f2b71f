"""The library behind `whichlora rehearse`: workloads and a card in, what the real step took on it out."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whichlora.nulldevice.stack import find_stack
from whichlora_estimators.errors import BadValue, UnknownName, WhichloraError
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import PhasePeak, Store, environment_from_json, workload_to_json

from . import breakdown
from .adapters import check, wants_bitsandbytes
from .cards import UNLIMITED, find_card
from .pool import Pool, processors
from .records import Rehearsal
from .stacks import OtherStack
from .stored import card_fields, environment_here, measurement, remembered, version_of_ours

TIMEOUT_S = 600.0
_WORKER = "whichlora.rehearse.worker"
_NEEDED = ("torch", "transformers", "peft")
#: How a model comes to be on the card: made there from its config, or loaded by `from_pretrained` from a checkpoint.
CONFIG, CHECKPOINT = LOADS = ("config", "checkpoint")


def rehearse(
    workloads: Iterable[Workload],
    gpu: str | Gpu,
    *,
    jobs: int | None = None,
    timeout_s: float = TIMEOUT_S,
    alloc_conf: str | None = None,
    routing: str = "even",
    explain: bool = False,
    load: str = CONFIG,
    fresh: bool | None = None,
    stack: OtherStack | None = None,
    store: Store | None = None,
    on_done: Callable[[Rehearsal], None] | None = None,
) -> Iterator[Rehearsal]:
    """Run workloads on a card that is not there and yield what each took, in the order of the input.

    `gpu` may be "unlimited". `jobs` is how many processes work at a time (default: one a processor); `on_done` hears of
    each rehearsal at once, whatever its place. What runs out of memory or fails is a rehearsal too. What a
    `store` holds from the same card and libraries is not run again; what is run is put there as soon as it is done.
    `explain` adds what is live at each peak. `load` is one of LOADS: how the model comes to be on the card. `fresh` says that
    a workload's process has done nothing before (None: where the model is loaded from a checkpoint), so that cuBLAS
    workspaces come when they are needed; else it finds those of a process that has trained. `stack` is an environment of
    other versions (`stacks.make_stack`) to run in.
    Raises WhichloraError before the first one for a workload that no library runs, or where something is not installed.
    """
    card = find_card(gpu) if isinstance(gpu, str) else gpu
    asked = list(workloads)
    for workload in asked:
        check(workload)
    count = _checked(jobs, timeout_s)
    if load not in LOADS:
        raise UnknownName("way to load", load, LOADS, todo=f"Give one of {', '.join(LOADS)}.")
    if stack is None:
        need(_packages_for(asked, load))
    settings = {"routing": routing if routing != "even" else "", "alloc_conf": alloc_conf or ""}
    settings["load"] = load if load != CONFIG else ""
    fresh = load == CHECKPOINT if fresh is None else fresh
    settings["process"] = "fresh" if fresh else ""
    plan = _Plan(
        asked=asked,
        gpu=card,
        store=store,
        settings=" ".join(f"{name}={value}" for name, value in settings.items() if value),
        explain=explain,
        load=load,
        fresh=fresh,
        stack=stack,
        on_done=on_done,
    )
    python = stack.python if stack else None
    variables = _environment(card, alloc_conf=alloc_conf, routing=routing, python=python)
    pool = Pool(
        variables,
        module=_WORKER,
        jobs=min(count, len(asked)),
        timeout_s=timeout_s,
        python=python,
        packages=stack.packages if stack else None,
    )
    return plan.run(pool)


class Rehearser:
    """Rehearses one workload after the other, as its user comes to want it, with a worker that stays ready meanwhile.

    Of each it says what `rehearse` does of it, with nothing but a card and a `store` chosen. Raises what that raises.
    """

    def __init__(self, gpu: Gpu, *, store: Store | None = None) -> None:
        self._gpu, self._store = gpu, store
        need(_NEEDED)
        self._pool = Pool(environment_of(gpu), module=_WORKER, jobs=1, timeout_s=TIMEOUT_S)

    def __enter__(self) -> Rehearser:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def rehearse(self, workload: Workload) -> Rehearsal:
        """Return what a workload took."""
        check(workload)
        need(_packages_for([workload], CONFIG))
        plan = _Plan(
            asked=[workload],
            gpu=self._gpu,
            store=self._store,
            settings="",
            explain=False,
            load=CONFIG,
            fresh=False,
            stack=None,
            on_done=None,
        )
        (found,) = plan.results(self._pool)
        return found


def _packages_for(asked: Iterable[Workload], load: str) -> tuple[str, ...]:
    quantized = ("bitsandbytes",) if any(map(wants_bitsandbytes, asked)) else ()
    return (*_NEEDED, *quantized, *(("accelerate",) if load == CHECKPOINT else ()))


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
    return jobs or processors()


def environment_of(gpu: Gpu, *, limited: bool = True) -> dict[str, str]:
    """Return what workers find in their environment on a card; one that is not `limited` has room for anything."""
    card = gpu if limited else dataclasses.replace(gpu, total_bytes=find_card(UNLIMITED).total_bytes)
    return _environment(card, alloc_conf=None, routing="even", python=None)


def _environment(gpu: Gpu, *, alloc_conf: str | None, routing: str, python: Path | None) -> dict[str, str]:
    from whichlora.nulldevice import environment

    context = context_bytes(gpu)
    variables = environment(gpu, context_bytes=context, alloc_conf=alloc_conf, routing=routing, python=python)
    # One thread for what the host computes: as many workers as processors run beside each other.
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Loading one tensor after the other, since the order of threads would show in reserved bytes.
    return variables | quiet | {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be rehearsed on which card, and who wants to know."""

    asked: list[Workload]
    gpu: Gpu
    store: Store | None
    settings: str
    explain: bool
    load: str
    fresh: bool
    stack: OtherStack | None
    on_done: Callable[[Rehearsal], None] | None

    def run(self, pool: Pool) -> Iterator[Rehearsal]:
        """Yield every rehearsal in its place: the stored ones, and those that the pool makes."""
        with tempfile.TemporaryDirectory(prefix="whichlora-phantoms-") as folder, pool:
            yield from self.results(pool, folder if self.load == CHECKPOINT else "")

    def results(self, pool: Pool, phantoms: str = "") -> Iterator[Rehearsal]:
        """Yield the same from a pool that stays; `phantoms` is the folder of checkpoints that are loaded."""
        done = self._stored()
        for rehearsal in done.values():
            self._tell(rehearsal)
        settings = {"explain": self.explain, "fresh": self.fresh, "phantoms": phantoms}
        jobs = [
            (i, {"workload": workload_to_json(workload), **settings})
            for i, workload in enumerate(self.asked)
            if i not in done
        ]
        answers = pool.answers(jobs)
        for number in range(len(self.asked)):
            while number not in done:
                self._take(next(answers), done)
            yield done.pop(number)

    def _take(self, answer: tuple[int, Mapping[str, Any]], done: dict[int, Rehearsal]) -> None:
        number, content = answer
        found = _rehearsal(self.asked[number], self.gpu, content)
        done[number] = dataclasses.replace(found, stack=self.stack.text) if self.stack else found
        if self.store:
            self.store.add([measurement(done[number], settings=self.settings)])
        self._tell(done[number])

    def _stored(self) -> dict[int, Rehearsal]:
        if self.store is None or self.explain:  # the store keeps no breakdowns
            return {}
        stack = self.stack
        here = environment_here(self.gpu, cuda_version=find_stack(stack.python if stack else None).cuda_version)
        if stack:
            versions = {**stack.versions, "cuda": here.versions["cuda"]}
            here = dataclasses.replace(here, versions=versions, python_version=stack.python_version)
        found = remembered(self.store, self.asked, self.gpu, here, settings=self.settings)
        return {n: dataclasses.replace(each, stack=stack.text) for n, each in found.items()} if stack else found

    def _tell(self, rehearsal: Rehearsal) -> None:
        if self.on_done:
            self.on_done(rehearsal)


def _rehearsal(workload: Workload, gpu: Gpu, answer: Mapping[str, Any]) -> Rehearsal:
    peaks = [
        (name, peak) for name, peak in answer.get("peaks", {}).items() if peak[0]
    ]  # it may fail before it allocates
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
        environment=dataclasses.replace(
            environment_from_json(answer["environment"]), whichlora_version=version_of_ours(), **card_fields(gpu)
        ),
        breakdown=breakdown.from_json(found) if (found := answer.get("breakdown")) else None,
        **answer.get("counts", {}),
    )
