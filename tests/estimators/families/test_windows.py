"""Llama, Mistral, Qwen2 and Qwen3 with windows and scaled rotation against the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from whichlora_estimators.families import all_families
from whichlora_estimators.families.windows import WindowedDecoder
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload

from ..golden import allocated_peak_bytes, check_golden, check_parameters

WINDOW = 37
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "sliding_window_pattern": 4,
}
FAMILIES = sorted(name for name, recipe in all_families().items() if issubclass(recipe, WindowedDecoder))
CASES = Path(__file__).with_name("golden_windows.jsonl")


def test_golden_cases() -> None:
    """Allocated peaks are within 0.3% of what the null device measured."""
    check_golden(CASES, tolerance=0.003)


@pytest.mark.stack
def test_parameters_are_those_of_the_real_model() -> None:
    """Every weight has the shape that Transformers gives it, for every config of the golden cases."""
    check_parameters(CASES)


def small(family: str, window: int | None, **setup: object) -> Workload:
    config = {"model_type": family, **SMALL, "head_dim": 64, "sliding_window": window}
    return Workload(model=family, config=config, **setup)  # type: ignore[arg-type]


def trace(timeline: Timeline) -> tuple[list[int], list[int]]:
    return timeline.tape.sizes, timeline.tape.events


def test_families_with_windows_are_found() -> None:
    """The laws below hold for the architectures that Transformers gives windows."""
    assert {"gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "starcoder2"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_longer_than_the_samples_changes_nothing(family: str) -> None:
    """While samples are shorter than the window, which window it is does not matter."""
    near, far = (lay(small(family, window, seq_len=WINDOW - 1)) for window in (WINDOW, 8 * WINDOW))
    assert trace(near) == trace(far)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_samples_as_long_as_the_window_need_a_mask(family: str) -> None:
    """From the window's length on, flash attention gives way to a kernel that takes a mask of T x T flags."""
    flags = WINDOW * WINDOW
    short, long = (lay(small(family, window, seq_len=WINDOW)) for window in (WINDOW + 1, WINDOW))
    assert flags not in short.tape.sizes
    assert flags in long.tape.sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_window_is_none(family: str) -> None:
    """A config that says null has no window, whatever the default of its class is."""
    none, far = (lay(small(family, window, seq_len=2 * WINDOW)) for window in (None, 100 * WINDOW))
    assert allocated_peak_bytes(none) == allocated_peak_bytes(far)


@pytest.mark.parametrize("decode_len", [4, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_never_outgrows_the_window(family: str, decode_len: int) -> None:
    """Of layers that all see a window, the cache holds no more tokens at the end than the window has."""
    setup = {"phase": "generate", "prefill_len": 2 * WINDOW, "decode_len": decode_len}
    timeline = lay(small(family, WINDOW, **setup))
    events, tags = timeline.events(), timeline.tape.tags
    live = {event for event in events if event >= 0} - {~event for event in events if event < 0}
    token_bytes = 2 * 64 * 2  # heads, their width, bytes of bf16
    windowed = {"gemma2": 2, "qwen2_moe": 0}.get(family, 3)
    full = (3 - windowed) * 2 * (2 * WINDOW + decode_len - 1) * token_bytes
    held = sum(timeline.tape.sizes[index] for index in live if tags[index] == "KV cache")
    assert held == windowed * 2 * WINDOW * token_bytes + full
