"""How much better a user without a GPU predicts after pulling what a lab measured.

    python -m benchmarks.shared_lab [--kills 6]

Made, not measured: each of the lab's cards differs from the formula by factors of its own, for process bytes and for
times, and each run by noise. Users with cards measure, push to a remote and pull from it, each in a process of its own,
which is killed now and then; the remote is on an S3 server process (moto), or a folder where that is not installed. In
the end all of them have to hold the same rows. One user without a GPU pulls, calibrates, and predicts models that nobody
ran, on the lab's cards: the errors before and after are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from whichlora_calibration import Correction, predict
from whichlora_calibration.calibrate import calibrate
from whichlora_calibration.cases import cases_of
from whichlora_calibration.forecasts import Forecasts
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.stack import stack_of
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, TimeStats, open_remote, open_store, pull, push

USERS = {
    "ada": ("rtx-4090", "l4", "t4", "rtx-3060"),
    "bob": ("a100-sxm-80gb", "rtx-3090", "l40s"),
    "carl": ("h100-sxm-80gb", "a40", "rtx-a6000"),
}
#: Those of two of them, where a lab is to be small.
FEW = {"ada": ("rtx-4090", "l4"), "bob": ("a100-sxm-80gb", "rtx-3090")}
Users = Mapping[str, Sequence[str]]
VERSIONS = {"torch": "2.6.0", "transformers": "4.51.3"}
#: Standard deviations of the logarithms: of a card's factors of memory and of times, and of each run.
MEMORY_SPREAD, TIME_SPREAD, NOISE = 0.05, 0.25, 0.02
#: Models that the lab ran, and that it did not.
RAN, NOT_RAN = range(6), range(6, 8)
START = datetime(2026, 1, 28, tzinfo=timezone.utc)


def workload(model: int, *, phase: str = "train", batch_size: int = 1, seq_len: int = 128) -> Workload:
    """Return a workload of a small model; each number is another shape."""
    config = {
        "model_type": "llama",
        "hidden_size": 256 + 128 * model,
        "intermediate_size": 1024 + 256 * model,
        "num_hidden_layers": 2 + model % 3,
        "num_attention_heads": 4 + 2 * model,
        "num_key_value_heads": 4 + 2 * model,
        "head_dim": 64,
        "vocab_size": 8000 + 4000 * model,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return Workload(
        model=f"lab/small-{model}",
        config=config,
        phase=phase,
        batch_size=batch_size,
        seq_len=seq_len,
        prefill_len=seq_len,
        decode_len=16,
    )


def workloads(models: Sequence[int]) -> Iterator[Workload]:
    """Yield what is run of these models."""
    for model in models:
        for batch_size in (1, 8):
            yield workload(model, batch_size=batch_size)
        yield workload(model, phase="generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How a card truly differs from the formula: factors of memory, and of the times."""

    memory: float
    time: float

    @classmethod
    def of(cls, gpu: str, seed: int) -> Truth:
        """Draw a card's factors."""
        rng = random.Random(f"{gpu} {seed}")
        return cls(memory=math.exp(rng.gauss(0, MEMORY_SPREAD)), time=math.exp(rng.gauss(0, TIME_SPREAD)))


def run(work: Workload, gpu: str, truth: Truth, rng: random.Random, number: int, **changes: object) -> Measurement:
    """Make what a run on the card would have shown."""
    found = predict(work, find_gpu(gpu), stack=stack_of(VERSIONS), correction=None).estimate

    def seen(value: float | None, factor: float) -> TimeStats | None:
        return None if not value else TimeStats(samples_s=(value * factor * math.exp(rng.gauss(0, NOISE)),))

    memory = truth.memory * math.exp(rng.gauss(0, NOISE / 4))
    made = Measurement(
        workload=work,
        environment=Environment(gpu=gpu, gpu_total_bytes=find_gpu(gpu).total_bytes, versions=VERSIONS),
        evidence="measured",
        device="cuda",
        outcome="ok",
        measured_at=START + timedelta(minutes=number),
        allocated_peak_bytes=int(found.allocated_peak_bytes * memory),
        reserved_peak_bytes=int(found.reserved_peak_bytes * memory),
        process_bytes=int(found.process_bytes * memory),
        step=seen(found.times.step_s, truth.time),
        prefill=seen(found.times.prefill_s, truth.time),
        decode_per_token=seen(found.times.decode_s_per_token, truth.time),
    )
    return made.with_(**changes)


def runs(gpus: Sequence[str], models: Sequence[int], seed: int, repeats: int = 1) -> Iterator[Measurement]:
    """Make the runs of all workloads of some models on some cards."""
    number = 0
    for gpu in gpus:
        rng, truth = random.Random(f"{gpu} {seed} runs"), Truth.of(gpu, seed)
        for work in workloads(models):
            for _ in range(repeats):
                number += 1
                yield run(work, gpu, truth, rng, number)


