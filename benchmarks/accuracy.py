"""Compare estimates with rehearsed truth: error of peaks by family, method, phase.

usage: python benchmarks/accuracy.py WORKLOADS.jsonl[.gz] [--only SUBSTRING] [--json] [--ratios FILE] [--keep FILE]
       python benchmarks/accuracy.py WORKLOADS.jsonl[.gz] --diff ID [--layers N] [--smallest BYTES]

Each line is a workload with its `truth` (allocated_peak_bytes, reserved_peak_bytes, trainable_params). `--ratios`
writes the quantiles of measured over predicted bytes that predictions take their intervals from, `--keep` what the page
of the docs shows: `--keep benchmarks/grid_accuracy.json` of grid.jsonl.gz. `--diff` rehearses one
workload and shows the first allocations where its timeline and the real trace part.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from whichlora_estimators.allocator import CachingAllocator
from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.estimate import Estimate, estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload, workload_from_json

COVERAGE = 0.9
#: Lines that are farthest off, to be shown.
WORST = 10
#: The phase of a rehearsal that a segment of the timeline belongs to.
PHASES = {
    "optimizer state": "optimizer",
    "optimizer step": "optimizer",
    "zero grad": "optimizer",
    "clipping": "optimizer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload with what was measured and what is estimated."""

    id: str
    group: dict[str, str]
    found: Estimate
    truth: dict[str, Any]
    #: Allocated bytes of the model and at the peak of each phase, estimated, where the truth tells of them.
    parts: dict[str, int] = field(default_factory=dict)

    def part_error(self, name: str) -> float:
        """Estimated over measured bytes of the model, or at the peak of a phase, less one."""
        return self.parts[name] / _measured_parts(self.truth)[name] - 1

    @property
    def allocated_error(self) -> float:
        """Estimated over measured allocated peak, less one."""
        return self.found.allocated_peak_bytes / int(self.truth["allocated_peak_bytes"]) - 1

    @property
    def reserved_error(self) -> float:
        """Estimated over measured reserved peak, less one."""
        return self.found.reserved_peak_bytes / int(self.truth["reserved_peak_bytes"]) - 1

    @property
    def trainable_equal(self) -> bool:
        """Whether the counts of trainable parameters agree."""
        return self.found.trainable_params == int(self.truth.get("trainable_params", 0))


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workloads", type=Path)
    parser.add_argument("--only", default="", help="only lines that contain this text")
    parser.add_argument("--gpu", default="a100-sxm-80gb")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ratios", type=Path, help="write interval ratios to this file")
    parser.add_argument("--keep", type=Path, help="write the summary to this file, for docs/generate.py")
    parser.add_argument("--diff", metavar="ID", help="show where this workload's timeline and its real trace part")
    parser.add_argument("--layers", type=int, help="with --diff: cut the model to so many layers")
    parser.add_argument("--smallest", type=int, default=2048, help="with --diff: leave out smaller allocations (bytes)")
    parser.add_argument("--step", type=int, default=2, help="with --diff: which step, or token, is compared")
    parser.add_argument("--hunks", type=int, default=8, help="with --diff: how many differences are shown")
    parser.add_argument("--stack", default="", help="with --diff: under these releases (whichlora rehearse --stack)")
    arguments = parser.parse_args()
    lines = [line for line in read_text(arguments.workloads).splitlines() if arguments.only in line]
    if arguments.diff:
        print(diff(lines, arguments))
        return
    cases, refused = compare([json.loads(line) for line in lines], arguments.gpu)
    if arguments.ratios:
        text = json.dumps(ratios(cases, lines, arguments.workloads.name), indent=1)
        arguments.ratios.write_text(text + "\n", encoding="utf-8")
    if arguments.keep:
        kept = {"source": arguments.workloads.name, "rows_sha256": digest(lines), **summary(cases, refused)}
        arguments.keep.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(cases, refused)) if arguments.json else report(cases, refused))


def read_text(path: Path) -> str:
    """Read a file, packed or not."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def diff(lines: Sequence[str], arguments: argparse.Namespace) -> str:
    """Compare one workload's traces."""
    sys.path.append(str(Path(__file__).parents[1]))
    from benchmarks.tracediff import trace_diff

    found = [fields for line in lines if (fields := json.loads(line)).get("id") == arguments.diff]
    if not found:
        raise SystemExit(f"no line with id {arguments.diff!r} in {arguments.workloads}")
    settings = {"layers": arguments.layers, "step": arguments.step, "hunks": arguments.hunks}
    return trace_diff(found[0], smallest_bytes=arguments.smallest, stack=arguments.stack, **settings)


def compare(lines: Sequence[dict[str, Any]], gpu_name: str) -> tuple[list[Case], list[str]]:
    """Estimate every line; refused ones are returned with the reason."""
    gpu = find_gpu(gpu_name)
    cases, refused = [], []
    for fields in lines:
        try:
            workload = workload_from_json(fields)
            found = estimate(workload, gpu)
        except WhichloraError as error:
            refused.append(f"{fields.get('id')}: {error}")
            continue
        group = {
            "drawn": workload.id.partition("-")[0],
            "family": str(fields["config"]["model_type"]),
            "method": workload.method if workload.phase == "train" else "-",
            "quantization": workload.quantization,
            "phase": workload.phase,
            "precision": workload.precision,
        }
        known = _measured_parts(fields["truth"])
        parts = {name: size for name, size in estimated_parts(workload).items() if name in known} if known else {}
        cases.append(Case(id=workload.id, group=group, found=found, truth=fields["truth"], parts=parts))
    return cases, refused


