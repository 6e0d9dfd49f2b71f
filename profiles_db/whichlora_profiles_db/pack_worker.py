"""The process that reads packs of others: JSON lines on stdin, JSON lines on stdout, each pack in a child of its own.

A pack that crashes the reader, or that takes more memory or time than any honest one, takes down only that child.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError

from .pack_checks import check_rows
from .pack_stage import stage, write_manifest

MOST_MEMORY_BYTES = 4 << 30
#: Processor time for any pack, and for each megabyte of it: a hundred times what honest ones take.
MOST_CPU_S, MOST_CPU_S_A_MB = 120, 60


def main() -> None:
    """Answer requests until stdin ends."""
    import duckdb  # noqa: F401  imported here, it need not be in every child

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = _apart(json.loads(line)) if hasattr(os, "fork") else _answer(json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _apart(request: dict[str, Any]) -> dict[str, Any]:
    """Answer in a child, and say how it died where it does."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(ours)
            _limit(Path(request["folder"]))
            with os.fdopen(theirs, "w", encoding="utf-8") as reply:
                reply.write(json.dumps(_answer(request)))
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, encoding="utf-8") as reply:
        said = reply.read()
    _, status = os.waitpid(child, 0)
    if said:
        answer: dict[str, Any] = json.loads(said)
        return answer
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no answer"
    return {"error": f"the pack broke the process that read it ({how})"}


def _limit(folder: Path) -> None:
    """Set this process's limits: memory, processor time, no core dumps."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        seconds = MOST_CPU_S + MOST_CPU_S_A_MB * (size_bytes >> 20)
        for which, most in (
            (resource.RLIMIT_DATA, MOST_MEMORY_BYTES),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(which)
            resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return _DO[request["do"]](**request)
    except WhichloraError as error:
        return {"error": error.what, "value": error.value and str(error.value)[:300], "todo": error.todo}
    except MemoryError:
        return {"error": "a pack that takes more memory than any honest one"}
    except Exception as error:  # whatever a library raises is about the pack
        return {"error": f"a pack that cannot be read ({type(error).__name__}: {str(error)[:300]})"}


def _stage(folder: str, **_: Any) -> dict[str, Any]:
    manifest = stage(Path(folder))
    write_manifest(Path(folder), manifest)
    return {"rows": manifest.rows}


def _check(folder: str, first: int, last: int, **_: Any) -> dict[str, Any]:
    return {"rejected": check_rows(Path(folder), first, last)}


_DO: dict[str, Callable[..., dict[str, Any]]] = {"stage": _stage, "check": _check}
