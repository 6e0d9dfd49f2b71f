"""How many configurations of 7B-class models are rehearsed a minute on this machine, and what processor time each takes.

usage: python benchmarks/rehearse_speed.py [--load config|checkpoint] [--jobs 2] [--count 12]
"""

from __future__ import annotations

import argparse
import resource
import time

from whichlora.rehearse import rehearse
from whichlora.rehearse.rehearsals import LOADS
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload

MODELS = ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B")
SETUPS = (
    {"batch_size": 1},
    {"batch_size": 4, "checkpointing": True},
    {"quantization": "nf4", "optimizer": "paged-adamw-8bit", "checkpointing": True},
    {"method": "dora", "rank": 32},
)


def workloads(count: int) -> list[Workload]:
    """Return so many configurations: each setup of each model in turn, at more and more tokens."""
    shapes = [load_model(name, offline=True) for name in MODELS]
    pairs = [(shape, setup) for setup in SETUPS for shape in shapes]
    chosen = [(*pairs[number % len(pairs)], 512 * (1 + number // len(pairs))) for number in range(count)]
    return [Workload(model=s.name, config=s.config, seq_len=tokens, **setup) for s, setup, tokens in chosen]


def main() -> None:
    """Rehearse and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", choices=LOADS, default=LOADS[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args()
    begin = time.monotonic()
    for done in rehearse(workloads(args.count), "unlimited", jobs=args.jobs, load=args.load):
        print(f"{done.workload.model}: {done.outcome}", flush=True)
    wall_s = time.monotonic() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = (used.ru_utime + used.ru_stime) / args.count
    print(f"{60 * args.count / wall_s:.0f} configurations a minute with {args.jobs} jobs, starting included")
    print(
        f"{processor_s:.2f} s of processor time each: {60 * args.jobs / processor_s:.0f} a minute if nothing else ran"
    )


if __name__ == "__main__":
    main()
