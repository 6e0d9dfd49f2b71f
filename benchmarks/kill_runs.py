"""Kill `whichlora verify` and `whichlora rehearse` with SIGKILL at random moments, while both write one store.

    python benchmarks/kill_runs.py --rounds 100

In each round both commands run at once (or one: --only). Each is killed a moment after a random one of its workloads was
reported as done, or before the first; then the store has to open and hold everything that was reported, each thing once,
and no worker may be left. In the last round nobody is killed: both have to succeed, and every row of both has to be there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import open_store, workload_to_json

MARK = "WHICHLORA_KILL_MARK"
WORKLOADS = 2
LONGEST_START_S = 8.0
LONGEST_PAUSE_S = 0.3
WORKERS_END_S = 60.0
_DONE = re.compile(rb"^\[\d+/\d+\] ([a-z]+-\d+-\d+)\b.*\n", re.MULTILINE)
_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
COMMANDS = {
    "verify": ("--on", "cpu", "--steps", "2"),
    "rehearse": ("--gpu", "t4", "--jobs", "1"),
}


def write_workloads(path: Path, label: str, length: int) -> None:
    """Write a file of small workloads that no round before has run."""
    lines = [
        workload_to_json(
            Workload(
                id=f"{label}-{number}", model="tiny", config=_CONFIG, precision="fp32", rank=number + 1, seq_len=length
            )
        )
        for number in range(WORKLOADS)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


class Run:
    """A command under way, and the workloads that it has reported as done."""

    def __init__(self, folder: Path, command: str, label: str, length: int, mark: str) -> None:
        self.label, self._seen = label, b""
        write_workloads(folder / f"{label}.jsonl", label, length)
        program = "from whichlora.cli import main; main(prog_name='whichlora')"
        arguments = ["--workloads", f"{folder / label}.jsonl", "--db", f"{folder / 'store.duckdb'}", "--json"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, command, *COMMANDS[command], *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), MARK: mark},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        while chunk := os.read(self.process.stderr.fileno(), 4096):
            self._seen += chunk

    @property
    def done(self) -> set[str]:
        """What has been reported so far."""
        return {name.decode() for name in _DONE.findall(self._seen)}

    def kill_after(self, count: int, pause_s: float) -> None:
        """Kill it once `count` workloads are done, and a moment later (if it does not end by itself before)."""
        while len(self.done) < count and self.process.poll() is None:
            time.sleep(0.005)
        time.sleep(pause_s)
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def end(self) -> None:
        """Wait for the end. Raises RuntimeError unless all is well."""
        status = self.process.wait()
        self._reader.join()
        if status or len(self.done) != WORKLOADS:
            raise RuntimeError(f"{self.label} ended with {status}: {self._seen.decode(errors='replace')[-2000:]}")


def kill_both(runs: list[Run], rng: random.Random) -> None:
    """Kill each run at a random moment of its own, most of them near a commit."""

    def kill(run: Run, count: int, pause_s: float) -> None:
        run.kill_after(count, pause_s)

    threads = []
    for run in runs:
        count = rng.randint(0, WORKLOADS)
        pause_s = rng.uniform(0, LONGEST_PAUSE_S if count else LONGEST_START_S)
        threads.append(threading.Thread(target=kill, args=(run, count, pause_s)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check(path: Path, told: set[str]) -> set[str]:
    """Return the labels of what the store holds. Raises RuntimeError if it lacks what was told, or holds it twice."""
    rows = [measurement.workload.id for measurement in open_store(path).query()] if path.exists() else []
    if len(rows) != len(set(rows)):
        raise RuntimeError(f"twice in the store: {sorted(name for name in rows if rows.count(name) > 1)}")
    if lost := told - set(rows):
        raise RuntimeError(f"reported and lost: {sorted(lost)}")
    return set(rows)


def workers_left(mark: str) -> list[int]:
    """Return the processes that carry a mark in their environment (none where there is no /proc)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for_workers(mark: str) -> None:
    """Wait until the workers of a killed command have ended. Raises RuntimeError if they do not."""
    deadline = time.monotonic() + WORKERS_END_S
    while left := workers_left(mark):
        if time.monotonic() > deadline:
            raise RuntimeError(f"workers outlive who started them: {left}")
        time.sleep(0.05)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", choices=tuple(COMMANDS), help="run this command alone")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", file=sys.stderr)
    rng, told, mark = random.Random(seed), set[str](), uuid.uuid4().hex
    commands = [options.only] if options.only else list(COMMANDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "store.duckdb"
        for number in range(options.rounds + 1):
            runs = [Run(folder, command, f"{command}-{number}", number + 8, mark) for command in commands]
            if number < options.rounds:
                kill_both(runs, rng)
            else:
                for run in runs:
                    run.end()
            wait_for_workers(mark)
            told |= {name for run in runs for name in run.done}
            found = check(store, told)
        print(f"{len(commands) * options.rounds:6d} kills")
        print(f"{len(told):6d} workloads reported, all found")
        print(f"{len(found - told):6d} workloads found that nobody lived to report")


if __name__ == "__main__":
    main()
