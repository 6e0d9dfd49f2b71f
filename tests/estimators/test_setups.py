"""Setups and options against rehearsals, and laws over the registries that they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.errors import WhichloraError
from whichlora_estimators.families import all_families
from whichlora_estimators.methods import all_methods
from whichlora_estimators.methods.adalora import TARGETS as ADALORA_TARGETS
from whichlora_estimators.methods.ia3 import TARGETS as IA3_TARGETS
from whichlora_estimators.methods.vera import TARGETS as VERA_TARGETS
from whichlora_estimators.optimizers import OPTIMIZERS
from whichlora_estimators.tape import BF16, FP32, Tape, Tensor
from whichlora_estimators.timeline import lay
from whichlora_estimators.workload import Workload

from .golden import check_golden, golden_lines

SETUPS = Path(__file__).with_name("golden_setups.jsonl")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def small(**setup: Any) -> Workload:
    return Workload(model="small", config=LLAMA, **{"rank": 4, "seq_len": 96, "batch_size": 2, **setup})


def allocated(workload: Workload) -> int:
    timeline = lay(workload)
    sizes = timeline.tape.sizes
    live = highest = 0
    for event in timeline.events():
        live += sizes[event] if event >= 0 else -sizes[~event]
        highest = max(live, highest)
    return highest


def test_golden_setups() -> None:
    """Every option takes what a rehearsal takes: allocated peaks within 0.3%, reserved ones within 3%."""
    check_golden(SETUPS, tolerance=0.003, reserved_tolerance=0.03)


def test_every_option_has_golden_cases() -> None:
    """An option without evidence is a mistake (the flash-attn library cannot be rehearsed without a card)."""
    lines = golden_lines(SETUPS)
    for name in ("modules_to_save", "bias", "rank_pattern", "accumulation", "clip_grad_norm", "reentrant", "cache"):
        assert any(line.get(name) for line in lines), name
    assert any(not line.get("output_kept", True) for line in lines)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_more_trained_weights_never_take_less_state(optimizer: str) -> None:
    """The state of an optimizer grows with what is trained, and its step leaves nothing behind."""
    states = []
    for width in (8, 100, 300, 600):
        tape = Tape()
        weights = [tape.new((width, 500), FP32), tape.new((width,), FP32)]
        state = OPTIMIZERS[optimizer].start(weights)
        states.append(sum(tensor.bytes for tensor in state))
        before = len(tape.events)
        OPTIMIZERS[optimizer].step(weights)
        moved = tape.events[before:]
        assert sorted(event for event in moved if event >= 0) == sorted(~event for event in moved if event < 0)
    assert states == sorted(states) or optimizer.startswith("paged")


@pytest.mark.stack
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-loop", "sgd", "sgd-momentum", "adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_that_of_the_real_optimizer(optimizer: str, dtype: str) -> None:
    """After a step on the CPU, the real optimizer's tensors have as many bytes (but for counts of steps)."""
    import torch

    from whichlora.rehearse.adapters import OPTIMIZERS as REAL

    shapes = [(30, 20), (64,), (5, 7)]
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for shape in shapes]
    real = REAL[optimizer](weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    real.step()
    tensors = [v for state in real.state.values() for k, v in state.items() if torch.is_tensor(v) and k != "step"]
    tensors = [tensor for tensor in tensors if tensor.dim()]
    tape = Tape()
    ours = [tape.new(shape, FP32 if dtype == "float32" else BF16) for shape in shapes]
    state = OPTIMIZERS[optimizer].start(ours)
    assert sum(t.bytes for t in state) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("clipped", [None, 1.0])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_adds_no_more_than_gradients(method: str, clipped: float | None) -> None:
    """More passes before a step never take less, and twice as many no more than two: gradients are summed in place."""
    once, twice, often = (
        allocated(small(method=method, accumulation=count, clip_grad_norm=clipped)) for count in (1, 2, 5)
    )
    assert once <= twice == often


def test_reentrant_checkpointing_frees_everything() -> None:
    """After a step with reentrant checkpoints, what is live is what was live before, optimizer state and workspaces."""
    timeline = lay(small(checkpointing=True, reentrant=True, accumulation=2))
    events = timeline.events()
    live = {index for index in events if index >= 0} - {~index for index in events if index < 0}
    before = set(timeline.tape.events[: timeline.setup.last.event])
    assert {timeline.tape.tags[i] for i in live - before} <= {"optimizer state", "workspaces"}


@pytest.mark.parametrize("precision", ["bf16-true", "fp32"])
def test_the_output_is_let_go_of_before_backward(precision: str) -> None:
    """Where the loss alone is kept, the peak is lower by the logits that the head returned, if backward has it."""
    setup = small(precision=precision, batch_size=8, seq_len=512, method="full", optimizer="sgd")
    width = 4 if precision == "fp32" else 2
    freed = allocated(setup) - allocated(setup.with_(output_kept=False))
    assert freed == width * 8 * 512 * setup.config["vocab_size"]


def test_a_static_cache_does_not_grow() -> None:
    """What a token takes is the same for the first and for the last one, where room was made for all of them."""
    setup = small(phase="generate", cache="static", prefill_len=50, decode_len=60)
    timeline = lay(setup)
    sizes, tape = timeline.tape.sizes, timeline.tape
    decoded = [segment for segment in timeline.order if segment.label.startswith("decode")]
    first, last = (
        [sizes[e] for e in tape.events[s.first.event : s.last.event] if e >= 0 and tape.tags[e] == "KV cache"]
        for s in (decoded[0], decoded[-1])
    )
    assert first == last


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_flash_attention_without_padding_is_sdpa(attention: str) -> None:
    """The library's kernel is the one that PyTorch has from it."""
    assert allocated(small(attention=attention)) == allocated(small())


def test_flash_attention_takes_no_fp32() -> None:
    """The library refuses it, and so does an estimate."""
    with pytest.raises(WhichloraError, match="fp32"):
        lay(small(attention="flash_attention_2", precision="fp32"))


def test_a_pattern_is_a_regular_expression_for_whole_names() -> None:
    """Layers 0 and 2's queries alone are adapted, each with the rank that its pattern gives."""
    workload = small(targets=r".*\.(0|2)\.self_attn\.q_proj", rank_pattern={r"layers\.2\..*": 16})
    assert lay(workload).trainable_params == 2 * 256 * 4 + 2 * 256 * 16


def test_what_no_layer_is_called_is_an_error() -> None:
    """Targets and modules that the model does not have are told, as far as PEFT tells them."""
    for setup in ({"targets": ("c_attn",)}, {"targets": r".*\.c_attn"}, {"modules_to_save": ("wte",)}):
        with pytest.raises(WhichloraError):
            lay(small(**setup))
    assert lay(small(targets=("q_proj", "c_attn"))).trainable_params == lay(small(targets=("q_proj",))).trainable_params


@pytest.mark.stack
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "vera"])
def test_default_targets_are_those_of_peft(method: str) -> None:
    """What PEFT adapts by itself, for every architecture that has a recipe, is what we take."""
    from peft.utils import constants

    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING")
    for name, recipe in all_families().items():
        ours: dict[str, tuple[str, ...]] = {
            "lora": recipe.default_targets,
            "adalora": ADALORA_TARGETS.get(name, recipe.default_targets),
            "vera": VERA_TARGETS.get(name, recipe.default_targets),
            "ia3": IA3_TARGETS.get(name, ((), ""))[0],
        }
        assert set(ours[method]) == set(table.get(name, ())), name
    if method == "ia3":
        inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        assert {name: [last] if last else [] for name, (_, last) in IA3_TARGETS.items()}.items() <= inner.items()


