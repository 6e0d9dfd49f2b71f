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
from .recorders import CudaClock, CudaRecorder, HostClock, HostRecorder, Telling, resident_files_bytes

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
        tell_s = job.pop("tell_s", 0.0)
        if "workload" in job:
            answer = _on_host(job, answers, tell_s) if device == "cpu" else on_cuda(job, process_bytes)
        say(answers, {"error": "", **answer})
        if answer.get("ends") or answer.get("leftover_bytes"):
            return


def _on_card(job: Mapping[str, Any], process_bytes: ProcessBytes) -> dict[str, Any]:
    return {**_measure(CudaRecorder(process_bytes), CudaClock(**_steps(job)), job["workload"]), "ends": True}


def _steps(job: Mapping[str, Any]) -> dict[str, int]:
    return {name: job[name] for name in ("warmup", "steps")}


def _on_null(job: Mapping[str, Any], process_bytes: ProcessBytes) -> dict[str, Any]:
    """Time is not told; what stays behind is, since the next workload shall find nothing of it."""
    warm_up()
    before_bytes = clean_up()
    answer = _measure(CudaRecorder(process_bytes), CudaClock(**_steps(job)), job["workload"])
    return {**answer, "times": {}, "leftover_bytes": clean_up() - before_bytes}


def _on_host(job: Mapping[str, Any], answers: TextIO, tell_s: float) -> dict[str, Any]:
    """Run a workload in a copy of this process, so that its peak of resident memory is its own; pass on what it says."""
    if any(name not in sys.modules for name in NEEDED):
        say(answers, {"progress": "importing PyTorch, Transformers and PEFT"})
    for name in NEEDED:
        import_module(name)
    files_bytes = resident_files_bytes()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        answers.close()  # else nobody would notice if this process's parent were killed
        _answer_as_copy(files_bytes, job, writing, tell_s)
    os.close(writing)
    answer: dict[str, Any] = {}
    with os.fdopen(reading, encoding="utf-8") as pipe:
        for line in pipe:
            message = json.loads(line) if line.endswith("\n") else {}  # it may be killed while it writes
            if "progress" in message:
                say(answers, message)
            else:
                answer = message
    _, status = os.waitpid(child, 0)
    if status:
        ended = ended_by(os.waitstatus_to_exitcode(status))
        return {"outcome": "failed", "error": f"the process of this workload ended ({ended})"}
    return answer


def _answer_as_copy(files_bytes: int, job: Mapping[str, Any], writing: int, tell_s: float) -> NoReturn:
    """Run a workload, write how far it is and what was seen to a pipe and end, whatever happens: a copy answers nobody else."""
    status = 1
    try:
        end_with_parent()
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            tell = Telling(lambda text: say(pipe, {"progress": text}), tell_s)
            recorder = HostRecorder(files_bytes=files_bytes, tell=tell)
            generates = job["workload"].get("phase") == "generate"
            clock = HostClock(**_steps(job), tell=tell, generates=generates)
            say(pipe, _measure(recorder, clock, job["workload"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _measure(recorder: Recorder, clock: CudaClock | HostClock, workload: Mapping[str, Any]) -> dict[str, Any]:
    """Run a workload and return what was seen of it."""
    outcome, error = "ok", ""
    try:
        if recorder.device == "cuda":
            warm_up()
            clean_up()  # as before a rehearsal
        run(workload_from_json(workload), recorder, clock)
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
