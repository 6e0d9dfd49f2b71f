"""A chain of jobs for each GPU type: stage 1 measures inference, stage 2 fine-tuning steps, then the choice is tuned."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.units import GB
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import workload_to_json

from ..checked import MOST_TRIED
from ..pick import PickResult, Row, pick
from ..pickconfig import PickConfig
from ..plan import survivors
from .cluster import GpuType
from .scripts import Job, make_executable, script, submit_script, whichlora

#: Setups that stage 2 measures at most, the best by the policy.
MOST_SETUPS = 12
#: Allowances of time beside what is predicted: for starting a job, and for loading and warming up one workload.
START_S, WORKLOAD_S = 600.0, 90.0
_MEASURED_STEPS = 30  # warm-up and timed ones
_HOST_BYTES = 16 * GB  # beside the weights that a job loads
_DAY_S = 86_400.0
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What was written for one GPU type: scripts in the order in which they run, and what the formula chooses there."""

    gpu_type: GpuType
    scripts: tuple[Path, ...]
    choice: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all chains share: where they write, the store, and the device they run on (`auto`, or `null` for a trial)."""

    folder: Path
    db: Path | None = None
    on: str = "auto"
    offline: bool = False


def write_chains(
    config: PickConfig,
    fields: Mapping[str, Any],
    types: Sequence[GpuType],
    settings: Settings,
    *,
    report: Report = lambda _: None,
) -> tuple[Chain, ...]:
    """Write each type's jobs into a folder of its own, and a script that submits them all.

    `fields` is the config as it was read, which the jobs pick by. Raises WhichloraError for an unknown model.
    """
    chains = []
    for gpu_type in types:
        report(f"{gpu_type.name}: {gpu_type.gpu.name}")
        result = pick(replace(config, gpu=gpu_type.gpu), offline=settings.offline, report=report)
        chains.append(_Writer(result, gpu_type, settings).write(fields))
        if result.choice is None:
            report(f"{gpu_type.name}: no configuration satisfies every limit, so nothing is tuned there")
    make_executable(settings.folder / "submit.sh", submit_script([chain.scripts for chain in chains]))
    return tuple(chains)


class _Writer:
    """Writes one type's folder: config, workloads, scripts."""

    def __init__(self, result: PickResult, gpu_type: GpuType, settings: Settings) -> None:
        self.result, self.gpu_type, self.settings = result, gpu_type, settings
        cluster = result.config.cluster
        self.cluster = cluster if cluster.memory else replace(cluster, memory=_host_memory(result))
        self.folder = settings.folder.resolve() / gpu_type.name

    def write(self, fields: Mapping[str, Any]) -> Chain:
        import yaml

        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        own = _absolute(fields, self.result.config) | {"gpu": self.gpu_type.gpu.slug}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
        jobs = [
            self._measuring("stage1", _by_model(self.result.stage1)),
            self._measuring("stage2", _by_setup(survivors(self.result))),
            self._tuning(),
        ]
        return Chain(
            gpu_type=self.gpu_type,
            scripts=tuple(self._script(job) for job in jobs if job is not None),
            choice=self.result.choice,
        )

    def _script(self, job: Job) -> Path:
        path = self.folder / f"{job.name}.sh"
        make_executable(path, script(job, self.cluster, self.folder))
        return path

    def _measuring(self, name: str, groups: list[list[Row]]) -> Job | None:
        """Return an array job that measures a group of workloads in each task; None where there is nothing to measure."""
        if not groups:
            return None
        for number, rows in enumerate(groups, 1):
            lines = [json.dumps(workload_to_json(row.workload)) for row in rows]
            (self.folder / f"{name}.{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        words: list[object] = [
            "verify",
            "--workloads",
            self.folder / f"{name}.$SLURM_ARRAY_TASK_ID.jsonl",
            *self._where(),
        ]
        seconds = max(map(self._measuring_s, groups))
        line = whichlora(self.cluster, *words)
        return Job(name=name, gpu_type=self.gpu_type, lines=(line,), seconds=seconds, tasks=len(groups))

    def _measuring_s(self, rows: list[Row]) -> float:
        steps_s = sum(_MEASURED_STEPS * (row.step_s or _generation_s(row)) for row in rows)
        return START_S + self.cluster.time_margin * (len(rows) * WORKLOAD_S + steps_s)

    def _tuning(self) -> Job | None:
        """Return the job that picks by what was measured, once for all of its runs, and tunes the choice.

        None without a choice or without data.
        """
        config, choice = self.result.config, self.result.choice
        if choice is None or config.data is None:
            return None
        plan = self.folder / "pick" / "plan.json"
        offline = ["--offline"] if self.settings.offline else []
        verified = ["--out", plan.parent, "--verify", *self._where(card=False), *offline]
        picks = whichlora(self.cluster, "pick", self.folder / "config.yaml", *verified)
        words: list[object] = ["finetune", plan, "--out", self.folder / "finetune", *self._where(card=False), *offline]
        tunes = whichlora(self.cluster, *words)
        seconds = _DAY_S if choice.time_s is None else self.cluster.time_margin * choice.time_s
        seconds += START_S + MOST_TRIED * WORKLOAD_S  # where what was measured is not of this node
        lines = (f"[ -f {shlex.quote(str(plan))} ] || {picks} || exit 1", tunes)
        return Job(name="finetune", gpu_type=self.gpu_type, lines=lines, seconds=seconds, resumes=True)

    def _where(self, *, card: bool = True) -> list[object]:
        null = self.settings.on == "null"
        words: list[object] = ["--on", self.settings.on] if null else []
        words += ["--gpu", self.gpu_type.gpu.slug] if null and card else []
        return [*words, "--db", self.settings.db.resolve()] if self.settings.db else words


