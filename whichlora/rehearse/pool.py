"""Worker processes. One that crashes, hangs or cannot go on is replaced; its workload has failed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from whichlora_estimators.errors import WhichloraError

from ..apart import module_command

START_TIMEOUT_S = 300.0
_LAST_WORDS = 400
_CHUNK_BYTES = 1 << 16
_LAST_BREATH_S = 5.0
OUR_PACKAGES = ("whichlora", "whichlora_estimators", "whichlora_profiles_db", "whichlora_calibration")

Job = tuple[int, Mapping[str, Any]]  # (place in the input, what the worker is sent)
Answer = tuple[int, dict[str, Any]]


class Pool:
    """Sends each job to a worker and yields its answer as soon as it is there, in any order.

    `variables` are added to the environment of workers that run `module`. A job that takes longer than `timeout_s` is
    given up and its worker ended. Another environment's `python` needs `packages`, a folder with ours and no others.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        *,
        module: str,
        jobs: int,
        timeout_s: float,
        python: Path | None = None,
        packages: Path | None = None,
    ) -> None:
        self._variables = {**os.environ, **variables}
        first = variables.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")
        self._variables["PYTHONPATH"] = f"{first}{os.pathsep}{packages}" if packages else python_path(first)
        self._python = str(python or sys.executable)
        self._module, self._jobs, self._timeout_s = module, jobs, timeout_s
        self._on_progress: Callable[[int, str], None] | None = None
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        """End every worker, whatever it does."""
        for worker in list(self._workers):
            self._drop(worker)
        self._selector.close()

    def answers(self, jobs: Iterable[Job], on_progress: Callable[[int, str], None] | None = None) -> Iterator[Answer]:
        """Yield every job's answer: `outcome` and more, as its worker gave it, or `failed` where none came.

        `on_progress` hears what workers say meanwhile of the job at this place in the input.
        """
        self._on_progress = on_progress
        waiting = iter(jobs)
        self._give_out(waiting)
        while busy := [worker for worker in self._workers if worker.job is not None]:
            wait_s = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                yield from self._read(key.data)
            yield from self._give_up_late_ones()
            self._give_out(waiting)

    def _give_out(self, waiting: Iterator[Job]) -> None:
        """Give each idle worker a job, and start workers while there are jobs for them."""
        idle = [worker for worker in self._workers if worker.job is None]
        while idle or len(self._workers) < self._jobs:
            job = next(waiting, None)
            if job is None:
                return
            worker = idle.pop() if idle else self._start()
            worker.take(job, self._timeout_s)

    def _start(self) -> _Worker:
        worker = _Worker(module_command(self._module, python=self._python), self._variables)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _drop(self, worker: _Worker) -> None:
        self._selector.unregister(worker.stdout)
        self._workers.remove(worker)
        worker.end()

    def _read(self, worker: _Worker) -> Iterator[Answer]:
        messages = worker.read()
        for message in messages or ():
            if "progress" in message:
                if self._on_progress and worker.job:
                    self._on_progress(worker.job[0], message["progress"])
                continue
            answer = worker.hear(message, self._timeout_s)
            if answer is not None:
                last = bool(answer[1].get("leftover_bytes") or answer[1].get("ends"))
                if last:  # the next job shall find nothing left
                    self._drop(worker)
                yield answer
                if last:
                    return
        if messages is None:
            worker.let_end()
            self._drop(worker)
            yield from worker.failure(f"the worker process ended ({worker.how_it_ended()})")

    def _give_up_late_ones(self) -> Iterator[Answer]:
        now = time.monotonic()
        for worker in [each for each in self._workers if each.job is not None and each.deadline <= now]:
            self._drop(worker)
            yield from worker.failure(f"no answer within {worker.allowed_s:g} s: the worker process was ended")


class _Worker:
    """One process, the job that it works on, and until when."""

    def __init__(self, command: list[str], variables: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            command,
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        )
        assert self._process.stdout
        self.stdout = self._process.stdout
        self.job: Job | None = None
        self.environment: dict[str, Any] | None = None  # None until it is ready
        self.allowed_s = START_TIMEOUT_S
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._unread = b""
        self._said = ""  # its last line on stderr, once it has ended

    def take(self, job: Job, timeout_s: float) -> None:
        """Begin a job; one that has died since is found out when its answer is read."""
        self.job = job
        if self.environment is not None:
            self._allow(timeout_s)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job[1]).encode() + b"\n")
            self._process.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that are complete by now; None at the end of the process."""
        chunk = os.read(self.stdout.fileno(), _CHUNK_BYTES)
        if not chunk:
            return None
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def hear(self, message: dict[str, Any], timeout_s: float) -> Answer | None:
        """Take a message: the first one says that the worker is ready, the others are answers."""
        if self.environment is None:
            self.environment = message["environment"]
            self._allow(timeout_s)
            return None
        assert self.job
        number, self.job = self.job[0], None
        return number, {**message, "environment": self.environment}

    def failure(self, reason: str) -> Iterator[Answer]:
        """Yield the failure of an ended worker's job, if it had one. Raises WhichloraError where it never started."""
        if self.environment is None:
            todo = f"It said: {self._said or 'nothing'}"
            raise WhichloraError("a worker process did not start", value=reason, todo=todo)
        if self.job is not None:
            error = f"{reason}{f'; it said: {self._said}' if self._said else ''}"
            yield self.job[0], {"outcome": "failed", "error": error, "environment": self.environment}
            self.job = None

    def let_end(self) -> None:
        """Wait for a process that has closed its stdout to end by itself: killed, it could not tell how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_BREATH_S)

    def how_it_ended(self) -> str:
        """Return its signal or exit status."""
        return ended_by(self._process.wait())

    def end(self) -> None:
        """Kill the process and all that it started, if it still runs."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.stdout.close()
        self._said = self._last_words()
        self._log.close()

    def _allow(self, timeout_s: float) -> None:
        self.allowed_s, self.deadline = timeout_s, time.monotonic() + timeout_s

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LAST_WORDS))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def ended_by(status: int) -> str:
    """Say what a process's return code means: the signal that ended it, or its exit status."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def python_path(first: str) -> str:
    """Return a PYTHONPATH on which a worker finds our packages where this process found them."""
    folders = dict.fromkeys(str(Path(str(import_module(name).__file__)).parents[1]) for name in OUR_PACKAGES)
    return os.pathsep.join(filter(None, [first, *folders]))
