"""The clock of a card that computes nothing: every operator lays its kernels on two lanes, the host's and the card's.

The null device keeps the lanes and lets CUDA events, synchronisations and values read back see them. How long a kernel
would take is what the roofline says of it; how long the host takes to launch it, what published runs say of hosts, since
the host of the target is not this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import pairwise
from typing import Any

from whichlora_estimators.decomposed import AROUND_SVD, WAIT_S, svd_seconds
from whichlora_estimators.gpus import Gpu, gpu_from_fields
from whichlora_estimators.roofline import Roofline, default_constants, launch_seconds
from whichlora_estimators.tape import Kernel

from .seen import kernels_of, tensors_in

#: The card, as JSON, in the environment of a process whose CUDA events are to tell its time.
TIME = "WHICHLORA_REHEARSAL_TIME"

# What the host takes for a launch, in launches of modules that run without autograd, which is what is known of hosts: of
# modules while autograd records, of autograd's own in backward, of operators that Python calls outside of any module (an
# optimizer that is a loop), and for each tensor of an operator on a list of them (clipping, foreach optimizers).
# Measured on the null device: benchmarks/host_shares.py, 2026-11-22, PyTorch 2.14.
RECORDED, BACKWARD, OUTSIDE, LISTED = 1.36, 1.07, 0.6, 0.2

#: What a kernel that is bound by bytes takes to start and to drain, on top of its bytes; the roofline's products have such a
#: time of their own, and for the others it has a least time in place of a sum. Chosen together with the host of PEFT's L40S,
#: of a grid, on its published steps of 13 methods (benchmarks/peft_host.py, 2026-11-22); the six in docs/time.md are others.
START_S = 3.5e-6


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
    issue: _Issue
    steps_s: list[float] = field(default_factory=list)

    def device_s(self) -> float:
        """Return when the card has done all that was issued so far."""
        return float(self.control.device_s())

    @property
    def step_s(self) -> float | None:
        """The median time between the ends of optimizer steps, the first two left out where there are enough."""
        ends = self.steps_s[min(2, max(0, len(self.steps_s) - 3)) :]
        gaps = [b - a for a, b in pairwise(ends)]
        return statistics.median(gaps) if gaps else None

    @contextlib.contextmanager
    def decomposing(self, name: str, matrix: Any) -> Iterator[None]:
        """Lay what the card takes to decompose a matrix, in place of the copies by which the host does it."""
        self.issue.resting = True
        self.control.wait_takes(0.0)
        try:
            yield
        finally:
            self.control.wait_takes(WAIT_S)
            self.issue.resting, self.issue.seen = False, self.control.launches()
        if name in AROUND_SVD:
            count = matrix.shape[:-2].numel()
            # whether it converged is read back: the published time has that wait in it
            self.control.work(0.0, svd_seconds(min(matrix.shape[-2:])) * count - WAIT_S)
            import_module("torch").cuda.synchronize()
            kernels = [Kernel(2 * matrix.numel() * matrix.element_size())] * AROUND_SVD[name]
            self.issue.lay(kernels, OUTSIDE)


def start(control: Any) -> Lanes:
    """Watch every operator of this process from now on; `control` is the null device's. PyTorch must be importable."""
    issue = _Issue(gpu_from_fields(json.loads(os.environ[TIME])), control)
    lanes = Lanes(control, issue)
    control.work(0.0, 0.0)  # from now on events show this clock
    control.wait_takes(WAIT_S)
    issue.watch_modules()
    _mode(issue).__enter__()
    hooks: Any = import_module("torch.optim.optimizer")
    hooks.register_optimizer_step_post_hook(lambda *_: lanes.steps_s.append(lanes.device_s()))
    return lanes


class _Issue:
    """The host's lane: who calls for a launch now, and what that takes."""

    def __init__(self, gpu: Gpu, control: Any) -> None:
        self.launches: Callable[[], int] = control.launches
        self.work: Callable[[float, float], None] = control.work
        self.roofline = Roofline(gpu, replace(default_constants(), pointwise_floor_s=0.0))
        self.launch_s = launch_seconds(gpu)
        self.durations: dict[Kernel, float] = {}
        self.main = threading.get_ident()
        self.modules = 0
        self.seen = self.launches()
        self.resting = False

    def watch_modules(self) -> None:
        """Count from now on how many modules are running."""
        hooks: Any = import_module("torch.nn.modules.module")
        hooks.register_module_forward_pre_hook(self._enter)
        hooks.register_module_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self.modules += 1

    def _leave(self, *_: Any) -> None:
        self.modules -= 1

    def share(self, recording: bool) -> float:
        """Return how long a launch takes whoever calls now, in launches of modules without autograd."""
        if threading.get_ident() != self.main:
            return BACKWARD
        if not self.modules:
            return OUTSIDE
        return RECORDED if recording else 1.0

    def lay(self, kernels: list[Kernel], share: float) -> None:
        """Put kernels on the card's lane, each issued by the host."""
        for kernel in kernels:
            if kernel not in self.durations:
                self.durations[kernel] = self._on_card_s(kernel)
            self.work(share * self.launch_s, self.durations[kernel])

    def _on_card_s(self, kernel: Kernel) -> float:
        """Return what a kernel keeps the card busy; a launch that moves nothing is none."""
        starts = kernel.moved_bytes and not kernel.m
        return self.roofline.kernel_s(kernel) + (START_S if starts else 0.0)


def _mode(issue: _Issue) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Lay(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Runs an operator, then lays the kernels that it launched."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            given = dict(kwargs or {})
            if issue.resting:
                return func(*args, **given)
            share = issue.share(torch.is_grad_enabled())
            issue.lay([_UNSEEN] * (issue.launches() - issue.seen), share)  # what no operator launched since
            before = issue.launches()
            result = func(*args, **given)
            issue.seen = issue.launches()
            if issue.seen > before:
                name = func._schema.name
                if name.startswith("aten::_foreach"):
                    issue.work(LISTED * issue.launch_s * tensors_in(args[:1]), 0.0)
                issue.lay(kernels_of(name, args, given, result, issue.seen - before), share)
            return result

    return Lay()  # type: ignore[no-untyped-call]


#: A launch of which nothing is known but that it happened: it moves hardly anything.
_UNSEEN = Kernel(1)