def _by_model(rows: Sequence[Row]) -> list[list[Row]]:
    """Group what stage 1 has to measure: all that may fit, a group for each model."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.process_bytes is not None and row.verdict.value != "does-not-fit":
            groups.setdefault(row.model, []).append(row)
    return list(groups.values())


def _by_setup(rows: Sequence[Row]) -> list[list[Row]]:
    """Group survivors by all but their batches, best first, and keep the first groups.

    Of each batch size the best accumulation alone is kept: further passes of a step are like its second.
    """
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        key = json.dumps(workload_to_json(row.workload.with_(batch_size=1, accumulation=1)), sort_keys=True)
        groups.setdefault(key, {}).setdefault(row.workload.batch_size, row)
    return [list(group.values()) for group in groups.values()][:MOST_SETUPS]


def _generation_s(row: Row) -> float:
    """Return the seconds of a whole generation, from those of a token."""
    workload: Workload = row.workload
    return (row.time_s or 0.0) * workload.batch_size * workload.decode_len


def _host_memory(result: PickResult) -> str:
    """Return what `--mem` asks for: the largest model that is kept, in 16 bit, and room beside it."""
    sizes = [row.parameters for row in result.stage1 if row.model in result.kept]
    return f"{-(-(2 * max(sizes, default=0) + _HOST_BYTES) // 10**6)}M"


def _absolute(fields: Mapping[str, Any], config: PickConfig) -> dict[str, Any]:
    """Return the config's fields with the paths in them made absolute, so that they hold in the chain's folder."""
    own: dict[str, Any] = json.loads(json.dumps(dict(fields)))
    if config.data is not None:
        names = ("source", "validation", "test")
        own["dataset"] |= {name: value for name in names if (value := getattr(config.data, name))}
    stage1 = own.get("stage1_profile") or {}
    for key in ("model_names", "tokenizers"):
        if stage1.get(key):
            given = stage1[key] if isinstance(stage1[key], list) else [stage1[key]]
            stage1[key] = [_path(str(name)) for name in given]
    return own


def _path(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def submit(chains: Sequence[Chain], *, report: Report = lambda _: None) -> dict[Path, str]:
    """Submit every chain, each job to start once the one before it ended well; return the job ids by script.

    Raises WhichloraError with what sbatch says; the jobs that it took by then stay submitted, and are told.
    """
    ids: dict[Path, str] = {}
    for chain in chains:
        before = ""
        for path in chain.scripts:
            ids[path] = before = _sbatch(path, before, ids)
            report(f"submitted {path.parent.name}/{path.name} as job {before}")
    return ids


def _sbatch(path: Path, before: str, ids: Mapping[Path, str]) -> str:
    program = shutil.which("sbatch")
    if program is None:
        raise WhichloraError("there is no sbatch here", todo="Run this on a login node of the cluster.")
    after = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{before}"] if before else []
    done = subprocess.run([program, "--parsable", *after, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        taken = f" Submitted before it: {', '.join(ids.values())}." if ids else ""
        todo = f"Mend the options (section slurm of the config) and submit anew.{taken}"
        raise WhichloraError(f"sbatch refused {path}", value=done.stderr.strip()[:300], todo=todo)
    return done.stdout.strip().partition(";")[0]
