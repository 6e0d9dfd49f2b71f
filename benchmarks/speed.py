"""Print how long an estimate and a large search take, as ratios to what Python and numpy cost on the same machine.

usage: python benchmarks/speed.py [--repeats N] [--configurations N]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from whichlora.pick import pick
from whichlora.pickconfig import config_from_fields
from whichlora_estimators.estimate import estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload

ESTIMATE = "from whichlora.cli import main; main(['estimate', 'meta-llama/Llama-3.1-8B', '--gpu', '4090', '--offline'])"


def main() -> None:
    """Time both, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--configurations", type=int, default=10_000)
    arguments = parser.parse_args()
    base_s = seconds("import click, numpy", arguments.repeats)
    estimate_s = seconds(ESTIMATE, arguments.repeats)
    print(f"import click, numpy: {base_s:.3f} s")
    print(f"whichlora estimate, one 8B model: {estimate_s:.3f} s, {estimate_s / base_s:.2f} times that")
    for name, run in warm_estimates().items():
        print(
            f"one more estimate of 32 layers, {name}: {1e3 * process_s(run, arguments.repeats):.1f} ms of processor time"
        )
    rows, pick_s = search(arguments.configurations)
    print(f"pick over {rows} configurations: {pick_s:.1f} s, {pick_s / estimate_s:.1f} times one estimate")


def seconds(code: str, repeats: int) -> float:
    """Median wall time of a Python process that runs `code`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return median(times)


def warm_estimates() -> dict[str, Callable[[], object]]:
    """Return what estimates a 32-layer model, timeline and allocator replay included, by name of the setup."""
    shape, gpu = load_model("meta-llama/Llama-3.1-8B", offline=True), find_gpu("4090")
    workload = Workload(model=shape.name, config=shape.config)
    setups = {
        "lora": workload,
        "lora on nf4": workload.with_(quantization="nf4"),
        "full": workload.with_(method="full"),
        "generation of 128 tokens": workload.with_(phase="generate", decode_len=128),
    }
    return {name: partial(estimate, setup, gpu) for name, setup in setups.items()}


def process_s(run: Callable[[], object], repeats: int) -> float:
    """Least processor time of a call, the first one left out."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def search(configurations: int) -> tuple[int, float]:
    """Pick among the bundled default models with as many batch sizes as make the number of configurations."""
    methods = ["lora", "dora", "lora-fa", "qlora", "qdora"]
    ranks = [4, 8, 16, 32, 64]
    batches = max(1, configurations // (16 * len(methods) * len(ranks)))
    config = config_from_fields(
        {
            "gpu": "h200",
            "stage1_profile": {"quantization": "nf4"},
            "stage2_profile": {"batch_size": list(range(1, batches + 1)), "total_time_mins": 600},
            "methods": methods,
            "ranks": ranks,
            "dataset": {"samples": 10_000},
        }
    )
    start = time.perf_counter()
    result = pick(config, offline=True)
    return len(result.stage1) + len(result.stage2), time.perf_counter() - start


if __name__ == "__main__":
    main()
