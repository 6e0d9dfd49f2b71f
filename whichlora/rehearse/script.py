"""Anybody's training script, as it is, on a card that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import whichlora_estimators
from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import Gpu, all_gpus, context_bytes
from whichlora_profiles_db import PhasePeak

from ..apart import module_command
from . import lanes
from .breakdown import Breakdown, from_json, to_json
from .cards import find_card
from .hub import HUB, MAKER
from .inside import EXPLAIN, FOLDER, OOM
from .pool import python_path
from .records import EVIDENCE
from .standin import MADE
from .ticking import ESTIMATORS

_SITE = Path(__file__).parent / "site"
_OLDEST = (7, 5)  # compute capabilities below are not tried
_GRACE_S = 20.0  # how long an interrupted script may take to end
_HEAD_BYTES = 1024
_PYTHON = re.compile(rb"(?:/[^\s'\"]+/)?\bpython[\d.]*\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """What a script took. Of several processes that used CUDA it is the one that allocated most.

    `exit_code` is negative where a signal ended it. `ooms` counts the times that the card ran out, those that the script
    caught included; `where` is the script's own line that an error came through, `phase` the one that it came in. Peaks
    are None where no process lived to tell of them; `phases` holds those of loading, forward, backward, optimizer,
    evaluation, generation and between steps.
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
        if self.kind == OOM or (self.exit_code and self.ooms and not self.kind):
            return "oom"
        return "failed" if self.exit_code or self.allocated_peak_bytes is None else "ok"

    @property
    def interrupted(self) -> bool:
        """Say whether somebody's Ctrl-C ended it."""
        return self.kind == "KeyboardInterrupt" or self.exit_code in (-signal.SIGINT, 128 + signal.SIGINT)

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
    stdin: bytes | None = None,
    stdout: Any = None,
    stderr: Any = None,
) -> ScriptRun:
    """Run a command (`python train.py …`) on a card, its output going where ours goes unless `stdout` says otherwise.

    It reads what we would read, or `stdin`. With `timed`, CUDA events and synchronisation show the time that the card
    would take. With `stand_ins`, `from_pretrained` of a model of the Hub whose weights are not at hand loads a phantom.
    A Python, and a script whose first line names one (`accelerate`, `torchrun`), runs on the null device of its own
    PyTorch, anything else on that of this Python. An interrupt (Ctrl-C) ends the script, not what is told of it.
    Raises BadValue for a command that is not there or does not run, and what the null device raises.
    """
    from whichlora.nulldevice import environment

    card = find_card(gpu) if isinstance(gpu, str) else gpu
    program = _program(command)
    context, python = context_bytes(card), _python_of(Path(program))
    variables = environment(card, context_bytes=context, alloc_conf=alloc_conf, routing=routing, python=python)
    # What a killed script's processes may still write there is no reason to lose what it took.
    with tempfile.TemporaryDirectory(prefix="whichlora-", ignore_cleanup_errors=True) as folder:
        variables |= {FOLDER: folder, EXPLAIN: "1" if explain else "", "PYTHONPATH": _python_path(variables)}
        variables |= _hub(Path(folder)) if stand_ins else {}
        variables |= _clock(card) if timed else {}
        with _input(stdin) as read:
            outputs = {"stdin": read, "stdout": stdout, "stderr": stderr}
            exit_code = _run([program, *command[1:]], {**os.environ, **variables}, outputs)
        seen, made = _most(Path(folder)), _reports(Path(folder) / "hub" / MADE)
    told: dict[str, Any] = {"command": tuple(command), "gpu": card, "exit_code": exit_code, "stand_ins": tuple(made)}
    return ScriptRun(**told, **_from_report(**seen))


def _program(command: Sequence[str]) -> str:
    """Return where a command is. Raises BadValue for one that is not there, and tells of one beside this Python."""
    program = shutil.which(command[0]) if command else None
    if program is not None:
        return program
    ours = shutil.which(Path(sys.executable).with_name(command[0])) if command and "/" not in command[0] else None
    todo = "Example: whichlora rehearse --gpu rtx-4090 -- python train.py."
    if ours:
        todo = f"whichlora's own environment has one: name {ours}, or activate that environment first."
    raise BadValue("no such command", value=" ".join(command), todo=todo)


def _from_report(
    *, breakdown: Mapping[str, Any] | None = None, phases: Mapping[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """Return the fields of a run that a process's report holds."""
    peaks = {
        name: PhasePeak(allocated_peak_bytes=allocated, reserved_peak_bytes=reserved)
        for name, (allocated, reserved) in (phases or {}).items()
        if allocated
    }
    return {**fields, "phases": peaks, "breakdown": from_json(breakdown) if breakdown else None}


def _python_of(program: Path) -> Path:
    """Return the Python that a program runs on: itself, the one that its first lines name, else the one that runs this."""
    if program.name.startswith("python"):
        return program
    with program.open("rb") as file:
        first, *rest = file.read(_HEAD_BYTES).split(b"\n")
    lines = [first, *(line for line in rest[:1] if line.startswith(b"'''exec'"))]  # pip's, where the path is long
    found = _PYTHON.search(b"\n".join(lines)) if first.startswith(b"#!") else None
    return Path((found and shutil.which(found[0].decode())) or sys.executable)


def comes_from_stdin(command: Sequence[str]) -> bool:
    """Say whether a command is a Python that reads its program from stdin: `python - ARGS…`, or `python` alone."""
    if not command or not Path(command[0]).name.startswith("python"):
        return False
    words = iter(command[1:])
    for word in words:
        if word in ("-W", "-X"):  # options with a value of their own
            next(words, None)
        elif word == "-" or not word.startswith("-"):
            return word == "-"
        elif word.startswith(("-c", "-m")):
            return False
    return True


@contextlib.contextmanager
def _input(text: bytes | None) -> Iterator[Any]:
    """Yield a file that holds a text, None where the script shall read what we would."""
    if text is None:
        yield None
        return
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.seek(0)
        yield file


def _run(command: list[str], variables: Mapping[str, str], files: Mapping[str, Any]) -> int:
    """Run a command to its end and return its exit code. Raises BadValue for one that the system does not run.

    Ctrl-C reaches the script as well, and at its end it writes down what it took: so it is given time for that. One that
    does not end was not reached (somebody interrupted only us), and then does not want to.
    """
    try:
        process = subprocess.Popen(command, env=dict(variables), **files)
    except OSError as error:
        todo = f"{error.strerror}. Begin with the program that runs it: python train.py, bash run.sh."
        raise BadValue("this command does not run", value=command[0], todo=todo) from error
    try:
        return process.wait()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_GRACE_S)
            process.send_signal(number)
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _clock(gpu: Gpu) -> dict[str, str]:
    """Return the variables by which a script's CUDA events tell the card's time."""
    return {**lanes.variables(gpu), ESTIMATORS: str(Path(whichlora_estimators.__file__).parent)}


def _hub(folder: Path) -> dict[str, str]:
    """Return the variables by which a script finds a cache of stand-ins, and who makes them: this Python."""
    hub = folder / "hub"
    hub.mkdir()
    command = module_command("whichlora.rehearse.standin")
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
    explained = {"breakdown": to_json(run.breakdown)} if run.breakdown else {}
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
