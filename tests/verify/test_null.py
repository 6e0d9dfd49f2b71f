"""The CUDA code path on the null device: the calls of a card, memory as rehearsed, and no time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from benchmarks import gpu_acceptance
from whichlora.nulldevice import environment
from whichlora.rehearse.adapters import OPTIMIZERS
from whichlora.rehearse.models import QUANTIZATIONS
from whichlora.rehearse.stored import card_fields
from whichlora.verify import Place
from whichlora.verify.card import known_card
from whichlora.verify.stored import measurement, remembered
from whichlora_estimators.gpus import Gpu, all_gpus, context_bytes, find_gpu
from whichlora_estimators.methods import all_methods
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import Environment, open_store, workload_to_json

from ..estimators.golden import golden_lines
from ..rehearse.conftest import tiny

pytestmark = pytest.mark.stack

# On the null device: a timed step's clock, and what NVML says of the process, as the worker uses them.
#: Inference that is no causal generation.
INFERENCE = Path(__file__).parents[1] / "estimators" / "families" / "golden_inference.jsonl"
PROBE = """
import json
import torch
from whichlora.nulldevice import control
from whichlora.rehearse.worker import warm_up
from whichlora.verify.nvml import ProcessBytes
from whichlora.verify.recorders import CudaClock, CudaRecorder
from whichlora.verify.card import environment_here
recorder, clock = CudaRecorder(ProcessBytes()), CudaClock(warmup=1, steps=2)
warm_up()
kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
recorder.count_process()
marks = [clock.mark() for _ in range(3)]
print(json.dumps({
    "kinds": [type(mark).__name__ for mark in marks],
    "between_s": clock.between_s(marks),
    "process_bytes": recorder.counts.get("process_bytes"),
    "used_bytes": control.used_bytes(),
    "gpu": environment_here("cuda").gpu,
}))
"""


def test_the_calls_of_a_card_are_made() -> None:
    """Moments are CUDA events, and NVML tells of the context and of what PyTorch reserved."""
    pytest.importorskip("pynvml")
    variables = {**os.environ, **environment(find_gpu("l4"), context_bytes=300 * 2**20)}
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], *sys.path])
    done = subprocess.run([sys.executable, "-c", PROBE], env=variables, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["kinds"] == ["Event"] * 3
    assert len(seen["between_s"]) == 2
    assert all(each >= 0 for each in seen["between_s"])
    assert seen["used_bytes"] >= 64 * 2**20
    assert seen["process_bytes"] == seen["used_bytes"] + 300 * 2**20
    assert seen["gpu"] == "l4"


@pytest.fixture
def one_processor() -> Iterator[None]:
    """Run on one processor, as on a small machine, so that one worker does all."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def matrix() -> list[Workload]:
    """Return each method on one quantization after the other; full fine-tuning and generation as they can be."""
    adapted = [name for name in sorted(all_methods()) if name not in ("full", "prefix-tuning")]
    made = [
        tiny(id=name, method=name, quantization=quantization, optimizer=optimizer)
        for name, quantization, optimizer in zip(adapted, cycle(QUANTIZATIONS), cycle(OPTIMIZERS), strict=False)
    ]
    generating = [
        tiny(id=f"generate-{name}", phase="generate", prefill_len=16, decode_len=3, quantization=name)
        for name in QUANTIZATIONS
    ]
    generating += [workload_from_json(line).with_(id=f"infers-{line['id']}") for line in golden_lines(INFERENCE)[::9]]
    return [*made, tiny(id="full", method="full"), tiny(id="prefix-tuning", method="prefix-tuning"), *generating]


@pytest.mark.usefixtures("one_processor")
def test_memory_is_what_a_rehearsal_takes_and_time_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The acceptance script finds the null device equal to itself, out of memory included, and no time is made up."""
    asked, seen = tmp_path / "workloads.jsonl", tmp_path / "seen.json"
    asked.write_text("\n".join(json.dumps(workload_to_json(each)) for each in matrix()))
    where = ("--on", "null", "--gpu", "l4", "--quick", "--steps", "1")
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", *where, "--workloads", str(asked), "--json", str(seen)])
    gpu_acceptance.main()
    rows = json.loads(seen.read_text())["rows"]
    assert [row["workload"]["id"] for row in rows] == [*gpu_acceptance.QUICK, "too-large", *(w.id for w in matrix())]
    for row in rows:
        name, verified, rehearsed = row["workload"]["id"], row["verified"], row["rehearsed"]
        assert verified["outcome"] == rehearsed["outcome"] == ("oom" if name == "too-large" else "ok"), row
        assert (verified["on"], verified["gpu"], verified["evidence"]) == ("null", "l4", "rehearsed")
        assert verified["allocated_peak_bytes"] == rehearsed["allocated_peak_bytes"], name
        assert verified["trainable_params"] == rehearsed["trainable_params"], name
        assert verified["times"] == {}
        if name == "too-large":
            assert verified["error"].startswith(("in forward: ", "in backward: "))
            continue
        assert verified["reserved_peak_bytes"] == pytest.approx(rehearsed["reserved_peak_bytes"], abs=4 * 2**20)
        assert verified["process_bytes"] == verified["reserved_peak_bytes"] + context_bytes(find_gpu("l4"))
        assert set(verified["ratio"]) == {"allocated_peak_bytes", "reserved_peak_bytes", "process_bytes"}


def test_what_is_stored_needs_no_samples_here(tmp_path: Path) -> None:
    """A run on the null device is found again without any time, on the same card only, and not if it failed."""
    store, workloads = (
        open_store(tmp_path / "profiles.duckdb"),
        [tiny(id="ok"), tiny(id="oom", batch_size=64), tiny(rank=5)],
    )
    card = find_gpu("l4")
    here = Place(device="null", gpu=card, environment=Environment(**card_fields(card)), variables={})
    for workload, outcome in zip(workloads, ("ok", "oom", "failed"), strict=True):
        answer = {"outcome": outcome, "error": outcome, "environment": {}, "peaks": {"forward": (1024, 2048)}}
        store.add([measurement(workload, here, answer)])
    found = remembered(store, workloads, here, steps=7)
    assert {number: each.outcome for number, each in found.items()} == {0: "ok", 1: "oom"}
    assert found[0].allocated_peak_bytes == 1024
    other = dataclasses.replace(here, environment=Environment(**card_fields(find_gpu("t4"))))
    assert remembered(store, workloads, other, steps=7) == {}


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.slug)
def test_a_card_is_known_by_what_it_reports(gpu: Gpu) -> None:
    """The name, memory and compute capability of a card find it; a slice of it, or another capability, is another card."""
    found = known_card(gpu.name, total_bytes=gpu.total_bytes, compute_capability=gpu.compute_capability)
    assert found
    assert (found.slug, found.total_bytes) == (gpu.slug, gpu.total_bytes)
    half = known_card(gpu.name, total_bytes=gpu.total_bytes // 2, compute_capability=gpu.compute_capability)
    assert half is None or half.slug != gpu.slug
    assert known_card(gpu.name, total_bytes=gpu.total_bytes, compute_capability=(1, 0)) is None
    assert known_card("Voodoo 2", total_bytes=gpu.total_bytes, compute_capability=gpu.compute_capability) is None
