"""A process that runs workloads for real, or on the null device: JSON lines on stdin, JSON lines on stdout.

On a card it ends after one, so that the next workload finds a process in which nothing has run. On the host each
workload runs in a copy of this process, which has imported the libraries and done nothing else. On the null device one
follows the other, as in a rehearsal.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn, TextIO

from whichlora.rehearse.parent import end_with_parent
from whichlora.rehearse.pool import ended_by
from whichlora.rehearse.step import Recorder, run
from whichlora.rehearse.worker import clean_up, describe, say, spare_old_objects, take_stdout, warm_up
from whichlora_estimators.workload import workload_from_json

from .card import environment_here
from .nvml import ProcessBytes
from .recorders import CudaClock, CudaRecorder, HostClock, HostRecorder, resident_files_bytes

#: The environment variable that says where to run: "cuda" or "cpu".
DEVICE = "WHICHLORA_VERIFY_DEVICE"
#: What a copy of this process shall not have to import.
NEEDED = ("torch", "transformers.modeling_utils", "peft")
_LONGEST_ERROR = 2000
# What memory that runs out is called besides torch.OutOfMemoryError: by drivers, cuBLAS and PyTorch's host allocator.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def main() -> None:
    """Say what is here, then answer workloads; a line without one asks for no more than that."""
    answers = take_stdout()
    end_with_parent()
    device = os.environ[DEVICE]
    from whichlora.nulldevice import control
    from whichlora_profiles_db import environment_to_json

    process_bytes = ProcessBytes()
    say(answers, {"environment": environment_to_json(environment_here(device))})
    on_cuda = _on_card
    if control.is_null_device():
        on_cuda = _on_null
        spare_old_objects()
    for line in sys.stdin:
        job, answer = json.loads(line), {"outcome": "ok", "ends": True}
        if "workload" in job:
            answer = _on_host(job, answers) if device == "cpu" else on_cuda(job, process_bytes)
        say(answers, {"error": "", **answer})
        if answer.get("ends") or answer.get("leftover_bytes"):
            return


def _on_card(job: Mapping[str, Any], process_bytes: ProcessBytes) -> dict[str, Any]:
    return {**_measure(CudaRecorder(process_bytes), CudaClock, **job), "ends": True}


def _on_null(job: Mapping[str, Any], process_bytes: ProcessBytes) -> dict[str, Any]:
    """Time is not told; what stays behind is, since the next workload shall find nothing of it."""
    warm_up()
    before_bytes = clean_up()
    answer = _measure(CudaRecorder(process_bytes), CudaClock, **job)
    return {**answer, "times": {}, "leftover_bytes": clean_up() - before_bytes}


def _on_host(job: Mapping[str, Any], answers: TextIO) -> dict[str, Any]:
    """Run a workload in a copy of this process, so that its peak of resident memory is its own."""
    for name in NEEDED:
        import_module(name)
    recorder = HostRecorder(files_bytes=resident_files_bytes())
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        answers.close()  # else nobody would notice if this process's parent were killed
        _answer_as_copy(recorder, job, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        ended = ended_by(os.waitstatus_to_exitcode(status))
        return {"outcome": "failed", "error": f"the process of this workload ended ({ended})"}
    return dict(json.loads(text))


def _answer_as_copy(recorder: Recorder, job: Mapping[str, Any], writing: int) -> NoReturn:
    """Run a workload, write what was seen to a pipe and end, whatever happens: a copy answers nobody else."""
    status = 1
    try:
        end_with_parent()
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump(_measure(recorder, HostClock, **job), pipe)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _measure(
    recorder: Recorder,
    make_clock: type[CudaClock | HostClock],
    *,
    workload: Mapping[str, Any],
    warmup: int,
    steps: int,
) -> dict[str, Any]:
    """Run a workload and return what was seen of it."""
    outcome, error = "ok", ""
    try:
        if recorder.device == "cuda":
            warm_up()
            clean_up()  # as before a rehearsal
        run(workload_from_json(workload), recorder, make_clock(warmup=warmup, steps=steps))
    except Exception as problem:  # whatever a library raises is an answer
        outcome = "oom" if _ran_out(problem) else "failed"
        error = str(problem) if outcome == "oom" else describe(problem)
    return {
        "outcome": outcome,
        "error": error[:_LONGEST_ERROR],
        "phase": recorder.current,
        "counts": recorder.counts,
        "peaks": recorder.peaks,
        "times": recorder.times,
    }


def _ran_out(problem: Exception) -> bool:
    import torch

    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
