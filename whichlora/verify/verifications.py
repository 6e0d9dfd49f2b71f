"""The library behind `whichlora verify`: workloads in, what their real step took here out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from whichlora.rehearse.adapters import check, wants_bitsandbytes
from whichlora.rehearse.pool import Pool
from whichlora.rehearse.rehearsals import TIMEOUT_S, need
from whichlora_calibration import Prediction, predict
from whichlora_estimators.errors import BadValue, Unsupported, WhichloraError
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement, Store, workload_to_json

from .place import WORKER, Place, find_place
from .records import Verification
from .stored import measurement, remembered

STEPS = 10
WARMUP = 2
#: Seconds between words of how far a workload is.
TELL_S = 5.0
_ON_HOST = {
    "precision": ("fp32", "bf16-true", "bf16-mixed"),
    "quantization": ("none",),
    "optimizer": ("adamw", "sgd", "adafactor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to verify: `warmup` steps, then `steps` timed ones; at most `timeout_s` a workload.

    What a `store` holds from the same place is not run, except `again`; what is run is put there as soon as it is done,
    and then `on_done` hears of it. `on_progress` hears every `tell_s` seconds how far a workload is that takes longer, on
    the host.
    """

    steps: int = STEPS
    warmup: int = WARMUP
    timeout_s: float = TIMEOUT_S
    store: Store | None = None
    again: bool = False
    on_done: Callable[[Verification], None] | None = None
    on_progress: Callable[[Workload, str], None] | None = None
    tell_s: float = TELL_S

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadValue("steps must be positive", value=self.steps, todo="Give 1 or more.")
        if self.warmup < 0:
            raise BadValue("warmup must not be negative", value=self.warmup, todo="Give 0 or more.")
        if not self.timeout_s > 0:
            raise BadValue("timeout must be a positive time", value=self.timeout_s, todo="Give seconds.")


def verify(
    workloads: Iterable[Workload],
    *,
    on: str | Place = "auto",
    gpu: str | Gpu | None = None,
    options: Options | None = None,
) -> Iterator[Verification]:
    """Run workloads for real and yield what each took, in the order of the input.

    `on` is "cuda" (the card that PyTorch sees), "null" (the same code on a `gpu` that is not there: memory only), "cpu",
    or "auto": the card, or an error. What runs out of memory or fails is a verification too.
    Raises WhichloraError before the first one for a workload that cannot run there, or where something is missing.
    """
    asked = list(workloads)
    check_all(asked, on)
    place = find_place(on, gpu) if isinstance(on, str) else on
    return _verified(_Run(asked=asked, place=place, options=options or Options()))


def _verified(run: _Run) -> Iterator[Verification]:
    with run.workers(run.place.jobs) as workers:
        yield from run.results(workers)


class Verifier:
    """Verifies one workload after the other, as its user comes to want it, with a worker that stays ready meanwhile."""

    def __init__(self, place: Place, options: Options) -> None:
        self._run = _Run(asked=[], place=place, options=options)
        self._workers = self._run.workers(1)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def verify(self, workload: Workload) -> Verification:
        """Return what a workload took that `check_all` let through."""
        (found,) = dataclasses.replace(self._run, asked=[workload]).results(self._workers)
        return found


def check_all(workloads: Iterable[Workload], on: str | Place) -> None:
    """Refuse workloads before anything is run. Raises what `check_on` raises, WhichloraError for what is not installed."""
    asked = list(workloads)
    for workload in asked:
        check_on(workload, on.device if isinstance(on, Place) else on)
    if any(map(wants_bitsandbytes, asked)):
        need(("bitsandbytes",))


def check_on(workload: Workload, on: str) -> None:
    """Refuse a workload that no library runs, or not there. Raises UnknownName or Unsupported."""
    check(workload)
    if on != "cpu":
        return
    for field, known in _ON_HOST.items():
        value = getattr(workload, field)
        if value not in known and not (workload.phase == "generate" and field == "optimizer"):
            todo = f"There: {', '.join(known)}; or --on null for its memory."
            raise Unsupported(f"this {field} is not run on the host", value=value, todo=todo)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What is to be verified, where and how."""

    asked: list[Workload]
    place: Place
    options: Options

    def workers(self, jobs: int) -> Pool:
        """Return a pool that starts as many workers at most, each when there is something for it to do."""
        return Pool(self.place.variables, module=WORKER, jobs=jobs, timeout_s=self.options.timeout_s)

    def results(self, workers: Pool) -> Iterator[Verification]:
        """Yield every verification in its place: the remembered ones, and those that workers make."""
        done = {number: self._verification(found, remembered=True) for number, found in self._remembered().items()}
        for verification in done.values():
            self._tell(verification)
        settings = {"warmup": self.options.warmup, "steps": self.options.steps, "tell_s": self.options.tell_s}
        jobs = [
            (number, {"workload": workload_to_json(workload), **settings})
            for number, workload in enumerate(self.asked)
            if number not in done
        ]
        answers = workers.answers(jobs, self._tell_progress)
        for number in range(len(self.asked)):
            while number not in done:
                other, answer = next(answers)
                done[other] = self._take(measurement(self.asked[other], self.place, answer))
            yield done.pop(number)

    def _take(self, measured: Measurement) -> Verification:
        if self.options.store:
            self.options.store.add([measured])
        verification = self._verification(measured)
        self._tell(verification)
        return verification

    def _remembered(self) -> dict[int, Measurement]:
        store = self.options.store
        if store is None or self.options.again:
            return {}
        found = remembered(store, self.asked, self.place, steps=self.options.steps)
        return {number: each.with_(workload=self.asked[number]) for number, each in found.items()}

    def _verification(self, measured: Measurement, *, remembered: bool = False) -> Verification:
        gpu = self.place.gpu
        return Verification(
            measurement=measured,
            gpu=gpu,
            prediction=_predicted(measured.workload, gpu) if gpu else None,
            remembered=remembered,
        )

    def _tell_progress(self, number: int, text: str) -> None:
        if self.options.on_progress:
            self.options.on_progress(self.asked[number], text)

    def _tell(self, verification: Verification) -> None:
        if self.options.on_done:
            self.options.on_done(verification)


def _predicted(workload: Workload, gpu: Gpu) -> Prediction | None:
    """Return the formula's prediction; None for what has no formula, which is no reason not to run it."""
    try:
        return predict(workload, gpu)
    except WhichloraError:
        return None
