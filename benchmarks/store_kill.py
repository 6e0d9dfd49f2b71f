"""Kill writers of one store with SIGKILL at random moments, and look for what they had been told is safe.

    python benchmarks/store_kill.py --rounds 500

In each round two processes add batches to one store, report each batch once `add` has returned, and are killed after a
random time. Then the store has to open, to hold every batch that was reported, whole batches only, and nothing twice.
Every tenth round begins with no file, so that its making is killed as well. Needs an operating system that forks.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import duckdb

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, open_store
from whichlora_profiles_db.session import reading

WRITERS = 2
ROUNDS_A_FILE = 10
BATCH_SIZES = (1, 1, 1, 40)
LONGEST_LIFE_S = 0.6
WAIT_S = 30.0

_SAMPLE = Measurement(
    workload=Workload(model="example/model", config={"hidden_size": 64}),
    environment=Environment(gpu="rtx-4090", host_name="somewhere", versions={"torch": "2.6.0"}),
    evidence="rehearsed",
    device="null",
    outcome="ok",
    measured_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that adds batches, and the end of the pipe on which it says which are in."""

    pid: int
    reports: int


def batch_of(name: str, size: int) -> list[Measurement]:
    """Return `size` measurements that carry the name of their batch."""
    return [_SAMPLE.with_(notes=name, source=str(number)) for number in range(size)]


def write_until_killed(path: Path, name: str, size: int, reports: int) -> None:
    """Add one batch after the other and report each that is in."""
    store = open_store(path, wait_s=WAIT_S)
    for number in range(10**6):
        batch = f"{name}/{number}/{size}"
        assert store.add(batch_of(batch, size)) == size
        os.write(reports, f"{batch}\n".encode())


def start(path: Path, name: str, size: int) -> Writer:
    """Fork a writer."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            write_until_killed(path, name, size, theirs)
        finally:
            os._exit(1)  # a writer ends by being killed; whatever else ends it is an error
    os.close(theirs)
    return Writer(pid=pid, reports=ours)


def kill(writer: Writer) -> set[str]:
    """Kill a writer and return the batches that it reported. Raises RuntimeError if it had ended before."""
    os.kill(writer.pid, signal.SIGKILL)
    _, status = os.waitpid(writer.pid, 0)
    with os.fdopen(writer.reports, encoding="utf-8") as reports:
        told = reports.read()
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"a writer ended by itself with status {status}")
    return set(told[: told.rfind("\n") + 1].split())


def check(path: Path, told: set[str]) -> set[str]:
    """Return the batches in the store. Raises RuntimeError unless all of `told` are, whole, and nothing twice."""
    with reading(path, wait_s=WAIT_S) as connection:
        rows = connection.execute("SELECT notes, count(*), count(DISTINCT id) FROM measurement GROUP BY notes")
        found = {name: (count, distinct) for name, count, distinct in rows.fetchall()}
        origins = connection.execute("SELECT count(*) FROM origin").fetchone()
    for name, (count, distinct) in found.items():
        if not count == distinct == int(name.rpartition("/")[2]):
            raise RuntimeError(f"batch {name} has {count} rows, {distinct} of them different")
    if lost := told - found.keys():
        raise RuntimeError(f"reported and lost: {sorted(lost)}")
    if origins != (sum(count for count, _ in found.values()),):
        raise RuntimeError(f"{origins} origins of {found}")
    return set(found)


def run_file(path: Path, rounds: int, rng: random.Random) -> Counter[str]:
    """Run some rounds on one file and return what was seen."""
    seen: Counter[str] = Counter()
    told: set[str] = set()
    found: set[str] = set()
    for number in range(rounds):
        writers = [start(path, f"{number}.{which}", rng.choice(BATCH_SIZES)) for which in range(WRITERS)]
        for writer in writers:
            time.sleep(rng.uniform(0, LONGEST_LIFE_S) / WRITERS)
            told |= kill(writer)
            seen["kills"] += 1
        if not path.exists() and not told:
            seen["rounds that ended before there was a file"] += 1
            continue
        seen["rounds that left a log to replay"] += path.with_name(path.name + ".wal").exists()
        found = check(path, told)
    seen["batches reported, all found"] += len(told)
    seen["batches found that nobody lived to report"] += len(found - told)
    return seen


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    duckdb.connect().close()  # imported here, it need not be in every fork
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", file=sys.stderr)
    rng, seen = random.Random(seed), Counter[str]()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, options.rounds, ROUNDS_A_FILE):
            rounds = min(ROUNDS_A_FILE, options.rounds - first)
            seen += run_file(Path(folder) / f"{first}.duckdb", rounds, rng)
    for what, count in seen.items():
        print(f"{count:6d} {what}")
    print(f"{time.monotonic() - started_s:6.0f} seconds; nothing lost")


if __name__ == "__main__":
    main()
