"""How much better a user without a GPU predicts after pulling what a lab measured.

    python -m benchmarks.shared_lab

Made, not measured: each of the lab's cards differs from the formula by factors of its own, for process bytes and for
times, and each run by noise. Users with cards push to a remote; one without pulls, calibrates, and predicts models
that nobody ran, on the lab's cards. The errors before and after are printed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
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

USERS = {"ada": ("rtx-4090", "l4"), "bob": ("a100-sxm-80gb", "rtx-3090")}
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


def errors(correction: Correction | None, seed: int) -> dict[str, float]:
    """Return the median errors of process bytes and of times, on all cards and models that nobody ran."""
    missed: dict[str, list[float]] = {"process bytes": [], "times": []}
    for gpu in (gpu for gpus in USERS.values() for gpu in gpus):
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


def learnt(folder: Path, url: str, seed: int) -> Correction:
    """Have the lab's users measure and push, and one without a GPU pull and calibrate; return what that one learnt."""
    remote = open_remote(url)
    for user, gpus in USERS.items():
        store = open_store(folder / f"{user}.duckdb")
        store.add(list(runs(gpus, RAN, seed)))
        push(store, remote)
    without = open_store(folder / "eve.duckdb")
    pull(without, remote)
    measurements = (measurement for batch in without.iterate() for measurement in batch)
    compared = cases_of(measurements, Forecasts())
    return calibrate(compared.cases, compared.left, rows=compared.rows).correction


def main() -> None:
    """Print errors before and after for a few labs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", type=int, default=3)
    for seed in range(parser.parse_args().labs):
        with tempfile.TemporaryDirectory() as name:
            correction = learnt(Path(name), str(Path(name) / "remote"), seed)
        before, after = errors(None, seed), errors(correction, seed)
        told = (f"{name} {before[name]:.1%} before pull, {after[name]:.1%} after" for name in before)
        print(f"lab {seed}: median error of {'; of '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
