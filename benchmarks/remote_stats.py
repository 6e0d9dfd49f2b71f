"""Ask a large remote in place: how long counts take, and how much is read for them, with and without a card and a month.

    python -m benchmarks.remote_stats --rows 10000000

The remote is a folder of made packs, one a card and month, of one measurement repeated with ids and moments of their own.
Bytes are what the process read in all (Linux's /proc), the program's own files included.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.shared_lab import Truth, run, workload
from whichlora_estimators.gpus import all_gpus
from whichlora_profiles_db import Filters, open_remote, remote_stats, write_pack
from whichlora_profiles_db.remote_stats import may_hold
from whichlora_profiles_db.remotes import pack_name

CARDS, MONTHS = 10, 12


def make(folder: Path, rows: int) -> list[str]:
    """Write so many rows, spread evenly over cards and months, and return the cards."""
    import random

    import duckdb

    gpus = [gpu.slug for gpu in all_gpus()[:CARDS]]
    base = write_pack(
        [run(workload(1), gpus[0], Truth(memory=1, time=1), random.Random(0), 0)], folder / "base.parquet"
    )
    share = rows // (CARDS * MONTHS)
    with duckdb.connect() as connection:
        for place, (gpu, month) in enumerate(itertools.product(gpus, range(1, MONTHS + 1))):
            name = pack_name(gpu, f"2025-{month:02d}", f"{place:064x}")
            path = folder / "remote" / name
            path.parent.mkdir(parents=True)
            connection.execute(
                f"COPY (SELECT base.* REPLACE (sha256('{place} ' || n) AS id, '{gpu}' AS gpu, "
                f"make_timestamp(2025, {month}, 1, 0, 0, 0) + to_seconds(n % 2000000) AS measured_at, "
                f"sha256('w' || n % 1000) AS workload_id, 'lab/model-' || n % 40 AS model) "
                f"FROM '{base.path}' AS base, range({share}) AS r(n)) "
                f"TO '{path}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 100000)"
            )
    return gpus


def ask(url: str, filters: Filters | None) -> str:
    """Count, and say how long that took and what was read."""
    remote = open_remote(url)
    packs = sum(may_hold(name, filters) for name in remote.list())
    before, start_s, start_cpu_s = _read_bytes(), time.monotonic(), time.process_time()
    rows = sum(group.total for group in remote_stats(remote, filters))
    wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - start_cpu_s
    read = (_read_bytes() - before) / 1e6
    return f"{rows:,} rows of {packs} packs in {wall_s:.1f} s ({cpu_s:.1f} s of processors), {read:,.1f} MB read"


def _read_bytes() -> int:
    """Return the bytes that this process has read so far; 0 where nothing tells."""
    path = Path("/proc/self/io")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return sum(int(line.partition(": ")[2]) for line in lines if line.startswith("rchar"))


def main() -> None:
    """Make the remote, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        gpus = make(Path(name), rows)
        url = str(Path(name) / "remote")
        size = sum(path.stat().st_size for path in Path(url).rglob("*.parquet"))
        print(f"a remote of {CARDS * MONTHS} packs, {size / 1e6:,.0f} MB", flush=True)
        since, until = datetime(2025, 3, 1, tzinfo=timezone.utc), datetime(2025, 3, 31, tzinfo=timezone.utc)
        asked = {
            "everything": None,
            "one card": Filters(gpu=gpus[0]),
            "one card, one month": Filters(gpu=gpus[0], since=since, until=until),
            "a card that is not there": Filters(gpu="gtx-1"),
        }
        for what, filters in asked.items():
            print(f"{what}: {ask(url, filters)}", flush=True)


if __name__ == "__main__":
    main()
