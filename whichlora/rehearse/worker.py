"""A process on the null device that rehearses one workload after another: JSON lines on stdin, JSON lines on stdout."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from whichlora_estimators.workload import workload_from_json

_LONGEST_ERROR = 2000


def main() -> None:
    """Say what is installed, then answer workloads until stdin ends, or until something of one stays behind."""
    answers = _take_stdout()
    import torch
    import transformers
    from whichlora_profiles_db import environment_to_json, local_environment

    transformers.utils.logging.set_verbosity_error()
    versions = {"cuda": str(torch.version.cuda)}
    _say(answers, {"environment": environment_to_json(local_environment(versions=versions))})
    for line in sys.stdin:
        answer = _rehearse(json.loads(line))
        answer["leftover_bytes"] = _clean_up()
        _say(answers, answer)
        if answer["leftover_bytes"]:  # the next workload shall find what the first one found
            break


def _take_stdout() -> TextIO:
    """Keep stdout for answers: what the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, content: Mapping[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _rehearse(fields: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from .step import Recorder, run

    class NullRecorder(Recorder):
        """Tells the device what it would read back from a mask."""

        def mask_is_full(self, full: bool) -> None:
            from whichlora.nulldevice import control

            control.reset()
            control.set_bool(full)

    recorder, outcome, error = NullRecorder(), "ok", ""
    try:
        run(workload_from_json(fields), recorder)
    except torch.OutOfMemoryError as problem:
        outcome, error = "oom", str(problem)
    except Exception as problem:  # whatever a library raises is an answer
        outcome, error = "failed", _describe(problem)
    return {
        "outcome": outcome,
        "error": error[:_LONGEST_ERROR],
        "phase": recorder.current,
        "counts": recorder.counts,
        "peaks": recorder.peaks,
    }


def _describe(problem: Exception) -> str:
    """Return the kind of an error, its text, where it was raised, and which call the null device lacks if it does."""
    from whichlora.nulldevice import control

    frame = traceback.extract_tb(problem.__traceback__)[-1]
    missing = control.last_missing()
    lacks = f"; the null device has no {missing}" if missing else ""
    return f"{type(problem).__name__}: {problem} ({frame.filename}:{frame.lineno} in {frame.name}{lacks})"


def _clean_up() -> int:
    """Free what the workload left in the libraries' own caches; return the bytes that are still allocated."""
    import torch

    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].functional.name2qmap.clear()
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())


if __name__ == "__main__":
    main()
