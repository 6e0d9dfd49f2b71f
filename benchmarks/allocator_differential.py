"""Compare our model of PyTorch's caching allocator with the real one on random traces.

    python benchmarks/allocator_differential.py --traces 10000

Needs the gpu extra (torch) and Linux, no GPU: the real allocator runs on the null device.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.estimators.real_allocator import COUNTERS, Trace, random_trace, real_allocator, run_model

TRACES_A_PROCESS = 500  # the null device has addresses for so many traces before it uses some again


def first_difference(trace: Trace, model: list[list[int]], real: list[list[int]]) -> str:
    """Say where model and reality part, and in which counters."""
    for number, (ours, theirs) in enumerate(zip(model, real, strict=True)):
        if ours != theirs:
            parted = {name: pair for name, *pair in zip(COUNTERS, ours, theirs, strict=True) if pair[0] != pair[1]}
            return f"event {number} {trace.events[number]} of {trace.settings}, {trace.limit_bytes} bytes: {parted}"
    return ""


def compare(seeds: range, longest: int, seen: Counter[str]) -> None:
    """Run the traces of some seeds on both allocators and count what was seen."""
    with real_allocator() as real:
        for seed in seeds:
            trace = random_trace(Random(seed), longest=longest)
            truth = real.run(trace)
            difference = first_difference(trace, run_model(trace), truth)
            if difference:
                print(f"trace {seed}: {difference}")
            seen["traces"] += 1
            seen["traces that agree"] += not difference
            seen["events"] += len(truth)
            seen["retries after emptying the cache"] += truth[-1][COUNTERS.index("retry_count")]
            seen["out of memory"] += truth[-1][COUNTERS.index("oom_count")]
            for name, value in trace.settings.items():
                seen[f"traces with {name}"] += bool(value)


def main() -> None:
    """Print how many traces agree in every counter after every event."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first trace's; the others follow")
    parser.add_argument("--longest", type=int, default=90, help="events of a trace at most")
    arguments = parser.parse_args()
    seen: Counter[str] = Counter()
    last = arguments.seed + arguments.traces
    for first in range(arguments.seed, last, TRACES_A_PROCESS):
        compare(range(first, min(first + TRACES_A_PROCESS, last)), arguments.longest, seen)
    for name, count in seen.items():
        print(f"{count:>9,} {name}")
    sys.exit(seen["traces"] != seen["traces that agree"])


if __name__ == "__main__":
    main()
