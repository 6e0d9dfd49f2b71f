"""The host of PEFT's L40S and the gap behind a launch, chosen on methods that are judged by nothing, and the judged ones.

    for METHOD in …; do
        whichlora rehearse --time --gpu l40s -- python benchmarks/peft_step.py METHOD --record METHOD.json
    done
    python benchmarks/peft_host.py *.json

Lays what was recorded on two lanes again, for every host and gap of a grid, and prints the pair that comes nearest to the
methods of peft_methods.py that are not among the six judged ones, by the mean absolute log error; then all of them under it.
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

from peft_methods import EXPERIMENTS, JUDGED

#: As in whichlora/rehearse/lanes.py.
WAIT_S = 32e-6
LAUNCHES_S = [microseconds * 1e-6 for microseconds in (10, 11, 12, 12.5, 13, 13.5, 14, 15, 16, 18, 20)]
GAPS_S = [microseconds * 1e-6 for microseconds in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)]


def step_s(events: Iterable[Sequence[float] | None], launch_s: float, gap_s: float) -> float:
    """Return the seconds of recorded launches under another host: nothing starts before it was issued."""
    issued = ended = 0.0
    for event in events:
        if event is None:
            issued = max(issued, ended) + WAIT_S
            continue
        host, card_s = event
        issued += host * launch_s
        if card_s > 0:
            ended = max(issued, ended) + card_s + gap_s
    return max(issued, ended)


def mean_ms(record: dict[str, Any], launch_s: float, gap_s: float) -> float:
    """Return the mean step over the recorded lengths."""
    return 1e3 * sum(step["share"] * step_s(step["events"], launch_s, gap_s) for step in record["steps"])


def error(record: dict[str, Any], launch_s: float, gap_s: float) -> float:
    """Return log(rehearsed / measured)."""
    return math.log(mean_ms(record, launch_s, gap_s) / EXPERIMENTS[record["method"]].measured_ms)


def main(paths: Sequence[str]) -> None:
    """Read, search, print."""
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    told = [record for record in records if record["method"] not in JUDGED]
    found = sorted(
        (statistics.mean(abs(error(record, *pair)) for record in told), *pair) for pair in product(LAUNCHES_S, GAPS_S)
    )
    for misfit, launch_s, gap_s in found[:5]:
        print(f"launch {launch_s * 1e6:.1f} us, gap {gap_s * 1e6:.1f} us: {misfit:.1%} over {len(told)} methods")
    _, launch_s, gap_s = found[0]
    for record in sorted(records, key=lambda record: (record["method"] in JUDGED, record["method"])):
        measured_ms, ms = EXPERIMENTS[record["method"]].measured_ms, mean_ms(record, launch_s, gap_s)
        print(f"{record['method']:18} {ms:6.1f} ms, measured {measured_ms:6.1f}: {ms / measured_ms - 1:+.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