def _measured_parts(truth: Mapping[str, Any]) -> dict[str, int]:
    return {"model": truth["model_bytes"], **truth["phases"]} if "phases" in truth else {}


def estimated_parts(workload: Workload) -> dict[str, int]:
    """Replay a workload segment by segment: bytes of the model, and at the peak of each phase."""
    timeline, allocator = lay(workload), CachingAllocator()
    setup, start, parts = timeline.setup.last.event, 0, {}
    for stop in [stop for stop in timeline.tape.emptied if stop < setup]:
        allocator.run(timeline.tape.sizes, timeline.tape.events[start:stop])
        allocator.empty_cache()
        start = stop
    allocator.run(timeline.tape.sizes, timeline.tape.events[start:setup])
    parts["model"] = allocator.state().allocated_bytes
    for segment in timeline.order:
        allocator.reset_peaks()
        allocator.run(timeline.tape.sizes, timeline.tape.events[segment.first.event : segment.last.event])
        name = PHASES.get(segment.label, segment.label.split()[0])
        parts[name] = max(parts.get(name, 0), allocator.state().allocated_peak_bytes)
    return parts


def quantile(values: Sequence[float], share: float) -> float:
    """Return an order statistic: the smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def statistics(cases: Sequence[Case], error: Callable[[Case], float]) -> dict[str, float]:
    """Median, 95th percentile and worst absolute error."""
    errors = [abs(error(case)) for case in cases]
    return {"median": median(errors), "p95": quantile(errors, 0.95), "worst": max(errors)}


def summary(cases: Sequence[Case], refused: Sequence[str]) -> dict[str, Any]:
    """Collect everything that the text report shows."""
    by = []
    for key in cases[0].group:
        for value in sorted({case.group[key] for case in cases}):
            members = [case for case in cases if case.group[key] == value]
            errors = {name: statistics(members, error) for name, error in COUNTERS.items()}
            by.append({key: value, "lines": len(members), **errors})
    for part in dict.fromkeys(name for case in cases for name in case.parts):
        members = [case for case in cases if part in case.parts]
        errors = {"allocated": statistics(members, partial(Case.part_error, name=part))}
        by.append({"component": part, "lines": len(members), **errors})
    worst = {
        name: sorted(cases, key=lambda case, error=error: -abs(error(case)))[:WORST]  # type: ignore[misc]
        for name, error in COUNTERS.items()
    }
    return {
        "schema": 1,
        "lines": len(cases),
        "refused": list(refused),
        "trainable_equal": sum(case.trainable_equal for case in cases),
        **{name: statistics(cases, error) for name, error in COUNTERS.items()},
        "by": by,
        "worst": {
            name: [{"id": case.id, **case.group, "error": COUNTERS[name](case)} for case in members]
            for name, members in worst.items()
        },
    }


def _allocated(case: Case) -> float:
    return case.allocated_error


def _reserved(case: Case) -> float:
    return case.reserved_error


COUNTERS = {"allocated": _allocated, "reserved": _reserved}


def report(cases: Sequence[Case], refused: Sequence[str]) -> str:
    """Lay the summary out as text."""
    found = summary(cases, refused)
    lines = [
        f"{found['lines']} lines, trainable parameters equal on {found['trainable_equal']}, refused {len(refused)}"
    ]
    for counter in ("allocated", "reserved"):
        lines.append(f"{counter:<10} {_shown(found[counter])}")
    for row in found["by"]:
        key, value = next(iter(row.items()))
        reserved = f"  reserved {_shown(row['reserved'])}" if "reserved" in row else ""
        lines.append(f"  {key:<13}{value:<14}{row['lines']:>4}  {_shown(row['allocated'])}{reserved}")
    lines += [
        f"  worst {name:<10}{row['id']:<11} {100 * row['error']:+.2f}%  {row['family']} {row['method']}"
        for name, rows in found["worst"].items()
        for row in rows
    ]
    return "\n".join([*lines, *(f"  refused {reason}" for reason in refused)])


def _shown(errors: dict[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:6.2f}%" for name, value in errors.items())


def ratios(cases: Sequence[Case], lines: Sequence[str], name: str) -> dict[str, Any]:
    """Quantiles of measured over predicted, and of measured reserved over predicted allocated, by phase."""
    tail = (1 - COVERAGE) / 2
    by_phase = {}
    for phase in sorted({case.group["phase"] for case in cases}):
        members = [case for case in cases if case.group["phase"] == phase]
        values = {
            "allocated": [1 / (1 + case.allocated_error) for case in members],
            "reserved": [1 / (1 + case.reserved_error) for case in members],
            "reserved_over_allocated": [
                case.truth["reserved_peak_bytes"] / case.found.allocated_peak_bytes for case in members
            ],
        }
        by_phase[phase] = {
            key: [round(quantile(each, tail), 5), round(quantile(each, 1 - tail), 5)] for key, each in values.items()
        }
    return {"coverage": COVERAGE, "rows": len(cases), "source": name, "rows_sha256": digest(lines), "ratios": by_phase}


def digest(lines: Sequence[str]) -> str:
    """Return the SHA-256 of the lines of a file."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    main()
