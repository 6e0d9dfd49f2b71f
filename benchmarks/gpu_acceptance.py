"""Is the null device right about this card? Run a dozen workloads for real and on the null device playing the card.

    python benchmarks/gpu_acceptance.py --json acceptance.json
    python benchmarks/gpu_acceptance.py --on null --gpu rtx-4090 --quick

Models and batches are chosen so that the formula says they nearly fill the card; the last one is chosen not to fit. Each
is verified (memory and time) and rehearsed, and shown side by side with what the formula predicted. With --on null the
device is compared with itself, which tries the script where there is no card. Nothing is stored, nothing downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whichlora.cli.estimate import read_lines
from whichlora.rehearse import Rehearsal, rehearse
from whichlora.rehearse import answer as rehearsal_answer
from whichlora.verify import Options, Place, Verification, answer, find_place, verify
from whichlora_calibration import predict
from whichlora_estimators.estimate import Estimate
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import environment_to_json

FULL_SHARE = 0.8  # how much of the card a workload may take by the formula
TOO_MUCH = 1.3
BATCH_SIZES = (16, 8, 4, 2, 1)
LLAMA = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")
QWEN = ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B")
GEMMA = ("google/gemma-2-9b", "google/gemma-2-2b", "google/gemma-3-270m")
MISTRAL = ("mistralai/Mistral-7B-v0.3", "HuggingFaceTB/SmolLM2-135M")
PYTHIA = ("EleutherAI/pythia-2.8b", "EleutherAI/pythia-1b", "EleutherAI/pythia-160m", "EleutherAI/pythia-70m")

GENERATE = {"phase": "generate", "prefill_len": 512, "decode_len": 64}
CKPT = {"checkpointing": True}
# By name: a family's models from large to small, and what is run with the largest that fits.
CASES: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "lora": (LLAMA, {}),
    "lora-checkpointed": (LLAMA, CKPT),
    "qlora-paged": (QWEN, {**CKPT, "quantization": "nf4", "optimizer": "paged-adamw-8bit"}),
    "generate": (LLAMA, GENERATE),
    "full": (QWEN, {**CKPT, "method": "full"}),
    "full-mixed": (PYTHIA, {"method": "full", "precision": "fp16-mixed"}),
    "lora-int8": (MISTRAL, {**CKPT, "quantization": "int8"}),
    "dora": (LLAMA, {**CKPT, "method": "dora"}),
    "lora-fa": (MISTRAL, {"method": "lora-fa"}),
    "large-vocabulary": (GEMMA, CKPT),
    "padded": (QWEN, {"padded": True}),
    "eager": (PYTHIA, {"attention": "eager"}),
    "generate-nf4": (QWEN, {**GENERATE, "quantization": "nf4"}),
}
QUICK = ("lora", "qlora-paged", "generate")
TOO_LARGE = "too-large"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload: by formula, for real, and rehearsed."""

    estimate: Estimate
    verified: Verification
    rehearsed: Rehearsal


def sized(name: str, gpu: Gpu, *, quick: bool) -> Workload:
    """Return a case's workload with the largest model and then the largest batch that the card holds by the formula."""
    models, setup = CASES[name]
    for model in models[-1:] if quick else models:
        shape = load_model(model, offline=True)
        workload = Workload(id=name, model=shape.name, config=shape.config, **{"seq_len": 1024, **setup})
        for batch_size in BATCH_SIZES[-1:] if quick else BATCH_SIZES:
            found = predict(workload.with_(batch_size=batch_size), gpu).estimate
            if found.process_bytes <= FULL_SHARE * gpu.total_bytes:
                return found.workload
    raise SystemExit(f"{gpu.name} is too small for {name}: not even {models[-1]} fits")


