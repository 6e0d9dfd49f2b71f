"""The CUDA code path on the null device: the calls of a card, memory as rehearsed, and no time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whichlora.nulldevice import environment
from whichlora.rehearse import find_card, rehearse
from whichlora.verify import Options, answer, find_place, verify
from whichlora.verify.card import known_card
from whichlora_estimators.gpus import Gpu, all_gpus, context_bytes, find_gpu
from whichlora_profiles_db import open_store

from ..rehearse.conftest import tiny

pytestmark = pytest.mark.stack

SMALL = dataclasses.replace(find_card("rtx-4090"), total_bytes=2 * 2**30)

# On the null device: a timed step's clock, and what NVML says of the process, as the worker uses them.
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


def test_memory_is_what_a_rehearsal_takes_and_time_is_unknown(tmp_path: Path) -> None:
    """Bytes equal a rehearsal's, out of memory included, no time is made up, and a rerun takes all from the store."""
    store = open_store(tmp_path / "profiles.duckdb")
    asked = [
        tiny(id="lora"),
        tiny(id="nf4", quantization="nf4", optimizer="paged-adamw-8bit", checkpointing=True),
        tiny(id="generate", phase="generate", prefill_len=16, decode_len=3),
        tiny(id="large", method="full", batch_size=64, seq_len=4096),
    ]
    place = dataclasses.replace(find_place("null", SMALL), jobs=1)
    found = list(verify(asked, on=place, options=Options(steps=2, warmup=1, store=store)))
    rehearsed = list(rehearse(asked, SMALL, jobs=1))
    assert [each.outcome for each in found] == ["ok", "ok", "ok", "oom"]
    for one, other in zip(found, rehearsed, strict=True):
        measured = one.measurement
        assert (measured.device, measured.evidence) == ("null", "rehearsed")
        assert measured.environment.gpu_total_bytes == SMALL.total_bytes
        assert one.typical_s == {}
        assert other.outcome == one.outcome
        assert measured.allocated_peak_bytes == other.allocated_peak_bytes, one.workload.id
        assert measured.trainable_params == other.trainable_params
        if one.outcome == "ok":
            assert measured.reserved_peak_bytes == pytest.approx(other.reserved_peak_bytes, abs=4 * 2**20)
            assert one.process_bytes == (measured.reserved_peak_bytes or 0) + context_bytes(SMALL)
            assert set(one.compared) == {"allocated_peak_bytes", "reserved_peak_bytes", "process_bytes"}
    assert found[3].measurement.error.startswith(("in forward: ", "in backward: "))
    assert answer(found[3])["oom"]
    again = list(verify(asked, on=place, options=Options(store=store)))
    assert [each.measurement for each in again] == [each.measurement for each in found]


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
