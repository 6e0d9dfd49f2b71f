"""Anybody's training script, as it is, on a card that is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue
from whichlora_estimators.gpus import Gpu, context_bytes

from . import breakdown
from .breakdown import Breakdown
from .cards import find_card
from .inside import EXPLAIN, FOLDER
from .records import EVIDENCE

_SITE = Path(__file__).parent / "site"
_OOM = "OutOfMemoryError"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """What a script took. Of several processes that used CUDA it is the one that allocated most.

    `ooms` counts the times that the card ran out, those that the script caught included; `where` is the script's own
    line that an error came through. Peaks are None where no process lived to tell of them.
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
    missing: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
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
    stdout: Any = None,
) -> ScriptRun:
    """Run a command (`python train.py …`) on a card, its output going where ours goes unless `stdout` says otherwise.

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
    variables = environment(
        card, context_bytes=context_bytes(card), alloc_conf=alloc_conf, routing=routing, python=python
    )
    with tempfile.TemporaryDirectory(prefix="whichlora-") as folder:
        variables |= {FOLDER: folder, EXPLAIN: "1" if explain else "", "PYTHONPATH": _python_path(variables)}
        done = subprocess.run([program, *command[1:]], env={**os.environ, **variables}, stdout=stdout, check=False)
        seen = _most(Path(folder))
    found = seen.pop("breakdown", None)
    return ScriptRun(
        command=tuple(command),
        gpu=card,
        exit_code=done.returncode,
        breakdown=breakdown.from_json(found) if found else None,
        **seen,
    )


def answer(run: ScriptRun) -> dict[str, Any]:
    """Flatten what a script took for machines."""
    names = ["exit_code", "outcome", "allocated_peak_bytes", "reserved_peak_bytes", "process_bytes"]
    names += ["managed_peak_bytes", "ooms", "kind", "error", "where", "missing"]
    shown = {name: value for name in names if (value := getattr(run, name)) not in ("", None)}
    explained = {"breakdown": breakdown.to_json(run.breakdown)} if run.breakdown else {}
    head = {"command": list(run.command), "gpu": run.gpu.slug}
    return {**head, **shown, **explained, "evidence": EVIDENCE, "versions": dict(run.versions)}


def _python_path(variables: Mapping[str, str]) -> str:
    """Put our site folder behind the null device's, which runs the sitecustomize that it finds there."""
    first, _, rest = variables["PYTHONPATH"].partition(os.pathsep)
    return os.pathsep.join(filter(None, [first, str(_SITE), rest]))


def _most(folder: Path) -> dict[str, Any]:
    """Return the report of the process that allocated most, nothing where there is none."""
    reports: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return max(reports, key=lambda report: report["allocated_peak_bytes"], default={})
