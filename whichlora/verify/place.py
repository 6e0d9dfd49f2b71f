"""Where to verify: the card that PyTorch sees, the null device playing one, or the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from whichlora.rehearse.cards import find_card
from whichlora.rehearse.pool import Pool, processors
from whichlora.rehearse.rehearsals import need
from whichlora.rehearse.stored import card_fields, environment_here
from whichlora_estimators.errors import BadValue, UnknownName, WhichloraError
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_profiles_db import Environment, environment_from_json

from .card import known_card

ON = ("auto", "cuda", "null", "cpu")
WORKER = "whichlora.verify.worker"
DEVICE = "WHICHLORA_VERIFY_DEVICE"  # what the worker reads
NEEDED = ("torch", "transformers", "peft")
_LOOK_TIMEOUT_S = 300.0
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device ("cuda", "null" or "cpu"), its card if our data has it, and what a worker there says of itself.

    `variables` are added to the environment of workers; `jobs` is how many may work at a time without disturbing a time.
    """

    device: str
    gpu: Gpu | None
    environment: Environment
    variables: Mapping[str, str]
    jobs: int = 1

    @property
    def evidence(self) -> str:
        """Tell what a number from here counts as."""
        return "rehearsed" if self.device == "null" else "measured"

    def described(self, environment: Environment) -> Environment:
        """Return a worker's environment; of the null device nothing but the card that it plays is true."""
        if self.device != "null" or self.gpu is None:
            return environment
        return dataclasses.replace(environment, driver_version=None, **card_fields(self.gpu))


def find_place(on: str, gpu: str | Gpu | None = None) -> Place:
    """Look where workloads will run. `gpu` is the card that the null device plays, and only for that.

    Raises UnknownName, BadValue for a card where none can be chosen or where one must be, WhichloraError where PyTorch
    is not installed or sees no card though one was asked for.
    """
    need(NEEDED)
    if on not in ON:
        raise UnknownName("place to verify on", on, ON, todo=f"Known: {', '.join(ON)}.")
    if on == "null":
        return _null_device(gpu)
    if gpu is not None:
        todo = "Leave it out; CUDA_VISIBLE_DEVICES chooses among several cards. --on null plays any."
        raise BadValue(f"the card is the one that is there, with --on {on}", value=gpu, todo=todo)
    return _host() if on == "cpu" else _card(on)


def _null_device(gpu: str | Gpu | None) -> Place:
    from whichlora.nulldevice import environment
    from whichlora.nulldevice.stack import find_stack

    if gpu is None:
        raise BadValue("no --gpu given for the null device to play", todo="Example: --on null --gpu rtx-4090.")
    card = find_card(gpu) if isinstance(gpu, str) else gpu
    variables = {**environment(card, context_bytes=context_bytes(card)), **_QUIET, "OMP_NUM_THREADS": "1"}
    here = environment_here(card, cuda_version=find_stack().cuda_version)  # no need to look: nothing is there
    return Place(device="null", gpu=card, environment=here, variables=variables | {DEVICE: "cuda"}, jobs=processors())


def _host() -> Place:
    return _looked("cpu", {**_QUIET, DEVICE: "cpu", "CUDA_VISIBLE_DEVICES": ""}, None)


def _card(on: str) -> Place:
    place = _looked("cuda", {**_QUIET, DEVICE: "cuda"}, None)
    seen = place.environment
    if seen.gpu_name is None or seen.gpu_total_bytes is None or seen.compute_capability is None:
        built = seen.versions.get("cuda")
        why = f"torch {seen.versions.get('torch')}, " + (f"built for CUDA {built}" if built else "built without CUDA")
        todo = (
            "Choose --on null (memory, on a card that is not there) or --on cpu (times of a small model on the host)."
        )
        raise WhichloraError(f"PyTorch sees no CUDA card to verify on (--on {on})", value=why, todo=todo)
    gpu = known_card(seen.gpu_name, total_bytes=seen.gpu_total_bytes, compute_capability=seen.compute_capability)
    return dataclasses.replace(place, gpu=gpu)


def _looked(device: str, variables: Mapping[str, str], gpu: Gpu | None) -> Place:
    """Ask a worker what it sees: this process shall hold no memory of the card."""
    with Pool(variables, module=WORKER, jobs=1, timeout_s=_LOOK_TIMEOUT_S) as pool:
        ((_, answer),) = pool.answers([(0, {})])
    if answer["outcome"] != "ok":
        raise WhichloraError("a worker process cannot look around", value=answer["error"], todo="See its message.")
    environment = environment_from_json(answer["environment"])
    return Place(device=device, gpu=gpu, environment=environment, variables=variables)
