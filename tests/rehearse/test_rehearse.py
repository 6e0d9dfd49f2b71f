"""Rehearsals as a library: bytes that are known, every method and optimizer, and what the formula says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import metadata

import pytest

from whichlora.rehearse import Rehearsal, rehearse
from whichlora.rehearse.adapters import METHODS, OPTIMIZERS
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_estimators.estimate import estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.methods import all_methods
from whichlora_estimators.workload import Workload, workload_from_json

from .conftest import golden_lines, tiny

pytestmark = pytest.mark.stack

# The versions that benchmarks/rehearsed.jsonl was made with.
STACK = {"torch": "2.14.1", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
# Full fine-tuning under autocast, nf4, generation without and with nf4, int8, an encoder, sequence to sequence.
GOLDEN_IDS = ("pub-006", "pub-010", "pub-038", "pub-013", "pub-088", "pub-025", "pub-020")
SHARED = {"num_hidden_layers": 3, "vocab_size": 4000, "tie_word_embeddings": False, "max_position_embeddings": 2048}
LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, **SHARED}
CONFIGS = (
    LLAMA,
    {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2},
    {"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **SHARED},
)
FALCON = {
    "model_type": "falcon",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 999,
}
SAME = tiny(quantization="nf4", optimizer="adamw-8bit")
SANDWICH = (
    SAME.with_(id="first"),
    dataclasses.replace(SAME, id="broken", targets=("no_such_layer",)),
    SAME.with_(id="between"),
)
LAST = SAME.with_(id="last")


def methods() -> list[Workload]:
    """Return one step of each method that has a formula, on three architectures and under quantisation in turn."""
    return [
        Workload(
            id=name,
            model="small",
            config=CONFIGS[number % len(CONFIGS)],
            method=name,
            rank=8,
            quantization="nf4" if number % 2 and name != "full" else "none",
            checkpointing=number % 3 == 1 and name != "prefix-tuning",  # PEFT refuses the two together
            batch_size=4,
            seq_len=512,
        )
        for number, name in enumerate(sorted(all_methods()))
    ]


def setups() -> list[Workload]:
    """Return small workloads: the methods without a formula, every optimizer, quantization and precision."""
    asked = [tiny(id=name, method=name) for name in METHODS if name not in all_methods()]
    asked += [tiny(id=name, optimizer=name) for name in OPTIMIZERS]
    asked += [tiny(id="paged-full", method="full", optimizer="paged-adamw", precision="fp32")]
    asked += [tiny(id=name, quantization=name, double_quantization=False) for name in ("nf4", "fp4", "int8")]
    asked += [tiny(id=name, precision=name, checkpointing=True) for name in ("fp16-true", "bf16-mixed", "fp16-mixed")]
    return asked


@pytest.fixture(scope="module")
def seen() -> Mapping[str, Rehearsal]:
    """Return what one worker saw of all that this module asks, by id."""
    golden = [workload_from_json(line) for line in golden_lines(*GOLDEN_IDS)]
    falcon = Workload(id="falcon", model="falcon", config=FALCON, quantization="nf4", seq_len=64)
    asked = [*SANDWICH, *golden, *methods(), *setups(), falcon, LAST]
    assert len({workload.id for workload in asked}) == len(asked)
    found = list(rehearse(asked, "unlimited", jobs=1))
    assert [each.workload for each in found] == asked
    return {each.workload.id: each for each in found}


def test_known_workloads_take_the_bytes_that_they_took(seen: Mapping[str, Rehearsal]) -> None:
    """Golden lines of every task and phase: allocated peaks within 0.1%, trained parameters equal."""
    installed = {name: metadata.version(name).partition("+")[0] for name in STACK}
    if installed != STACK:
        pytest.skip(f"the lines were made with {STACK}, installed are {installed}")
    for line in golden_lines(*GOLDEN_IDS):
        each, truth = seen[line["id"]], line["truth"]
        assert each.outcome == "ok", each.error
        assert each.allocated_peak_bytes == pytest.approx(truth["allocated_peak_bytes"], rel=1e-3), line["id"]
        assert each.reserved_peak_bytes == pytest.approx(truth["reserved_peak_bytes"], rel=0.02), line["id"]
        assert each.weights_bytes == pytest.approx(truth["weights_bytes"], rel=1e-3)
        assert each.trainable_params == truth.get("trainable_params", 0)
        assert each.versions.items() >= installed.items() or each.versions["torch"].startswith(STACK["torch"])


def test_every_method_takes_what_the_formula_says(seen: Mapping[str, Rehearsal]) -> None:
    """Trainable parameters are equal, allocated peaks within 1%, whatever the method."""
    card = find_gpu("a100-sxm-80gb")
    wrong = []
    for workload in methods():
        rehearsal, found = seen[workload.id], estimate(workload, card)
        assert rehearsal.outcome == "ok", rehearsal.error
        assert rehearsal.allocated_peak_bytes
        error = found.allocated_peak_bytes / rehearsal.allocated_peak_bytes - 1
        if found.trainable_params != rehearsal.trainable_params or abs(error) > 0.01:
            wrong.append((workload.id, found.trainable_params, rehearsal.trainable_params, error))
    assert not wrong


def test_every_optimizer_and_precision_trains(seen: Mapping[str, Rehearsal]) -> None:
    """Each name that is known runs three steps, phase by phase, and the totals are those of the steps."""
    for workload in setups():
        each = seen[workload.id]
        assert each.outcome == "ok", (workload.id, each.error)
        assert list(each.phases) == ["load", "forward", "backward", "optimizer"]
        assert each.allocated_peak_bytes == max(
            peak.allocated_peak_bytes or 0 for name, peak in each.phases.items() if name != "load"
        )
        assert (each.weights_bytes or 0) < (each.model_bytes or 0) < (each.allocated_peak_bytes or 0)
    moments = 2 * 4 * (seen["paged-full"].trainable_params or 0)
    assert 0.9 * moments < (seen["paged-full"].managed_peak_bytes or 0) < 3 * moments  # in pages of 2 MiB
    assert seen["adamw"].managed_peak_bytes == 0


def test_bytes_do_not_depend_on_what_ran_before(seen: Mapping[str, Rehearsal]) -> None:
    """One worker that runs a workload first, in between and last sees the same bytes, failures in between included."""
    assert seen["broken"].outcome == "failed"
    assert "no_such_layer" in seen["broken"].error
    assert seen["broken"].phase == "load"
    assert seen["first"].phases == seen["between"].phases
    first, last = (
        {name: peak.allocated_peak_bytes for name, peak in seen[id_].phases.items()} for id_ in ("first", "last")
    )
    assert first == last


def test_layers_that_loading_leaves_alone_are_left_alone(seen: Mapping[str, Rehearsal]) -> None:
    """Since Transformers 5 Falcon's linear layers, of a class of their own, stay in 16 bit under nf4."""
    if int(metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("before, they were quantised")
    linear = 2 * (512 * (512 + 2 * 64) + 512 * 512 + 2 * 512 * 2048)
    assert seen["falcon"].outcome == "ok", seen["falcon"].error
    assert (seen["falcon"].weights_bytes or 0) > 2 * (linear + 999 * 512)


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
    for settings, kind in (({"jobs": 0}, BadValue), ({"timeout_s": 0}, BadValue), ({"load": "download"}, UnknownName)):
        with pytest.raises(kind):
            rehearse([tiny()], "rtx-4090", **settings)  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        rehearse([tiny()], "rtx-9999")
