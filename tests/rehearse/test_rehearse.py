"""Rehearsals: bytes that are known, every method and optimizer, what the formula says of them, and what is kept.

Two workers run all of it: one as a library, from configs; one as its users run it, from checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from whichlora.api import make_workload
from whichlora.cli import main
from whichlora.rehearse import Rehearsal, rehearse
from whichlora.rehearse.adapters import METHODS, OPTIMIZERS
from whichlora.rehearse.breakdown import BACKWARD, COMPONENTS
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported
from whichlora_estimators.estimate import estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.methods import all_methods
from whichlora_estimators.models import load_model
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import open_store, workload_to_json

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
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    *({"quantization": name, "double_quantization": False} for name in ("nf4", "fp4", "int8")),
    *({"precision": name, "checkpointing": True} for name in ("fp16-true", "bf16-mixed", "fp16-mixed")),
)
WORKSPACES_BYTES = 2 * (8 * 2**20 + 2**17)  # those of cuBLAS on 8.0, which a process that has trained has
# What is loaded: quantisations and a generation, and what is told of the bytes of the last three.
LOADED = (
    *(tiny(id=name, quantization=name, precision="bf16-true") for name in ("none", "nf4", "int8")),
    tiny(id="generation", phase="generate", prefill_len=32, decode_len=4),
    tiny(id="whole", method="full", precision="fp32", batch_size=2),
    tiny(id="adapted", batch_size=16, seq_len=256),
    tiny(id="decoded", phase="generate", prefill_len=64, decode_len=2),
)


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
    """Return small workloads: the methods without a formula, every optimizer, on every quantization and precision."""
    assert len(OPTIMIZERS) >= len(VARIATIONS)
    asked = [tiny(id=name, method=name) for name in METHODS if name not in all_methods()]
    asked += [
        tiny(
            id=f"{name} steps" if name in METHODS else name,
            optimizer=name,
            **setup | ({"method": name} if name in METHODS else {}),
        )
        for name, setup in zip(OPTIMIZERS, cycle(VARIATIONS), strict=False)
    ]
    return [*asked, tiny(id="paged-full", method="full", optimizer="paged-adamw", precision="fp32")]


@pytest.fixture(scope="module")
def seen() -> Mapping[str, Rehearsal]:
    """Return what one worker saw of all that this module asks, by id."""
    golden = [workload_from_json(line) for line in golden_lines(*GOLDEN_IDS)]
    falcon = Workload(id="falcon", model="falcon", config=FALCON, quantization="nf4", seq_len=64)
    asked = [*SANDWICH, *golden, *methods(), *setups(), *LOADED[:4], falcon, LAST]
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


def test_a_process_that_only_generates_has_one_workspace(seen: Mapping[str, Rehearsal]) -> None:
    """A generation in a process of its own takes what the formula says; after training, the other thread's workspace more."""
    workload = LOADED[3]
    (fresh,), trained = rehearse([workload], "unlimited", jobs=1, fresh=True), seen[workload.id]
    assert (trained.allocated_peak_bytes or 0) - (fresh.allocated_peak_bytes or 0) == WORKSPACES_BYTES // 2
    card = find_gpu("a100-sxm-80gb")
    assert fresh.allocated_peak_bytes == pytest.approx(estimate(workload, card).allocated_peak_bytes, rel=1e-3)


