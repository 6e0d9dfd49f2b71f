"""Times of real small models on this processor against an entry that other small models calibrated, in one run.

    PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.cpu_time [--steps 3]

Every second model calibrates, the others are predicted: training steps (LoRA and full), prefill and decoded tokens. Prints
each prediction as a ratio to what was measured, and the median error.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from whichlora.rehearse.step import run
from whichlora.verify.recorders import HostClock, HostRecorder
from whichlora_estimators.host_entry import fit_host
from whichlora_estimators.tape import Kernel
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload

#: Width, layers, batch, tokens.
SIZES = ((256, 2, 1, 64), (384, 3, 1, 96), (512, 4, 1, 64), (640, 3, 1, 96), (768, 2, 2, 64), (512, 3, 2, 64))
VOCABULARY = 4096

Timed = tuple[str, tuple[Kernel, ...], float]


def workloads(width: int, layers: int, batch: int, tokens: int) -> Iterator[Workload]:
    """Yield what is timed of a size."""
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
    }
    shared: dict[str, Any] = {
        "model": f"llama {width}x{layers}",
        "config": config,
        "precision": "fp32",
        "batch_size": batch,
    }
    for method in ("lora", "full"):
        yield Workload(**shared, method=method, rank=8, seq_len=tokens)
    yield Workload(**shared, phase="generate", prefill_len=tokens, decode_len=8)


def timed(workload: Workload, steps: int) -> Iterator[Timed]:
    """Run a workload here and yield what each of its times is of."""
    recorder = HostRecorder()
    run(workload, recorder, HostClock(warmup=1, steps=steps))
    timeline = lay(workload)
    for name, labels in (
        ("step", ("forward", "backward", "optimizer step")),
        ("prefill", ("prefill",)),
        ("decode_per_token", ("decode 6",)),
    ):
        seconds = recorder.times.get(name)
        if seconds:
            label = f"{workload.model} {workload.method if name == 'step' else ''} {name}"
            yield label, _kernels(timeline, labels), statistics.median(seconds)


def _kernels(timeline: Timeline, labels: Sequence[str]) -> tuple[Kernel, ...]:
    segments = {segment.label: segment for segment in timeline.order if segment.label in labels}.values()
    return tuple(k for s in segments for k in timeline.tape.kernels[s.first.kernel : s.last.kernel])


def main() -> None:
    """Time, fit, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each workload")
    steps = parser.parse_args().steps
    by_size = [[one for workload in workloads(*size) for one in timed(workload, steps)] for size in SIZES]
    known = [(kernels, seconds) for size in by_size[::2] for _, kernels, seconds in size]
    entry = fit_host(known)
    print(f"{1 / max(entry.s_per_flop, 1e-15) / 1e9:.1f} GFLOP/s, {entry.s_per_launch * 1e6:.1f} us an operator")
    errors = []
    for label, kernels, seconds in (one for size in by_size[1::2] for one in size):
        ratio = entry.seconds(kernels) / seconds
        errors.append(abs(ratio - 1))
        print(f"{label:32} predicted {ratio:5.2f} times what was measured")
    print(f"median error {statistics.median(errors):.1%}")


if __name__ == "__main__":
    main()