def too_large(gpu: Gpu) -> Workload:
    """Return a workload that the card does not hold by the formula, by a third and more."""
    shape = load_model(PYTHIA[-1], offline=True)
    workload = Workload(id=TOO_LARGE, model=shape.name, config=shape.config, method="full", seq_len=2048)
    while predict(workload, gpu).estimate.allocated_peak_bytes <= TOO_MUCH * gpu.total_bytes:
        workload = workload.with_(batch_size=2 * workload.batch_size)
    return workload


def run(place: Place, own: Iterable[Workload], *, quick: bool, steps: int) -> list[Row]:
    """Verify and rehearse every case, and one's own workloads, on the card of a place."""
    assert place.gpu
    asked = [sized(name, place.gpu, quick=quick) for name in (QUICK if quick else CASES)] + [too_large(place.gpu), *own]
    shown = Options(steps=steps, on_done=lambda each: print(f"verified {each.workload.id}: {each.outcome}"))
    verified = list(verify(asked, on=place, options=shown))
    rehearsed = rehearse(asked, place.gpu)
    return [
        Row(estimate=predict(each, place.gpu).estimate, verified=one, rehearsed=other)
        for each, one, other in zip(asked, verified, rehearsed, strict=True)
    ]


def text(row: Row) -> str:
    """Show a row: GiB for real and rehearsed, their ratio, and the formula's; the time against the roofline's."""
    workload, measured = row.verified.workload, row.verified.measurement
    label = f"{workload.id:18} {workload.model:28} b{workload.batch_size:<5}"
    if row.verified.outcome != "ok" or row.rehearsed.outcome != "ok":
        return f"{label} for real: {row.verified.outcome}; rehearsed: {row.rehearsed.outcome}"
    parts = [
        _bytes(measured.allocated_peak_bytes, row.rehearsed.allocated_peak_bytes, row.estimate.allocated_peak_bytes),
        _bytes(measured.reserved_peak_bytes, row.rehearsed.reserved_peak_bytes, row.estimate.reserved_peak_bytes),
    ]
    parts += [
        f"{name} {1e3 * compared.measured:.1f} ms /roofline {compared.ratio:.2f}"
        for name, compared in row.verified.compared.items()
        if name.startswith(("step_s", "prefill_s", "decode_s"))
    ]
    return f"{label} {'   '.join(parts)}"


def _bytes(real: int | None, rehearsed: int | None, formula: int) -> str:
    if not real or not rehearsed:
        return "-"
    return (
        f"{real / 2**30:7.3f} {rehearsed / 2**30:7.3f} /rehearsed {real / rehearsed:.4f} /formula {real / formula:.3f}"
    )


def as_json(row: Row) -> dict[str, Any]:
    """Return everything that is known of a row but the model's config, which its name tells."""
    fields = {name: getattr(row.verified.workload, name) for name in Workload.__dataclass_fields__ if name != "config"}
    return {"workload": fields, "verified": answer(row.verified), "rehearsed": rehearsal_answer(row.rehearsed)}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("auto", "cuda", "null"), default="auto")
    parser.add_argument("--gpu", help="the card that the null device plays, for --on null")
    parser.add_argument("--quick", action="store_true", help="four workloads of the smallest models")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--workloads", type=Path, help="also these: a file of one JSON object a line")
    options = parser.parse_args()
    own = [workload_from_json(fields) for fields in (read_lines(options.workloads) if options.workloads else ())]
    place = find_place(options.on, options.gpu)
    if place.gpu is None:
        raise SystemExit(f"our data has no card {place.environment.gpu_name!r}: add it, to size workloads for it")
    print(
        f"{place.environment.gpu_name}, driver {place.environment.driver_version}, {dict(place.environment.versions)}"
    )
    rows = run(place, own, quick=options.quick, steps=options.steps)
    print("\nallocated GiB for real, rehearsed, their ratio; then reserved; then times")
    for row in rows:
        print(text(row))
    if options.json:
        environment = environment_to_json(place.environment.without_names())
        content = {"schema": 1, "on": place.device, "environment": environment, "rows": [as_json(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
