"""A process that runs one workload for real, or on the null device: one JSON line on stdin, JSON lines on stdout.

It ends after that one, so that the next workload finds a process in which nothing has run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from whichlora.rehearse.parent import end_with_parent
from whichlora.rehearse.step import Recorder, run
from whichlora.rehearse.worker import clean_up, say, take_stdout, warm_up
from whichlora_estimators.workload import workload_from_json

from .card import environment_here
from .nvml import ProcessBytes
from .recorders import CudaClock, CudaRecorder, HostClock, HostRecorder

#: The environment variable that says where to run: "cuda" or "cpu".
DEVICE = "WHICHLORA_VERIFY_DEVICE"
_LONGEST_ERROR = 2000
# What memory that runs out is called besides torch.OutOfMemoryError: by drivers, cuBLAS and PyTorch's host allocator.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def main() -> None:
    """Say what is here, then answer a workload; a line without one asks for no more than that."""
    answers = take_stdout()
    end_with_parent()
    device = os.environ[DEVICE]
    from whichlora_profiles_db import environment_to_json

    process_bytes = ProcessBytes()
    say(answers, {"environment": environment_to_json(environment_here(device))})
    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    answer = measure(process_bytes=process_bytes, device=device, **job) if "workload" in job else {"outcome": "ok"}
    say(answers, {"error": "", **answer, "ends": True})


def measure(
    *, workload: Mapping[str, Any], warmup: int, steps: int, device: str, process_bytes: ProcessBytes
) -> dict[str, Any]:
    """Run a workload and return what was seen of it. On the null device no time is."""
    from whichlora.nulldevice import control

    outcome, error = "ok", ""
    clock = (HostClock if device == "cpu" else CudaClock)(warmup=warmup, steps=steps)
    recorder: Recorder = HostRecorder() if device == "cpu" else CudaRecorder(process_bytes)
    try:
        if device == "cuda":
            warm_up()
            clean_up()  # as before a rehearsal
        run(workload_from_json(workload), recorder, clock)
    except Exception as problem:  # whatever a library raises is an answer
        outcome = "oom" if _ran_out(problem) else "failed"
        error = str(problem) if outcome == "oom" else _describe(problem)
    return {
        "outcome": outcome,
        "error": error[:_LONGEST_ERROR],
        "phase": recorder.current,
        "counts": recorder.counts,
        "peaks": recorder.peaks,
        "times": {} if device == "cuda" and control.is_null_device() else recorder.times,
    }


def _ran_out(problem: Exception) -> bool:
    import torch

    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _OUT_OF_MEMORY)


def _describe(problem: Exception) -> str:
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__}: {problem} ({frame.filename}:{frame.lineno} in {frame.name})"


if __name__ == "__main__":
    main()
