"""Calibrate on as many measurements as a lab makes in a year, and print the time and the memory.

    python -m benchmarks.calibrate_speed --rows 100000

The runs are made: repeats of some workloads on some cards and stacks, each off by factors of its card and by noise. What
the formula says of them is found out before, and kept, as it is between two calibrations; its time is printed apart.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.merge_stores import measured, told
from benchmarks.shared_lab import Truth, run, workload
from whichlora_calibration.calibrate import calibrate
from whichlora_calibration.cases import cases_of
from whichlora_calibration.forecasts import Forecasts
from whichlora_profiles_db import Environment, Measurement, open_store
from whichlora_profiles_db.rows import COLUMNS
from whichlora_profiles_db.session import writing

CARDS = ("rtx-4090", "l4", "a100-sxm-80gb", "rtx-3090", "h100-sxm-80gb")
STACKS = ({"torch": "2.6.0", "transformers": "4.51.3"}, {"torch": "2.8.0", "transformers": "4.57.1"})


def kinds(count: int) -> list[Measurement]:
    """Make one run of each of so many workloads on each card and stack."""
    rng = random.Random(0)
    found: list[Measurement] = []
    for number in range(count):
        phase = ("train", "generate")[number % 2]
        work = workload(number // 2 % 8, phase=phase, seq_len=64 + 16 * (number // 16))
        for gpu in CARDS:
            made = run(work, gpu, Truth.of(gpu, 0), rng, len(found))
            for versions in STACKS:
                place = Environment(gpu=gpu, gpu_total_bytes=made.environment.gpu_total_bytes, versions=versions)
                found.append(made.with_(environment=place))
    return found


def repeat(path: Path, rows: int) -> None:
    """Fill a store up to so many rows with repeats that differ in id, moment, bytes and times."""
    noise = "(1 + 0.02 * (random() - 0.5))"
    changed = {
        "id": "sha256(m.id || n::VARCHAR)",
        "measured_at": "m.measured_at + to_seconds(n)",
        "step_samples_s": f"[each * {noise} FOR each IN m.step_samples_s]",
        "prefill_samples_s": f"[each * {noise} FOR each IN m.prefill_samples_s]",
        "decode_per_token_samples_s": f"[each * {noise} FOR each IN m.decode_per_token_samples_s]",
        "process_bytes": f"(m.process_bytes * {noise})::BIGINT",
    }
    for name in ("step", "prefill", "decode_per_token"):
        for summary in ("min", "mean", "median", "max"):
            changed[f"{name}_{summary}_s"] = "NULL"
    values = ", ".join(f"{changed.get(name, f'm.{chr(34)}{name}{chr(34)}')}" for name in COLUMNS)
    with writing(path, wait_s=60) as connection:
        connection.execute("CREATE TEMP TABLE kind AS SELECT * FROM measurement")
        count = connection.execute("SELECT count(*) FROM kind").fetchall()[0][0]
        connection.execute(
            f"INSERT INTO measurement (seq, {', '.join(f'{chr(34)}{name}{chr(34)}' for name in COLUMNS)}) "
            f"SELECT {count} + row_number() OVER (), {values} FROM range(1, {rows // count}) AS r(n), kind AS m"
        )
        connection.execute("DROP TABLE kind")


def main() -> None:
    """Make the store, predict, calibrate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workloads", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "lab.duckdb", Path(name) / "forecasts"
        made = kinds(options.workloads)
        open_store(path).add(made)

        def predicted() -> None:
            forecasts = Forecasts(folder)
            cases_of(made, forecasts)
            forecasts.save()

        def learnt() -> None:
            runs = (measurement for batch in open_store(path).iterate() for measurement in batch)
            compared = cases_of(runs, Forecasts(folder))
            print(f"{compared.runs} runs, {len(compared.cases)} cases of them", flush=True)
            calibrate(compared.cases, compared.left, rows=compared.rows)

        told(f"predicting {len(made)} workloads on cards and stacks", *measured(predicted))
        measured(lambda: repeat(path, options.rows))
        told(f"calibrating on {open_store(path).count()} measurements", *measured(learnt))


if __name__ == "__main__":
    main()