def test_layers_that_loading_leaves_alone_are_left_alone(seen: Mapping[str, Rehearsal]) -> None:
    """Since Transformers 5 Falcon's linear layers, of a class of their own, stay in 16 bit under nf4."""
    if int(metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("before, they were quantised")
    linear = 2 * (512 * (512 + 2 * 64) + 512 * 512 + 2 * 512 * 2048)
    assert seen["falcon"].outcome == "ok", seen["falcon"].error
    assert (seen["falcon"].weights_bytes or 0) > 2 * (linear + 999 * 512)


def whichlora(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["rehearse", "--gpu", "a100-sxm-80gb", "--json", "--offline", *arguments])


def gpt2(batch_size: int) -> Workload:
    """Return QLoRA of GPT-2, as the options in `test_models_are_rehearsed_with_the_options_of_estimate` spell it."""
    setup = make_workload(load_model("gpt2", offline=True), method="lora", quantization="nf4", checkpointing=False)
    return setup.with_(seq_len=2048, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a workload file was answered with, by the ids of its lines; its progress; and what it left behind."""

    lines: Mapping[str, dict[str, Any]]
    progress: str
    store: Path
    page: Path
    file: Path


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Return the answers to a file whose models are loaded from checkpoints, with where their bytes are."""
    folder = tmp_path_factory.mktemp("answered")
    store, page, file = folder / "profiles.duckdb", folder / "page.html", folder / "workloads.jsonl"
    asked = [*LOADED, gpt2(1).with_(id="small"), gpt2(256).with_(id="large"), SANDWICH[1]]
    refused = {**workload_to_json(asked[0]), "id": "refused", "method": "lorra"}
    lines = [workload_to_json(asked[0]), refused, *map(workload_to_json, asked[1:])]
    file.write_text("\n".join(map(json.dumps, lines)))
    shown = ("--load", "checkpoint", "--jobs", "1", "--explain", "--html", str(page))
    done = whichlora("--workloads", str(file), "--db", str(store), *shown)
    assert done.exit_code == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["id"] for each in found] == [line["id"] for line in lines]
    return Answered(lines={each["id"]: each for each in found}, progress=done.stderr, store=store, page=page, file=file)


def test_a_workload_file_is_answered_line_by_line(answered: Answered) -> None:
    """Each line gets bytes, evidence and versions, or why there are none; what was asked for is told on stderr."""
    assert "lorra" in answered.lines["refused"]["error"]
    assert "no_such_layer" in answered.lines["broken"]["error"]
    assert answered.lines["large"]["oom"]
    assert answered.lines["large"]["phase"] in ("forward", "backward")
    assert "out of memory" in answered.progress
    assert f"[{len(LOADED) + 3}/{len(LOADED) + 3}]" in answered.progress
    for each in (*LOADED, gpt2(1).with_(id="small")):
        found = answered.lines[each.id]
        assert (found["outcome"], found["gpu"], found["evidence"]) == ("ok", "a100-sxm-80gb", "rehearsed")
        assert found["versions"].keys() >= {"torch", "transformers", "peft", "cuda"}
        assert 0 < found["allocated_peak_bytes"] <= found["reserved_peak_bytes"] < found["process_bytes"]
    assert answered.lines["generation"]["trainable_params"] == 0
    assert list(answered.lines["generation"]["phases"]) == ["load", "prefill", "decode"]


def test_models_are_loaded_from_checkpoints(answered: Answered, seen: Mapping[str, Rehearsal]) -> None:
    """from_pretrained leaves the weights that the config says, of whatever quantisation; it trains and generates."""
    for workload in LOADED[:4]:
        loaded, made = answered.lines[workload.id], seen[workload.id]
        assert made.outcome == "ok", made.error
        assert loaded["trainable_params"] == made.trainable_params
        made_bytes = (made.weights_bytes or 0) - WORKSPACES_BYTES  # which are there before
        assert loaded["weights_bytes"] == pytest.approx(made_bytes, rel=0.02, abs=2**20)
        peak = made.allocated_peak_bytes or 0
        assert loaded["allocated_peak_bytes"] == pytest.approx(peak, abs=0.02 * peak + WORKSPACES_BYTES)


def test_components_are_what_the_model_says(answered: Answered) -> None:
    """All that is held sums up to the peak; weights, adapters and Adam's moments are as large as the counts say."""
    whole, adapted, decoded = (answered.lines[name] for name in ("whole", "adapted", "decoded"))
    for each in (whole, adapted, decoded):
        parts = each["breakdown"]["components"]
        assert sum(parts.values()) == each["allocated_peak_bytes"]
        assert sum(line["allocated_bytes"] for line in each["breakdown"]["lines"]) == each["allocated_peak_bytes"]
        assert parts.keys() <= {*COMPONENTS, BACKWARD, "workspaces", "allocator rounding", "inputs and others"}
    trained = 4 * whole["trainable_params"]
    assert whole["breakdown"]["components"]["weights"] == pytest.approx(trained, rel=0.02)
    assert whole["breakdown"]["components"]["optimizer state"] >= 2 * trained
    adapters = adapted["breakdown"]["components"]["adapters"]
    assert adapters == pytest.approx(4 * adapted["trainable_params"], rel=0.1)
    assert adapted["breakdown"]["components"]["logits and loss"] >= 16 * 256 * 1000 * 4
    assert decoded["breakdown"]["components"]["cache"] >= 2 * 2 * 64 * 256 * 2  # k and v, layers, tokens, width, bytes
    assert adapted["breakdown"]["components"]["workspaces"] == WORKSPACES_BYTES
    assert decoded["breakdown"]["components"]["workspaces"] == WORKSPACES_BYTES // 2
    assert "modeling_llama.py" in answered.page.read_text(encoding="utf-8")


def test_what_is_stored_is_not_run_again(answered: Answered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no worker can start, all is answered from the store as before, out of memory too; but not what failed."""
    kept = open_store(answered.store).query()
    assert {each.outcome for each in kept} == {"ok", "oom", "failed"}
    assert all((each.device, each.environment.gpu) == ("null", "a100-sxm-80gb") for each in kept)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    again = ("--load", "checkpoint", "--db", str(answered.store), "--workloads")
    without = answered.file.with_name("without.jsonl")
    *lines, broken = answered.file.read_text().splitlines()
    without.write_text("\n".join(lines))
    done = whichlora(*again, str(without))
    assert done.exit_code == 0, done.stderr
    expected = [
        {name: value for name, value in each.items() if name != "breakdown"} for each in answered.lines.values()
    ]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected[:-1]
    without.write_text(broken)
    done = whichlora(*again, str(without))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "a worker process did not start" in done.stderr


def test_models_are_rehearsed_with_the_options_of_estimate(answered: Answered, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each combination, which is the workload that a file would spell: the store has it."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    setup = ("--method", "qlora", "--batch-size", "1", "--batch-size", "256", "--seq-len", "2048", "--no-checkpointing")
    done = whichlora("gpt2", *setup, "--db", str(answered.store))
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    fits, large = answer["rehearsals"]
    assert fits["allocated_peak_bytes"] == answered.lines["small"]["allocated_peak_bytes"]
    assert (large["outcome"], large["oom"], large["phase"]) == ("oom", True, answered.lines["large"]["phase"])


def test_what_cannot_run_is_refused_before_anything_starts() -> None:
    """Unknown names, trained quantised weights, bad settings."""
    for workload, kind in (
        (tiny(method="lorra"), UnknownName),
        (tiny(optimizer="adam"), UnknownName),
        (tiny(quantization="int3"), UnknownName),
        (tiny(method="full", quantization="nf4"), Unsupported),
    ):
        with pytest.raises(kind):
            rehearse([workload], "rtx-4090")
    wrong: tuple[dict[str, Any], ...] = ({"jobs": 0}, {"timeout_s": 0}, {"load": "download"})
    for settings, refusal in zip(wrong, (BadValue, BadValue, UnknownName), strict=True):
        with pytest.raises(refusal):
            rehearse([tiny()], "rtx-4090", **settings)
    with pytest.raises(UnknownName):
        rehearse([tiny()], "rtx-9999")
