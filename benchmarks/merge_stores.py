"""Merge two stores of a million measurements each, half of them in both, and print the time and the memory.

    python benchmarks/merge_stores.py --rows 1000000

The stores are made in SQL out of one measurement, so their ids hash nothing: a merge of trusted stores does not look.
With --pack, a store of as many rows as --pack says is exported and imported as a pack too, where every row is hashed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, TimeStats, export_pack, import_pack, merge_store, open_store
from whichlora_profiles_db.rows import COLUMNS
from whichlora_profiles_db.session import writing

_SAMPLE = Measurement(
    workload=Workload(model="example/model", config={"hidden_size": 64}),
    environment=Environment(gpu="rtx-4090", host_name="somewhere", versions={"torch": "2.6.0"}),
    evidence="measured",
    device="cuda",
    outcome="ok",
    measured_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
    allocated_peak_bytes=10**9,
    step=TimeStats(samples_s=tuple(0.1 + number / 1000 for number in range(10))),
)


def fill(path: Path, first: int, rows: int) -> None:
    """Make a store of rows that differ in id, peak and note."""
    open_store(path).add([_SAMPLE])
    changed = {
        "id": "sha256(n::VARCHAR)",
        "notes": "'number ' || n",
        "allocated_peak_bytes": "1000000000 + n",
        "measured_at": "measured_at + to_seconds(n)",
    }
    values = ", ".join(changed.get(name, f'm."{name}"') for name in COLUMNS)
    with writing(path, wait_s=60) as connection:
        connection.execute("CREATE TEMP TABLE one AS SELECT * FROM measurement")
        connection.execute("DELETE FROM measurement")
        connection.execute("DELETE FROM origin")
        connection.execute(
            f"INSERT INTO measurement (seq, {', '.join(f'{chr(34)}{name}{chr(34)}' for name in COLUMNS)}) "
            f"SELECT n - {first} + 1, {values} FROM one AS m, range({first}, {first + rows}) AS r(n)"
        )
        connection.execute("INSERT INTO origin SELECT id, 'host_name', 'somewhere' FROM measurement")
        connection.execute("DROP TABLE one")


def measured(work: object) -> tuple[float, float, int]:
    """Run `work` in a child; return wall seconds, processor seconds and the child's largest resident bytes."""
    assert callable(work)
    started_s = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    if status:
        raise RuntimeError("the work failed")
    scale = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - started_s, used.ru_utime + used.ru_stime, used.ru_maxrss * scale


def told(what: str, seconds: float, processor_s: float, peak_bytes: int) -> None:
    """Print one line."""
    print(f"{what}: {seconds:.1f} s, {processor_s:.1f} s of processors, {peak_bytes / 1e9:.2f} GB at most")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pack", type=int, default=0, help="rows of a pack to export and import as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, other = folder / "one.duckdb", folder / "other.duckdb"
        for path, first in ((one, 0), (other, options.rows // 2)):
            measured(lambda path=path, first=first: fill(path, first, options.rows))
        told(f"merging {options.rows} into {options.rows}", *measured(lambda: merge_store(open_store(one), other)))
        assert open_store(one).count() == options.rows + options.rows // 2
        if options.pack:
            _pack(folder, options.pack)


def _pack(folder: Path, rows: int) -> None:
    source, target, pack = folder / "s.duckdb", folder / "t.duckdb", folder / "p.parquet"

    def add() -> None:
        open_store(source).add(_SAMPLE.with_(notes=f"number {number}") for number in range(rows))

    told(f"adding {rows}", *measured(add))
    told(f"exporting {rows}", *measured(lambda: export_pack(open_store(source), pack)))
    started_s = time.monotonic()
    imported = import_pack(open_store(target), pack)
    print(f"importing {imported.added}, each hashed: {time.monotonic() - started_s:.1f} s")
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"the importing process: {used.ru_maxrss * 1024 / 1e9:.2f} GB at most")


if __name__ == "__main__":
    main()
