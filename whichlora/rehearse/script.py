"""Anybody's training script, as it is, on a card that is not there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import whichlora_estimators
from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import Gpu, all_gpus, context_bytes
from whichlora_profiles_db import PhasePeak

from . import breakdown, lanes
from .breakdown import Breakdown
from .cards import find_card
from .hub import HUB, MAKER
from .inside import EXPLAIN, FOLDER
from .pool import python_path
from .records import EVIDENCE
from .standin import MADE
from .ticking import ESTIMATORS

_SITE = Path(__file__).parent / "site"
_OOM = "OutOfMemoryError"
_OLDEST = (7, 5)  # compute capabilities below are not tried


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """What a script took. Of several processes that used CUDA it is the one that allocated most.

    `ooms` counts the times that the card ran out, those that the script caught included; `where` is the script's own
    line that an error came through, `phase` the one that it came in. Peaks are None where no process lived to tell of
    them; `phases` holds those of loading, forward, backward, optimizer, evaluation, generation and between steps.
    `times` holds what the card's clock showed, where that was asked for: `seconds` in all, optimizer `steps`, and `step_s`.
    `stand_ins` are the models of the Hub whose weights were not at hand: name, config, tokenizer, dtype, or an error.
    """

    command: tuple[str, ...]
    gpu: Gpu
    exit_code: int
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    managed_peak_bytes: int | None = None
    ooms: int = 0
    kind: str = ""
    error: str = ""
    where: str = ""
    phase: str = ""
    missing: str = ""
    phases: Mapping[str, PhasePeak] = field(default_factory=dict)
    stand_ins: tuple[Mapping[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    breakdown: Breakdown | None = field(default=None, repr=False)

    @property
    def outcome(self) -> str:
        """Return "ok", "oom" (it ended because the card ran out) or "failed" (for any other reason)."""
        if self.kind == _OOM or (self.exit_code and self.ooms and not self.kind):
            return "oom"
        return "failed" if self.exit_code or self.allocated_peak_bytes is None else "ok"

    @property
    def process_bytes(self) -> int | None:
        """Reserved bytes and the CUDA context."""
        return None if self.reserved_peak_bytes is None else self.reserved_peak_bytes + context_bytes(self.gpu)


def rehearse_script(
    command: Sequence[str],
    gpu: str | Gpu,
    *,
    alloc_conf: str | None = None,
    routing: str = "even",
    explain: bool = False,
    stand_ins: bool = True,
    timed: bool = False,
    stdout: Any = None,
    stderr: Any = None,
) -> ScriptRun:
    """Run a command (`python train.py …`) on a card, its output going where ours goes unless `stdout` says otherwise.

    With `timed`, CUDA events and synchronisation show the time that the card would take.
    With `stand_ins`, `from_pretrained` of a model of the Hub whose weights are not at hand loads a phantom.
    A first word that is a Python runs on the null device of its own PyTorch, anything else on that of this one.
    Raises BadValue for a command that is not there, and what the null device raises.
    """
    from whichlora.nulldevice import environment

    card = find_card(gpu) if isinstance(gpu, str) else gpu
    program = shutil.which(command[0]) if command else None
    if program is None:
        todo = "Example: whichlora rehearse --gpu rtx-4090 -- python train.py."
        raise BadValue("no such command", value=" ".join(command), todo=todo)
    python = Path(program) if Path(program).name.startswith("python") else Path(sys.executable)
    context = context_bytes(card)
    variables = environment(card, context_bytes=context, alloc_conf=alloc_conf, routing=routing, python=python)
    with tempfile.TemporaryDirectory(prefix="whichlora-") as folder:
        variables |= {FOLDER: folder, EXPLAIN: "1" if explain else "", "PYTHONPATH": _python_path(variables)}
        variables |= _hub(Path(folder)) if stand_ins else {}
        variables |= _clock(card) if timed else {}
        full = [program, *command[1:]]
        done = subprocess.run(full, env={**os.environ, **variables}, stdout=stdout, stderr=stderr, check=False)
        seen, made = _most(Path(folder)), _reports(Path(folder) / "hub" / MADE)
    found, phases = seen.pop("breakdown", None), seen.pop("phases", {})
    return ScriptRun(
        command=tuple(command),
        gpu=card,
        exit_code=done.returncode,
        phases={name: PhasePeak(allocated_peak_bytes=a, reserved_peak_bytes=r) for name, (a, r) in phases.items() if a},
        stand_ins=tuple(made),
        breakdown=breakdown.from_json(found) if found else None,
        **seen,
    )


def _clock(gpu: Gpu) -> dict[str, str]:
    """Return the variables by which a script's CUDA events tell the card's time."""
    return {**lanes.variables(gpu), ESTIMATORS: str(Path(whichlora_estimators.__file__).parent)}


def _hub(folder: Path) -> dict[str, str]:
    """Return the variables by which a script finds a cache of stand-ins, and who makes them: this Python."""
    hub = folder / "hub"
    hub.mkdir()
    command = [sys.executable, "-m", "whichlora.rehearse.standin"]
    return {HUB: str(hub), MAKER: json.dumps({"command": command, "path": python_path("")})}


def smallest_card(
    run: ScriptRun, *, on_try: Callable[[Gpu, ScriptRun | None], None] | None = None, **settings: Any
) -> Gpu | None:
    """Rehearse a script again on cards of other sizes and return the smallest that it fits, None where none does.

    One card of each size is tried, by bisection: what is larger than a card that it fits is taken to fit. `settings`
    are those of the first run; `on_try` hears of each card before it is tried and after. A run that failed is not a size:
    then the search ends with what is known.
    """
    smallest = run.gpu if run.outcome == "ok" else None
    cards = _sizes(run)
    low, high = 0, len(cards)  # those from `high` on fit
    while low < high:
        middle = (low + high) // 2
        if on_try:
            on_try(cards[middle], None)
        seen = rehearse_script(run.command, cards[middle], **settings)
        if on_try:
            on_try(cards[middle], seen)
        if seen.outcome == "failed":
            return smallest
        if seen.outcome == "ok":
            smallest, high = cards[middle], middle
        else:
            low = middle + 1
    return smallest


def _sizes(run: ScriptRun) -> list[Gpu]:
    """Return one card of each size that may be the smallest, smallest first.

    Of cards of one nominal size that with the least memory; those of the run card's major compute capability come first,
    since others may run other kernels, or none. What was allocated does not fit below; a size that ran out is not tried.
    """
    least = max(run.gpu.total_bytes + 1 if run.outcome != "ok" else 0, run.allocated_peak_bytes or 0)
    most = run.gpu.total_bytes if run.outcome == "ok" else 2**63
    by_size: dict[float, Gpu] = {}
    for gpu in all_gpus():
        if gpu.compute_capability < _OLDEST or not least <= gpu.total_bytes < most:
            continue
        known = by_size.setdefault(gpu.nominal_gb, gpu)
        by_size[gpu.nominal_gb] = min(known, gpu, key=lambda each: _preference(each, run.gpu))
    return sorted(by_size.values(), key=lambda gpu: gpu.total_bytes)


def _preference(gpu: Gpu, like: Gpu) -> tuple[bool, int]:
    return gpu.compute_capability[0] != like.compute_capability[0], gpu.total_bytes


def answer(run: ScriptRun) -> dict[str, Any]:
    """Flatten what a script took for machines."""
    names = ["exit_code", "outcome", "allocated_peak_bytes", "reserved_peak_bytes", "process_bytes"]
    names += ["managed_peak_bytes", "ooms", "kind", "error", "where", "phase", "missing"]
    shown = {name: value for name in names if (value := getattr(run, name)) not in ("", None)}
    explained = {"breakdown": breakdown.to_json(run.breakdown)} if run.breakdown else {}
    head = {"command": list(run.command), "gpu": run.gpu.slug}
    phases = {"phases": {name: dataclasses.asdict(peak) for name, peak in run.phases.items()}}
    stand_ins = {"stand_ins": [dict(made) for made in run.stand_ins]} if run.stand_ins else {}
    times = {"times": dict(run.times)} if run.times else {}
    return {
        **head,
        **shown,
        **phases,
        **times,
        **stand_ins,
        **explained,
        "evidence": EVIDENCE,
        "versions": dict(run.versions),
    }


def _python_path(variables: Mapping[str, str]) -> str:
    """Put our site folder behind the null device's, which runs the sitecustomize that it finds there."""
    first, _, rest = variables["PYTHONPATH"].partition(os.pathsep)
    return os.pathsep.join(filter(None, [first, str(_SITE), rest]))


def _most(folder: Path) -> dict[str, Any]:
    """Return the report of the process that allocated most, nothing where there is none."""
    return max(_reports(folder), key=lambda report: report["allocated_peak_bytes"], default={})


def _reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
