"""A process on the null device that rehearses one workload after another: JSON lines on stdin, JSON lines on stdout."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.workload import Workload, workload_from_json

from .parent import end_with_parent

_LONGEST_ERROR = 2000
_NEVER = 2**31 - 1  # the largest count that the collector takes


def main() -> None:
    """Say what is installed, then answer workloads until stdin ends, or until something of one stays behind."""
    answers = take_stdout()
    end_with_parent()
    spare_old_objects()
    import torch

    from whichlora_profiles_db import environment_to_json, local_environment

    warm_up()
    versions = {"cuda": str(torch.version.cuda)}
    say(answers, {"environment": environment_to_json(local_environment(versions=versions))})
    at_first = clean_up()
    for line in sys.stdin:
        answer = _rehearse(**json.loads(line))
        answer["leftover_bytes"] = clean_up() - at_first
        say(answers, answer)
        if answer["leftover_bytes"]:  # the next workload shall find what the first one found
            break


def take_stdout() -> TextIO:
    """Keep stdout for answers: what the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, content: Mapping[str, Any]) -> None:
    """Send a message: one line of JSON."""
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _rehearse(
    *, workload: Mapping[str, Any], explain: bool = False, phantoms: str = "", fresh: bool = False
) -> dict[str, Any]:
    """Rehearse a workload; `phantoms` is the folder of checkpoints, where the model is loaded from one.

    `fresh` has it begin without cuBLAS workspaces, as in a process of its own: it makes those that it needs.
    """
    import torch

    from whichlora.nulldevice import control

    from .history import History
    from .loading import load_model
    from .step import Recorder, run

    class NullRecorder(Recorder):
        """Loads checkpoints without weights."""

        def build(self, workload: Workload) -> Any:
            return load_model(workload, self.device, Path(phantoms)) if phantoms else super().build(workload)

    workspace_bytes = _give_back_workspaces() if fresh else 0
    recorder, outcome, error = NullRecorder(), "ok", ""
    asked = workload_from_json(workload)
    history = History(workspace_bytes) if explain else None
    try:
        run(asked, recorder)
    except torch.cuda.OutOfMemoryError as problem:  # PyTorch's own since 2.5, by this name before
        outcome, error = "oom", str(problem)
    except Exception as problem:  # whatever a library raises is an answer
        outcome, error = "failed", describe(problem)
    return {
        "outcome": outcome,
        "error": error[:_LONGEST_ERROR],
        "phase": recorder.current,
        "counts": {**recorder.counts, "managed_peak_bytes": control.managed_peak_bytes()},
        "peaks": recorder.peaks,
        **({"breakdown": history.end(asked, recorder)} if history else {}),
    }


def describe(problem: Exception) -> str:
    """Return an error of ours as it is; of others kind, text, where it was raised, and which call the null device lacks."""
    from whichlora.nulldevice import control

    if isinstance(problem, WhichloraError):
        return str(problem)
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    missing = control.last_missing() if control.is_null_device() else ""
    lacks = f"; the null device has no {missing}" if missing else ""
    return f"{type(problem).__name__}: {problem} ({frame.filename}:{frame.lineno} in {frame.name}{lacks})"


def spare_old_objects() -> None:
    """Have garbage of the oldest generation collected by `clean_up` alone, as in a script that ends after a few steps.

    Looking through all that the libraries made takes as long as a small workload. Python itself rarely does it once there
    is so much; when it would, should not depend on what ran before.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)


def warm_up() -> None:
    """Multiply matrices on both threads that do, this one and autograd's, which gives each its cuBLAS workspace.

    PyTorch keeps these for good. So every workload finds what a process that has trained before it has left. What the
    device cannot decompose, the host does.
    """
    import torch

    from .inside import decompose_on_host

    decompose_on_host(torch.linalg)
    weight = torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.autograd.backward((weight @ weight).sum())


def clean_up() -> int:
    """Free what the workload left in the libraries' own caches; return the bytes that are still allocated.

    What is left then is the libraries', for good, and need not be looked through again. The workspaces are made anew, so
    that the next workload finds them where the first one did.
    """
    import torch

    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].functional.name2qmap.clear()
    gc.collect()
    gc.freeze()
    _give_back_workspaces()
    warm_up()
    return int(torch.cuda.memory_allocated())


def _give_back_workspaces() -> int:
    """Return the bytes of one of the two."""
    import torch

    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return int(before - torch.cuda.memory_allocated()) // 2


if __name__ == "__main__":
    main()
