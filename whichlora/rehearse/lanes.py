"""The clock of a card that computes nothing: every operator lays its kernels on two lanes, the host's and the card's.

The null device keeps the lanes and lets CUDA events, synchronisations and values read back see them. How long a kernel
would take is what the roofline says of it; how long the host takes to launch it, what published runs say of hosts, since
the host of the target is not this one.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

from whichlora_estimators.gpus import Gpu, gpu_from_fields
from whichlora_estimators.roofline import Roofline, launch_seconds
from whichlora_estimators.tape import Kernel

from .seen import kernels_of

#: The card, as JSON, in the environment of a process whose CUDA events are to tell its time.
TIME = "WHICHLORA_REHEARSAL_TIME"


def variables(gpu: Gpu) -> dict[str, str]:
    """Return what to add to a process's environment so that `start` finds the card there."""
    fields = asdict(gpu)
    given = {name: fields[name] for name in ("name", "slug", "sm_count", "total_bytes", "hbm_bytes_per_s", "segment")}
    given |= {name: fields[name] for name in ("l2_bytes", "power_w") if fields[name] is not None}
    given["compute_capability"] = ".".join(map(str, gpu.compute_capability))
    given["matmul_flops_per_s"] = {
        key: rate for key, rate in asdict(gpu.matmul_flops_per_s).items() if rate is not None
    }
    return {TIME: json.dumps(given)}


@dataclass(slots=True)
class Lanes:
    """What the null device's lanes show, and when each optimizer step of this process ended on the card."""

    control: Any
    steps_s: list[float]

    def device_s(self) -> float:
        """Return when the card has done all that was issued so far."""
        return float(self.control.device_s())

    @property
    def step_s(self) -> float | None:
        """The median time between the ends of optimizer steps, the first two left out where there are enough."""
        ends = self.steps_s[min(2, max(0, len(self.steps_s) - 3)) :]
        gaps = [b - a for a, b in pairwise(ends)]
        return statistics.median(gaps) if gaps else None


def start(control: Any) -> Lanes:
    """Watch every operator of this process from now on; `control` is the null device's. PyTorch must be importable."""
    import torch

    gpu = gpu_from_fields(json.loads(os.environ[TIME]))
    lanes = Lanes(control, [])
    _mode(gpu, control).__enter__()
    hooks: Any = import_module("torch.optim.optimizer")
    hooks.register_optimizer_step_post_hook(lambda *_: lanes.steps_s.append(lanes.device_s()))
    del torch
    return lanes


def _mode(gpu: Gpu, control: Any) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    roofline = Roofline(gpu)
    durations: dict[Kernel, float] = {}
    main, plain_s = threading.get_ident(), launch_seconds(gpu)
    recording_s = launch_seconds(gpu, recording=True)
    launches: Callable[[], int] = control.launches

    class Lay(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Runs an operator, then lays the kernels that it launched."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen = launches()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            self._lay([_UNSEEN] * (launches() - self.seen))  # what no operator launched since
            before = launches()
            result = func(*args, **(kwargs or {}))
            self.seen = launches()
            if self.seen > before:
                self._lay(kernels_of(func._schema.name, args, dict(kwargs or {}), result, self.seen - before))
            return result

        def _lay(self, kernels: list[Kernel]) -> None:
            backward = threading.get_ident() != main
            launch_s = recording_s if backward or torch.is_grad_enabled() else plain_s
            for kernel in kernels:
                if kernel not in durations:
                    durations[kernel] = roofline.kernel_s(kernel)
                control.work(launch_s, durations[kernel])

    return Lay()


#: A launch of which nothing is known but that it happened: it moves hardly anything.
_UNSEEN = Kernel(1)
