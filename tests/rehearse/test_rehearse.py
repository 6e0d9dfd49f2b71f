"""Rehearsals as a library: bytes that are known, outcomes, order, and workers that end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from importlib import metadata
from pathlib import Path

import pytest

from whichlora.rehearse import Rehearsal, find_card, rehearse
from whichlora.rehearse.adapters import METHODS, OPTIMIZERS
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_estimators.gpus import context_bytes
from whichlora_estimators.workload import workload_from_json

from .conftest import golden_lines, tiny

pytestmark = pytest.mark.stack

# The versions that benchmarks/rehearsed.jsonl was made with.
STACK = {"torch": "2.14.1", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
GOLDEN_IDS = ("pub-002", "pub-006", "pub-013", "pub-014", "pub-025", "pub-026", "pub-032")


def test_known_workloads_take_the_bytes_that_they_took() -> None:
    """Golden lines of every task and phase: allocated peaks within 0.1%, trained parameters equal."""
    installed = {name: metadata.version(name).partition("+")[0] for name in STACK}
    if installed != STACK:
        pytest.skip(f"the lines were made with {STACK}, installed are {installed}")
    lines = golden_lines(*GOLDEN_IDS)
    found = list(rehearse(map(workload_from_json, lines), "unlimited", jobs=2))
    assert [each.workload.id for each in found] == list(GOLDEN_IDS)
    for line, each in zip(lines, found, strict=True):
        truth = line["truth"]
        assert each.outcome == "ok", each.error
        assert each.allocated_peak_bytes == pytest.approx(truth["allocated_peak_bytes"], rel=1e-3), line["id"]
        assert each.reserved_peak_bytes == pytest.approx(truth["reserved_peak_bytes"], rel=0.02), line["id"]
        assert each.weights_bytes == pytest.approx(truth["weights_bytes"], rel=1e-3)
        assert each.trainable_params == truth.get("trainable_params", 0)
        assert each.versions.items() >= installed.items() or each.versions["torch"].startswith(STACK["torch"])


def test_every_method_and_optimizer_trains() -> None:
    """Each name that is known runs three steps, phase by phase, and adapters train less than the model has."""
    asked = [tiny(id=name, method=name) for name in METHODS]
    asked += [tiny(id=name, optimizer=name) for name in OPTIMIZERS]
    asked += [tiny(id=name, quantization=name, double_quantization=False) for name in ("nf4", "fp4", "int8")]
    asked += [tiny(id=name, precision=name, checkpointing=True) for name in ("fp16-true", "bf16-mixed", "fp16-mixed")]
    found = {each.workload.id: each for each in rehearse(asked, "rtx-4090", jobs=2)}
    assert {name: each.error for name, each in found.items() if each.outcome != "ok"} == {}
    for each in found.values():
        assert list(each.phases) == ["load", "forward", "backward", "optimizer"]
        assert each.allocated_peak_bytes == max(
            peak.allocated_peak_bytes or 0 for name, peak in each.phases.items() if name != "load"
        )
        assert (each.weights_bytes or 0) < (each.model_bytes or 0) < (each.allocated_peak_bytes or 0)
    full = found["full"].trainable_params
    assert full
    assert all(0 < (found[name].trainable_params or 0) < full for name in METHODS if name != "full")
    assert found["lora-fa"].trainable_params < found["lora"].trainable_params  # type: ignore[operator]


def test_bytes_do_not_depend_on_what_ran_before() -> None:
    """One worker that runs a workload first, in between and last sees the same bytes, failures in between included."""
    same = tiny(quantization="nf4", optimizer="adamw-8bit")
    broken = dataclasses.replace(same, targets=("no_such_layer",))
    first, failed, between, last = rehearse([same, broken, same, same], "rtx-4090", jobs=1)
    assert failed.outcome == "failed"
    assert "no_such_layer" in failed.error
    assert failed.phase == "load"
    assert first.phases == between.phases == last.phases


def test_running_out_of_memory_is_an_outcome() -> None:
    """A card too small for the step says in which phase it ran out; the next workload fits it; nobody is left behind."""
    small = dataclasses.replace(find_card("rtx-4090"), total_bytes=2 * 2**30)
    found = rehearse([tiny(method="full", batch_size=64, seq_len=4096), tiny(), tiny()], small, jobs=1)
    large, fits = next(found), next(found)
    found.close()  # type: ignore[attr-defined]
    assert _workers() == []
    assert large.outcome == "oom"
    assert large.phase in ("forward", "backward")
    assert "out of memory" in large.error
    assert fits.outcome == "ok"
    assert fits.process_bytes is not None
    assert fits.reserved_peak_bytes == fits.process_bytes - context_bytes(small)


def _workers() -> list[int]:
    """Return this process's children that are workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"whichlora.rehearse.worker" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found


def test_a_worker_that_is_killed_is_replaced() -> None:
    """Its workload has failed, by that signal; those before and after it are rehearsed, in their order."""
    killed = []

    def kill(rehearsal: Rehearsal) -> None:
        if not killed:
            killed.extend(_workers())
            os.kill(killed[0], signal.SIGKILL)

    asked = [tiny(id=str(number)) for number in range(4)]
    found = list(rehearse(asked, "rtx-4090", jobs=1, on_done=kill))
    assert len(killed) == 1
    assert [each.workload.id for each in found] == ["0", "1", "2", "3"]
    assert [each.outcome for each in found].count("failed") <= 1  # it dies before or after it takes the next one
    assert all("SIGKILL" in each.error for each in found if each.outcome == "failed")
    assert found[0].outcome == found[2].outcome == found[3].outcome == "ok"
    assert _workers() == []


def test_a_worker_that_takes_too_long_is_given_up() -> None:
    """A workload beyond its time has failed and says so; nothing of it runs on."""
    (late,) = rehearse([tiny()], "rtx-4090", timeout_s=0.01)
    assert late.outcome == "failed"
    assert "0.01 s" in late.error
    assert _workers() == []


def test_what_cannot_run_is_refused_before_anything_starts() -> None:
    """Unknown names, trained quantised weights, generation of another task, bad settings."""
    for workload, kind in (
        (tiny(method="lorra"), UnknownName),
        (tiny(optimizer="adam"), UnknownName),
        (tiny(quantization="int3"), UnknownName),
        (tiny(method="full", quantization="nf4"), Unsupported),
        (tiny(phase="generate", task="seq-cls"), Unsupported),
    ):
        with pytest.raises(kind):
            rehearse([workload], "rtx-4090")
    for settings in ({"jobs": 0}, {"timeout_s": 0}):
        with pytest.raises(BadValue):
            rehearse([tiny()], "rtx-4090", **settings)  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        rehearse([tiny()], "rtx-9999")
