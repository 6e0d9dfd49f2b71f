"""Times of real small models on this processor against an entry that other small models calibrated, in one run.

    OMP_NUM_THREADS=1 PYTHONPATH=.:estimators:profiles_db:calibration python -m benchmarks.cpu_time [--steps 5]

`verify --on cpu` runs all of them: training steps (LoRA and full), prefill and decoded tokens. Prints each prediction as a
ratio to the least time that was measured, and the median error. With one thread the processor's time counts, so that a
busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from whichlora.processor import Processor, calibrated
from whichlora.verify import Options, Verification, verify
from whichlora_estimators.models import bundled_model
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement

#: Width and layers of Llamas that calibrate, beside models that people use.
SIZES = ((256, 2), (512, 4), (1024, 3))
CALIBRATING = ("EleutherAI/pythia-70m", "distilgpt2")
PREDICTED = ("facebook/opt-125m", "gpt2", "HuggingFaceTB/SmolLM2-135M")
#: Batch and tokens.
SHAPES = ((1, 64), (2, 96))


def llama(width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """Return the name and config of a small model."""
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    }
    return f"llama {width}x{layers}", config


def workloads(model: str, config: dict[str, Any]) -> Iterator[Workload]:
    """Yield what is timed of a model."""
    for batch_size, tokens in SHAPES:
        shared: dict[str, Any] = {"model": model, "config": config, "precision": "fp32", "batch_size": batch_size}
        for method in ("lora", "full"):
            yield Workload(**shared, method=method, rank=8, seq_len=tokens)
        yield Workload(**shared, phase="generate", prefill_len=tokens, decode_len=8)


def measured(asked: list[Workload], steps: int) -> list[Measurement]:
    """Run workloads here."""

    def tell(done: Verification) -> None:
        print(f"{done.workload.model} {done.outcome} {done.measurement.error}", file=sys.stderr)

    options = Options(steps=steps, warmup=0, on_done=tell)
    return [each.measurement for each in verify(asked, on="cpu", options=options) if each.outcome == "ok"]


def compared(processor: Processor, found: Measurement) -> Iterator[tuple[str, float]]:
    """Yield the name of each time and its prediction over the least that was measured."""
    stats = {"step_s": found.step, "prefill_s": found.prefill, "decode_s_per_token": found.decode_per_token}
    for name, span in processor.predict(found.workload).items():
        times = stats[name]
        if times is not None and times.min_s:
            run = found.workload.method if name == "step_s" else ""
            label = f"{found.workload.model} {run} b{found.workload.batch_size} {name}"
            yield label, span.expected_s / times.min_s


def main() -> None:
    """Time, fit, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each workload")
    steps = parser.parse_args().steps
    calibrating = [llama(*size) for size in SIZES] + [(name, dict(bundled_model(name).config)) for name in CALIBRATING]
    predicted = [(name, dict(bundled_model(name).config)) for name in PREDICTED]
    processor = calibrated(measured([w for model in calibrating for w in workloads(*model)], steps))
    entry = processor.entry
    print(f"{1e-9 / max(entry.s_per_flop, 1e-15):.1f} GFLOP/s, {entry.s_per_launch * 1e6:.1f} us an operator")
    print(f"models left out took {processor.low:.2f} to {processor.high:.2f} times the prediction")
    errors = []
    for found in measured([w for model in predicted for w in workloads(*model)], steps):
        for label, ratio in compared(processor, found):
            errors.append(abs(ratio - 1))
            print(f"{label:45} predicted {ratio:5.2f} times what was measured")
    print(f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