def errors(correction: Correction | None, seed: int, users: Users = FEW) -> dict[str, float]:
    """Return the median errors of process bytes and of times, on all cards and models that nobody ran."""
    missed: dict[str, list[float]] = {"process bytes": [], "times": []}
    for gpu in (gpu for gpus in users.values() for gpu in gpus):
        truth = Truth.of(gpu, seed)
        for work in workloads(NOT_RAN):
            found = predict(work, find_gpu(gpu), stack=stack_of(VERSIONS), correction=correction)
            true_bytes = found.estimate.process_bytes * truth.memory
            missed["process bytes"].append(abs(found.process.expected_bytes / true_bytes - 1))
            formula = found.estimate.times
            for true_s, got_s in (
                (formula.step_s, found.expected.step_s),
                (formula.decode_s_per_token, found.expected.decode_s_per_token),
            ):
                if true_s and got_s:
                    missed["times"].append(abs(got_s / (true_s * truth.time) - 1))
    return {name: statistics.median(values) for name, values in missed.items()}


def learnt(folder: Path, url: str, seed: int, users: Users = FEW) -> Correction:
    """Have the lab's users measure and push, and one without a GPU pull and calibrate; return what that one learnt."""
    for user, gpus in users.items():
        store = open_store(folder / f"{user}.duckdb")
        store.add(list(runs(gpus, RAN, seed)))
        push(store, open_remote(url))
    return pulled(folder / "eve.duckdb", url)


def pulled(path: Path, url: str) -> Correction:
    """Have one without a GPU pull and calibrate."""
    without = open_store(path)
    pull(without, open_remote(url))
    measurements = (measurement for batch in without.iterate() for measurement in batch)
    compared = cases_of(measurements, Forecasts())
    return calibrate(compared.cases, compared.left, rows=compared.rows).correction


# A lab of processes ----------------------------------------------------------------------------------------------------


def member(path: Path, url: str, user: str, seed: int) -> None:
    """Be one user: measure, push and pull in turns, and say how many were added. Started again, it goes on."""
    store, remote = open_store(path), open_remote(url)
    for number, made in enumerate(runs(USERS[user], RAN, seed)):
        if store.add([made]) and number % 5 == 0:
            push(store, remote)
            pull(store, remote)
        print(made.id, flush=True)
    push(store, remote)


def living(folder: Path, url: str, seed: int, kills: int) -> set[str]:
    """Let the users work at once, each killed now and then; return the ids that they were told are stored."""
    rng, told = random.Random(seed), set[str]()

    def start(user: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.shared_lab",
            "--member",
            user,
            "--store",
            f"{folder / user}.duckdb",
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        arguments = ["--url", url, "--seed", str(seed)]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment)

    waiting = [(user, rng.random() * 10) for user in USERS for _ in range(kills // len(USERS))]
    running = {user: start(user) for user in USERS}
    for user, pause_s in waiting:
        time.sleep(pause_s)
        running[user].kill()
        told |= set(str(running[user].communicate()[0]).split())
        running[user] = start(user)
    for user, process in running.items():
        told |= set(str(process.communicate()[0]).split())
        if process.returncode:
            raise RuntimeError(f"{user} ended with {process.returncode}")
    return told


def converged(folder: Path, url: str, told: set[str]) -> int:
    """Exchange once more, and return how many rows all stores hold. Raises RuntimeError for a lost or a doubled one."""
    stores = [open_store(folder / f"{user}.duckdb") for user in USERS]
    for _ in range(2):
        for store in stores:
            pull(store, open_remote(url))
            push(store, open_remote(url))
    held = [[one.id for batch in store.iterate() for one in batch] for store in stores]
    if any(sorted(ids) != sorted(held[0]) or len(ids) != len(set(ids)) for ids in held) or told - set(held[0]):
        raise RuntimeError(f"the stores differ: {[len(ids) for ids in held]} rows, {len(told)} were told")
    return len(held[0])


@contextlib.contextmanager
def place(folder: Path) -> Iterator[str]:
    """Give the URL of an empty remote: on an S3 server process, or a folder."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        yield str(folder / "remote")
        return
    from tests.profiles_db.s3server import BUCKET, s3_server

    with s3_server() as variables:
        os.environ.update(variables)
        yield f"s3://{BUCKET}/lab"


def main() -> None:
    """Let a few labs live, and print errors before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", type=int, default=1)
    parser.add_argument("--kills", type=int, default=6)
    for name in ("--member", "--store", "--url", "--seed"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        member(Path(options.store), options.url, options.member, int(options.seed))
        return
    for seed in range(options.labs):
        with tempfile.TemporaryDirectory() as name, place(Path(name)) as url:
            folder = Path(name)
            told = living(folder, f"{url}-{seed}", seed, options.kills)
            rows = converged(folder, f"{url}-{seed}", told)
            where = url.partition(":")[0] if "://" in url else "a folder"
            print(f"lab {seed}: {len(USERS)} users on {where}, {options.kills} kills: {rows} rows, the same everywhere")
            correction = pulled(folder / "eve.duckdb", f"{url}-{seed}")
        before, after = errors(None, seed, USERS), errors(correction, seed, USERS)
        gains = (f"{what} {before[what]:.1%} before pull, {after[what]:.1%} after" for what in before)
        print(f"lab {seed}: without a GPU, median error of {'; of '.join(gains)}", flush=True)


if __name__ == "__main__":
    main()
