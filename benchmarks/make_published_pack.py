"""Make the pack of published measurements that ships with the package, of a table of published rows.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.make_published_pack --csv FILE [--shapes FILE] [--check]

A measurement is what one run showed of one workload. Taken are rows that `benchmarks/published_rows.py` maps and that
may judge something, and the process's bytes of the same runs; what is not taken is printed with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.published_rows import AFTER_STEP, PROCESS, PublishedRow, Shapes, Unmapped, map_row, source_name
from benchmarks.published_table import read_shapes, read_table
from whichlora_profiles_db import Measurement, TimeStats, read_manifest, workload_id, write_pack
from whichlora_profiles_db.publications import PATH, RELATIVE, PublishedFacts, notes_of

#: What the pack lacks of the table that it was made of, and why.
LEFT_OUT = Path(__file__).with_name("published_left_out.json")
#: nvidia-smi was polled while these ran; elsewhere it was read once, afterwards.
POLLED = frozenset({"fms-acceleration"})
#: No metrics of a run are there: its source presumes that memory ran out.
PRESUMED = "the run left no metrics; out of memory is presumed"


def main() -> int:
    """Read the arguments, make the pack, say what is not in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="table of published rows")
    parser.add_argument("--shapes", type=Path, help="JSON with configs of models that the registry lacks")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the pack is not current")
    arguments = parser.parse_args()
    rows, left_out = read_rows(arguments.csv, read_shapes(arguments.shapes))
    found = measurements(rows)
    if arguments.check:
        return _check(found)
    pack = write_pack(found, PATH)
    LEFT_OUT.write_text(json.dumps(left_out, indent=1) + "\n", encoding="utf-8")
    print(f"{pack.path}: {pack.manifest.rows} measurements, {pack.path.stat().st_size} bytes")
    return 0


def _check(found: Sequence[Measurement]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        same = write_pack(found, Path(folder) / PATH.name).manifest.ids_sha256
    current = read_manifest(PATH).ids_sha256 == same
    print("current" if current else "not current: run benchmarks/make_published_pack.py")
    return int(not current)


def read_rows(path: Path, shapes: Shapes | None) -> tuple[list[PublishedRow], list[dict[str, Any]]]:
    """Map the rows of a table that may judge something, and those that complete them; and why others are left out."""
    rows = read_table(path)
    trusted_runs = {row["run_id"] for row in rows if row["trusted_for"]}
    mapped, reasons = [], Counter[tuple[str, str]]()
    for row in rows:
        if row["run_id"] not in trusted_runs:
            continue
        try:
            one = map_row(row, shapes)
        except Unmapped as reason:
            reasons[source_name(row["source"]), str(reason).partition(". ")[0]] += bool(row["trusted_for"])
            continue
        if row["trusted_for"] or (one.counter == PROCESS and one.source in POLLED):
            mapped.append(one)
    left_out = [{"source": s, "reason": why, "rows": n} for (s, why), n in sorted(reasons.items()) if n]
    for each in left_out:
        print("not taken, {rows} rows of {source}: {reason}".format(**each), file=sys.stderr)
    return mapped, left_out


def measurements(rows: Iterable[PublishedRow]) -> list[Measurement]:
    """Join the rows of one run and workload; a run's forward pass tells the prefill of its generation."""
    joined: dict[tuple[str, str], list[PublishedRow]] = defaultdict(list)
    for row in rows:
        joined[row.row["run_id"], workload_id(row.workload)].append(row)
    prefills = {
        run: group[0].time.seconds
        for (run, _), group in joined.items()
        if group[0].time and group[0].time.prefills and not group[0].time.decoded_tokens
    }
    made = [_measurement(group, prefills.get(run)) for (run, _), group in joined.items()]
    return [one for one in made if one is not None]


def _measurement(rows: Sequence[PublishedRow], prefill_s: float | None) -> Measurement | None:
    first = rows[0]
    counters = {r.counter: r.measured_bytes for r in rows if r.counter not in (None, AFTER_STEP) and r.measured_bytes}
    times = _times(next((row for row in rows if row.time), first), prefill_s)
    if not counters and not times and not first.ran_out:
        return None
    remarks = [*dict.fromkeys(remark for row in rows for remark in row.remarks)]
    remarks += [RELATIVE] if first.relative else []
    trusted = sorted({word for row in rows for word in row.row["trusted_for"].split()})
    known = PublishedFacts(
        completeness=max(row.row["completeness"] for row in rows if row.row["trusted_for"]),
        trusted_for=tuple(trusted),
        cell=first.cell,
    )
    return Measurement(
        workload=replace(first.workload, id=""),
        environment=first.environment,
        evidence="published",
        device="cuda",
        outcome="oom" if first.ran_out else "ok",
        error=PRESUMED if first.ran_out else "",
        measured_at=first.measured_at,
        source=first.row["source"],
        notes=notes_of(known, *remarks),
        **counters,  # type: ignore[arg-type]
        **times,  # type: ignore[arg-type]
    )


def _times(row: PublishedRow, prefill_s: float | None) -> dict[str, TimeStats]:
    """Return the times that the published one tells: of a step, a prefill, a decoded token, as a mean."""
    time = row.time
    if time is None:
        return {}
    if time.steps:
        return {"step": TimeStats(mean_s=time.seconds / time.steps)}
    if time.optimizer_steps:  # a step is all of what its workload accumulates
        return {"step": TimeStats(mean_s=time.seconds / time.optimizer_steps)}
    if not time.decoded_tokens:
        return {"prefill": TimeStats(mean_s=time.seconds)} if time.prefills else {}
    if not time.prefills:
        return {"decode_per_token": TimeStats(mean_s=time.seconds / time.decoded_tokens)}
    if row.workload.prefill_len == 1:  # a prefill of one token takes as long as a decoded one
        return {"decode_per_token": TimeStats(mean_s=time.seconds / (time.decoded_tokens + 1))}
    if prefill_s is None:
        return {}
    decoded_s = (time.seconds - prefill_s) / time.decoded_tokens
    return {"prefill": TimeStats(mean_s=prefill_s), "decode_per_token": TimeStats(mean_s=decoded_s)}


if __name__ == "__main__":
    sys.exit(main())