@pytest.mark.stack
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(64, 64), (300, 128), (1000, 192)])
@pytest.mark.parametrize("double", [True, False])
def test_quantized_weights_are_as_large_as_those_of_bitsandbytes(
    quantization: str, shape: tuple[int, int], double: bool
) -> None:
    """Codes and scales of a layer have the bytes of the real tensors, quantized on the CPU."""
    import torch
    from bitsandbytes import functional

    weight = torch.randn(shape)
    if quantization == "int8":
        real = [torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float32)]
    else:
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=quantization, compress_statistics=double
        )
        real = [packed, state.absmax, state.code]
        real += [state.offset, state.state2.absmax, state.state2.code] if double else []
    found = sum(tensor.bytes for tensor in _stored(quantization, shape, double=double))
    assert found == sum(tensor.numel() * tensor.element_size() for tensor in real)


def _stored(quantization: str, shape: tuple[int, int], *, double: bool) -> Iterator[Tensor]:
    from whichlora_estimators.layers import Build
    from whichlora_estimators.quantization import find_quantization

    build = Build(Tape(), BF16, trainable=False)
    layer: Any = find_quantization(quantization, double=double)(build, "layer", shape[1], shape[0], False)
    yield layer.packed
    yield from layer.scales if isinstance(layer.scales, list) else [layer.scales]


def test_workloads_of_the_golden_files_have_no_default_spelled_out_wrongly() -> None:
    """Every golden line is a workload: a misspelt option would be an error, not a default."""
    for line in golden_lines(SETUPS):
        assert json.dumps(line["config"])
        assert line["method"] in all_methods()
