"""Inference of encoder-decoders, and of what reads a text in one pass, against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.estimate import estimate
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.scaled import Scaled
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import GENERATED, Workload, workload_from_json

from ..golden import allocated_peak_bytes, check_golden, golden_lines

CASES = Path(__file__).with_name("golden_inference.jsonl")
CARD = find_gpu("a100-sxm-80gb")
WORKLOADS = [workload_from_json(line) for line in golden_lines(CASES)]
ANSWERING = [workload for workload in WORKLOADS if workload.task == "seq2seq"]
READING = [workload for workload in WORKLOADS if workload.task not in GENERATED and not workload.previous_kept]
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": 300,
}
SEQ2SEQ = Workload(model="t5", config=T5, task="seq2seq", phase="generate", batch_size=2, prefill_len=40, decode_len=20)


def named(workload: Workload) -> str:
    return workload.id


def decoding(workload: Workload) -> list[object]:
    """Return what is launched while tokens are decoded."""
    timeline = lay(workload)
    steps = [segment for segment in timeline.order if segment.label.startswith("decode")]
    return [timeline.tape.kernels[step.first.kernel : step.last.kernel] for step in steps]


def cached(timeline: Timeline) -> list[int]:
    """Return the bytes of every allocation for a cache."""
    tape = timeline.tape
    return [size for size, tag in zip(tape.sizes, tape.tags, strict=True) if tag == "KV cache"]


def test_golden_cases() -> None:
    """Allocated and reserved peaks are within 0.1% of what the null device measured."""
    check_golden(CASES, tolerance=0.001, reserved_tolerance=0.001)


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_bytes_never_fall_as_batch_or_text_grow(workload: Workload) -> None:
    """A larger batch and a longer text take at least as much memory."""
    for field, sizes in (("batch_size", (1, 2, 3, 8)), ("prefill_len", (16, 64, 128, 256))):
        peaks = [allocated_peak_bytes(lay(workload.with_(**{field: size}))) for size in sizes]
        assert peaks == sorted(peaks)


def test_an_encoder_runs_once() -> None:
    """What is launched for a token does not change with the layers of the encoder."""
    deeper = SEQ2SEQ.with_(config={**T5, "num_layers": 9})
    assert decoding(deeper) == decoding(SEQ2SEQ) != []


@pytest.mark.parametrize("decode_len", [1, 2, 9])
def test_keys_of_the_text_are_made_once(decode_len: int) -> None:
    """Caches hold the text's keys and values once a layer; those of the answer are copied for every token."""
    token_bytes = 2 * 2 * 4 * 16  # batch 2, bf16, 4 heads of 16
    grown = cached(lay(SEQ2SEQ.with_(decode_len=decode_len)))
    text = [size for size in grown if size == 40 * token_bytes]
    answer = [size for size in grown if size != 40 * token_bytes]
    assert len(text) == 2 * 3
    assert sorted(answer) == sorted(2 * 3 * [tokens * token_bytes for tokens in range(1, decode_len + 1)])


def test_a_static_cache_has_room_for_text_and_answer() -> None:
    """It is allocated once, whatever is decoded into it, beside numbers of places."""
    token_bytes = 2 * 2 * 4 * 16
    held = [size for size in cached(lay(SEQ2SEQ.with_(cache="static"))) if size >= 20 * token_bytes]
    assert sorted(held) == [20 * token_bytes] * 6 + [40 * token_bytes] * 6


@pytest.mark.parametrize("workload", READING, ids=named)
def test_a_classifier_decodes_nothing(workload: Workload) -> None:
    """Nothing comes behind the one pass, however many tokens and whatever cache are asked for."""
    once = lay(workload)
    assert [segment.label for segment in once.order] == ["prefill"]
    more = lay(workload.with_(decode_len=50, cache="static"))
    assert (more.tape.sizes, more.events()) == (once.tape.sizes, once.events())


def test_loaded_models_in_fp16_keep_some_weights_in_fp32() -> None:
    """The last layer of each MLP of T5, where the model is loaded to infer; what trains is made in fp16 throughout."""
    wide = [p for p in lay(SEQ2SEQ.with_(precision="fp16-true")).parameters if p.tensor.dtype.bytes == 4]
    assert [p.name.rpartition(".wo.")[2] for p in wide] == ["weight"] * (4 + 3)
    trained = lay(SEQ2SEQ.with_(phase="train", precision="fp16-true", method="full", seq_len=16)).parameters
    assert {p.tensor.dtype.bytes for p in trained} == {2}


@pytest.mark.parametrize("workload", [ANSWERING[1], ANSWERING[2], READING[0], READING[4]], ids=named)
def test_searches_find_what_whole_timelines_do(workload: Workload) -> None:
    """Short timelines at two batches give peak and times of any batch."""
    scaled = Scaled(workload, CARD)
    for batch in (16, 64, 200):
        found = estimate(workload.with_(batch_size=batch), CARD)
        assert scaled.allocated_peak_bytes(batch) == pytest.approx(found.peak.live_bytes, rel=0.01)
        assert scaled.times(batch, CARD).prefill_s == pytest.approx(found.times.prefill_s, rel=0.05)
        assert (scaled.times(batch, CARD).decode_s_per_token is None) == (found.times.decode_s_per_token is None)


@pytest.mark.parametrize("workload", READING, ids=named)
def test_an_output_that_is_held_takes_what_it_is(workload: Workload) -> None:
    """A pass beside the output of the one before takes that much more: all logits, and a cache where it is returned."""
    held = lay(workload.with_(previous_kept=True))
    assert [segment.label for segment in held.order] == ["prefill", "prefill again"]
    more = allocated_peak_bytes(held) - allocated_peak_bytes(lay(workload))
    assert more >= 0
    if workload.task == "masked-lm":
        element_bytes = 4 if workload.precision == "fp32" else 2
        logits_bytes = workload.batch_size * workload.prefill_len * int(workload.config["vocab_size"]) * element_bytes
        assert more == pytest.approx(logits_bytes, rel=0.05)


def test_an_output_of_an_answer_is_not_held() -> None:
    """What `generate` returns are tokens: the field means nothing there, nor where a causal model decodes."""
    causal = WORKLOADS[-1].with_(decode_len=3, previous_kept=False)
    for workload in (SEQ2SEQ, SEQ2SEQ.with_(decode_len=1), causal):
        one, other = lay(workload), lay(workload.with_(previous_kept=True))
        assert (one.tape.sizes, one.events()) == (other.tape.sizes, other.events())
    assert lay(causal.with_(decode_len=1, previous_kept=True)).order[1].label == "prefill again"
