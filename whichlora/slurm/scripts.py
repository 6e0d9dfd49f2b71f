"""The text of job scripts: what is asked for, what is loaded first, what runs, and what happens when time is up."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cluster import GpuType, format_time
from .settings import Cluster

#: Seconds before the end of a job's time at which a training is told to save.
NOTICE_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of one GPU type's chain: the lines that it runs in its shell, and how long they may take.

    With `tasks` it is an array of so many, told apart by $SLURM_ARRAY_TASK_ID. `resumes` says that its last line is a
    training, which saves and is queued again when time is up.
    """

    name: str
    gpu_type: GpuType
    lines: tuple[str, ...]
    seconds: float
    tasks: int = 0
    resumes: bool = False


def script(job: Job, cluster: Cluster, folder: Path) -> str:
    """Return a job script; its output goes to files in `folder`/logs, appended to when it runs again."""
    head = [f"#SBATCH {option}" for option in _options(job, cluster, folder)]
    body = [*head, "", "set -u", *_setup(cluster, folder), *job.lines[:-1]]
    body += _watched(job.lines[-1]) if job.resumes else [f"exec {job.lines[-1]}"]
    return "\n".join(["#!/bin/bash", *body, ""])


def _options(job: Job, cluster: Cluster, folder: Path) -> list[str]:
    log = "%x-%A_%a.out" if job.tasks else "%x-%j.out"
    limit_s = job.gpu_type.limit_s
    seconds = job.seconds if limit_s is None else min(job.seconds, limit_s)
    options = [
        f"--job-name=whichlora-{job.gpu_type.name}-{job.name}",
        f"--gres={job.gpu_type.gres}",
        f"--cpus-per-task={cluster.cpus}",
        f"--time={format_time(seconds)}",
        f"--output={folder / 'logs' / log}",
        "--open-mode=append",
        "--requeue",
    ]
    named = {"account": cluster.account, "partition": cluster.partition or ",".join(job.gpu_type.partitions)}
    named |= {"qos": cluster.qos, "mem": cluster.memory}
    options += [f"--{name}={value}" for name, value in named.items() if value]
    options += [f"--array=1-{job.tasks}%{cluster.at_once}"] if job.tasks else []
    options += [f"--signal=B:USR1@{NOTICE_S}"] if job.resumes else []
    return [*options, *cluster.options]


def _setup(cluster: Cluster, folder: Path) -> list[str]:
    lines = [f"module load {shlex.quote(name)}" for name in cluster.modules]
    return [*lines, *cluster.setup, f"cd {shlex.quote(str(folder))}"]


def _watched(command: str) -> list[str]:
    """Run a training so that it hears when time is up or the scheduler ends it: it saves, then the job is queued again."""
    return [
        "again=",
        f"{command} &",
        "child=$!",
        "trap 'kill -TERM $child 2>/dev/null' TERM",
        "trap 'again=1; kill -TERM $child 2>/dev/null' USR1  # time is nearly up",
        "while wait $child; status=$?; [ $status -gt 128 ] && kill -0 $child 2>/dev/null; do :; done",
        'if [ -n "$again" ] && [ $status -gt 128 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi',
        "exit $status",
    ]


def whichlora(cluster: Cluster, *words: object) -> str:
    """Return a command line of ours, by the interpreter of the jobs; `$` in a word stays for the job's shell."""
    python = cluster.python or sys.executable
    return " ".join([shlex.quote(python), "-m", "whichlora", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    return f'"{word}"' if "$SLURM_ARRAY_TASK_ID" in word else shlex.quote(word)


def submit_script(chains: Sequence[Sequence[Path]]) -> str:
    """Return a script that submits chains: each job starts once the one before it has ended well."""
    lines = ["#!/bin/bash", "set -eu"]
    for chain in chains:
        before = ""
        for path in chain:
            lines.append(f"job=$(sbatch --parsable {before}{shlex.quote(str(path))})")
            lines.append(f'echo "$job {path.parent.name}/{path.name}"')
            before = "--kill-on-invalid-dep=yes --dependency=afterok:${job%%;*} "
    return "\n".join([*lines, ""])


def make_executable(path: Path, text: str) -> None:
    """Write a script that can be run."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
