"""The host of PEFT's L40S and what a kernel takes to start, chosen on methods that are judged by nothing, and the judged ones.

    for METHOD in …; do
        whichlora rehearse --time --gpu l40s -- python benchmarks/peft_step.py METHOD --record METHOD.json
    done
    python -m benchmarks.peft_host *.json

Lays what was recorded on two lanes again, for every host and start of a grid, and prints the pair that comes nearest to the
methods of peft_methods.py that are not among the six judged ones, by the median absolute log error, since a few do work of
their own that nothing here tells of; then all of them under it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.peft_methods import EXPERIMENTS, JUDGED

LAUNCHES_S = [microseconds * 1e-6 for microseconds in (10, 11, 12, 12.5, 13, 13.5, 14, 15, 16, 18, 20)]
STARTS_S = [microseconds * 1e-6 for microseconds in (0, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6)]


def step_s(events: Iterable[Sequence[float]], launch_s: float, start_s: float) -> float:
    """Return the seconds of recorded launches under another host: nothing starts before it was issued."""
    issued = ended = 0.0
    for event in events:
        if len(event) == 1:
            issued = max(issued, ended) + event[0]
            continue
        host, card_s, starts = event
        issued += host * launch_s
        if starts or card_s > 0:
            ended = max(issued, ended) + card_s + starts * start_s
    return max(issued, ended)


def mean_ms(record: dict[str, Any], launch_s: float, start_s: float) -> float:
    """Return the mean step over the recorded lengths."""
    return 1e3 * math.fsum(step["share"] * step_s(step["events"], launch_s, start_s) for step in record["steps"])


def error(record: dict[str, Any], launch_s: float, start_s: float) -> float:
    """Return log(rehearsed / measured)."""
    return math.log(mean_ms(record, launch_s, start_s) / EXPERIMENTS[record["method"]].measured_ms)


def main(paths: Sequence[str]) -> None:
    """Read, search, print."""
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    told = [record for record in records if record["method"] not in JUDGED]
    found = sorted(
        (statistics.median(abs(error(record, *pair)) for record in told), *pair)
        for pair in product(LAUNCHES_S, STARTS_S)
    )
    for misfit, launch_s, start_s in found[:5]:
        print(f"launch {launch_s * 1e6:.1f} us, start {start_s * 1e6:.1f} us: {misfit:.1%} over {len(told)} methods")
    _, launch_s, start_s = found[0]
    for record in sorted(records, key=lambda record: (record["method"] in JUDGED, record["method"])):
        measured_ms, ms = EXPERIMENTS[record["method"]].measured_ms, mean_ms(record, launch_s, start_s)
        print(f"{record['method']:18} {ms:6.1f} ms, measured {measured_ms:6.1f}: {ms / measured_ms - 1:+.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
