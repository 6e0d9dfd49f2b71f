"""A sweep spread over a cluster: a job array whose tasks each run a share of the workloads into a store of their own.

Each task runs the command line itself (`whichlora rehearse --workloads share.jsonl --db own.duckdb`), so that whatever
a command keeps and remembers holds here too: started again, a task runs only what its store lacks. What a lost node
costs is what it was running. The folder of a sweep lies beside the store and has to be seen by all nodes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Filters, Store, merge_store, open_store, workload_id, workload_to_json

from .apart import module_command

CLUSTERS = ("slurm", "local")
ARRAY_SIZE = 8
#: A task that was lost is submitted again, so often in all.
ATTEMPTS = 4
TIMEOUT_MIN = 24 * 60
_PAUSE_S = 1.0
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where a sweep runs and in how many tasks; `options` are submitit's of that cluster, such as partition."""

    kind: str
    array_size: int = ARRAY_SIZE
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.array_size < 1:
            raise BadValue("array size must be positive", value=self.array_size, todo="Give 1 or more.")
        if importlib.util.find_spec("submitit") is None:
            todo = 'Install it: pip install "whichlora[cluster]".'
            raise WhichloraError("sweeps over a cluster need submitit", todo=todo)
        if self.kind == "slurm" and shutil.which("sbatch") is None:
            raise WhichloraError("there is no Slurm here: no sbatch", todo="Submit from a login node, or use local.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of the array: a command over some workloads, what it answers, and where it keeps what it sees."""

    number: int
    command: tuple[str, ...]
    folder: Path

    @property
    def workloads(self) -> Path:
        """The task's share, one workload a line."""
        return self.folder / f"share-{self.number}.jsonl"

    @property
    def db(self) -> Path:
        """The task's own store."""
        return self.folder / f"share-{self.number}.duckdb"

    @property
    def answers(self) -> Path:
        """What the command printed, there once the task is done."""
        return self.folder / f"answers-{self.number}.jsonl"

    def run(self) -> int:
        """Run the command over the share; its answers appear when it has ended well."""
        command = module_command("whichlora", *self.command, "--workloads", str(self.workloads))
        fresh = self.answers.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as output:
            code = subprocess.run([*command, "--db", str(self.db), "--json"], stdout=output, check=False).returncode
        if code == 0:
            fresh.replace(self.answers)
        return code


def sweep(
    command: Sequence[str],
    workloads: Sequence[Workload],
    store: Store,
    cluster: Cluster,
    *,
    on_progress: OnProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """Run `command` of whichlora over workloads on a cluster; yield its answers in the order of the input.

    What the tasks see comes into `store` as each of them ends, lost ones included, and what the store holds is not run
    again where the command remembers. Interrupted and called again with the same arguments, it goes on. `on_progress`
    hears how many tasks of how many are done, and what happened. Raises WhichloraError where a task is lost
    ATTEMPTS times, or where the cluster takes no jobs.
    """
    if not workloads:
        return
    folder = _folder(store, command, workloads, cluster)
    tasks = _prepare(folder, command, workloads, store, cluster)
    for attempt in range(ATTEMPTS):
        waiting = [task for task in tasks if not task.answers.exists()]
        if not waiting:
            break
        if on_progress and attempt:
            on_progress(len(tasks) - len(waiting), len(tasks), f"{len(waiting)} lost tasks are submitted again")
        _run_array(waiting, folder, cluster, store, tasks=len(tasks), on_progress=on_progress)
    lost = [task.number for task in tasks if not task.answers.exists()]
    if lost:
        todo = f"Read the ends of the files in {folder / 'logs'}, then give the same command again: it goes on."
        raise WhichloraError(f"tasks that ended without an answer, {ATTEMPTS} times", value=lost, todo=todo)
    for task in tasks:
        yield from map(json.loads, task.answers.read_text(encoding="utf-8").splitlines())
    shutil.rmtree(folder, ignore_errors=True)


def _folder(store: Store, command: Sequence[str], workloads: Sequence[Workload], cluster: Cluster) -> Path:
    asked = [list(command), cluster.array_size, cluster.options.get("gres"), list(map(workload_to_json, workloads))]
    content = json.dumps(asked, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return store.path.with_name(f"{store.path.name}.sweeps") / digest


def _prepare(
    folder: Path, command: Sequence[str], workloads: Sequence[Workload], store: Store, cluster: Cluster
) -> list[Task]:
    """Write each task's share, and what the store knows of it into the task's store."""
    folder.mkdir(parents=True, exist_ok=True)
    count = min(cluster.array_size, len(workloads))
    tasks = [Task(number=number, command=tuple(command), folder=folder) for number in range(count)]
    for task in tasks:
        share = workloads[task.number * len(workloads) // count : (task.number + 1) * len(workloads) // count]
        lines = "".join(json.dumps(workload_to_json(each)) + "\n" for each in share)
        task.workloads.write_text(lines, encoding="utf-8")
        if not task.db.exists():
            known = Filters(workload_id=sorted({workload_id(each) for each in share}))
            open_store(task.db).add(store.query(known))
    return tasks


def _run_array(
    waiting: list[Task], folder: Path, cluster: Cluster, store: Store, *, tasks: int, on_progress: OnProgress | None
) -> None:
    """Submit one array and wait until each of its tasks has ended, in whatever way."""
    jobs = _submit(waiting, folder, cluster)
    running = dict(zip(waiting, jobs, strict=True))
    done = tasks - len(waiting)
    try:
        while running:
            alive = _alive(list(running.values()), cluster)
            for task in [task for task, job in running.items() if job.job_id not in alive]:
                running.pop(task)
                _collect(task, store)
                done += task.answers.exists()
                if on_progress:
                    on_progress(done, tasks, "done" if task.answers.exists() else f"task {task.number} was lost")
            time.sleep(_PAUSE_S if running else 0)
    except KeyboardInterrupt:
        for job in running.values():
            job.cancel()
        for task in waiting:
            _collect(task, store)
        raise


def _submit(waiting: list[Task], folder: Path, cluster: Cluster) -> list[Any]:
    import submitit

    executor = submitit.AutoExecutor(folder=folder / "logs", cluster=cluster.kind)
    executor.update_parameters(name="whichlora", timeout_min=TIMEOUT_MIN, cpus_per_task=1)
    if cluster.kind == "slurm":
        options = {f"slurm_{name}": value for name, value in cluster.options.items()}
        executor.update_parameters(slurm_array_parallelism=cluster.array_size, slurm_use_srun=False, **options)
    try:
        return list(executor.map_array(Task.run, waiting))
    except Exception as error:  # submitit passes on whatever sbatch says
        said = str(error).strip().splitlines()[-1:]
        todo = f"Check the options for this cluster, such as --cluster-option partition=NAME. ({''.join(said)})"
        raise WhichloraError("the cluster did not take the job array", value=cluster.kind, todo=todo) from error


def _alive(jobs: list[Any], cluster: Cluster) -> set[str]:
    """Return the ids of the jobs that have not ended; a Slurm is asked for its queue, as not all keep accounts."""
    if cluster.kind == "local":
        return {job.job_id for job in jobs if not job.done()}
    arrays = ",".join(sorted({job.job_id.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={arrays}"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return {job.job_id for job in jobs}  # the controller is away for a moment; the jobs need not be
    return set(asked.stdout.split())


def _collect(task: Task, store: Store) -> None:
    if task.db.exists():
        merge_store(store, task.db)
