"""Which 4-bit products read the packed weight, against bitsandbytes' own choice on every kind of card."""

from __future__ import annotations

import importlib
from random import Random

import pytest

from whichlora_estimators.gpus import all_gpus
from whichlora_estimators.packed import reads_packed
from whichlora_estimators.tape import BF16, FP16, FP32

from ..stack import needs

WIDTHS = (64, 128, 192, 256, 576, 640, 896, 1024, 1536, 2048, 2304, 2560, 3072, 4096, 5120, 8192, 11008, 14336, 28672)
ROWS = (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 23, 24, 32, 33, 48, 49, 64, 65, 96, 128, 129, 192, 256, 257, 320)


def cards() -> set[tuple[tuple[int, int], int]]:
    """Return what tells cards apart here, those of our data and some that it lacks."""
    ours = {(gpu.compute_capability, gpu.sm_count) for gpu in all_gpus()}
    return ours | {((8, 7), 16), ((11, 0), 20), ((12, 1), 48), ((7, 0), 80), ((8, 0), 108), ((9, 0), 78), ((8, 9), 24)}


@pytest.mark.stack
def test_the_choice_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal for every card, dtype and number of rows, over 100 shapes of weights each."""
    needs("torch", "bitsandbytes")
    torch, library = (importlib.import_module(name) for name in ("torch", "bitsandbytes.backends.cuda.ops"))
    choose, random = library._gemm_4bit_use_custom_cuda.__wrapped__, Random(7)
    wrong = []
    for capability, multiprocessors in sorted(cards()):
        monkeypatch.setattr(library, "_gpu_dispatch_props", lambda _, card=(multiprocessors, *capability): card)
        for _ in range(100):
            n, k = random.choice(WIDTHS), random.choice(WIDTHS)
            ours, theirs = random.choice([(BF16, torch.bfloat16), (FP16, torch.float16), (FP32, torch.float32)])
            for rows in (*ROWS, 320, 384, 385, 512, 513, 1536):
                expected = choose(0, theirs, rows, n, k)
                if reads_packed(rows, n, k, ours, capability, multiprocessors) != expected:
                    wrong.append((capability, multiprocessors, ours.name, rows, n, k, expected))
    assert not wrong, f"{len(wrong)} differ, first {wrong[:5]}"


def test_many_rows_and_odd_widths_are_dequantized() -> None:
    """More than 1,536 rows, and inputs that are no whole blocks, are no case for the packed weight."""
    assert reads_packed(4, 4096, 4096, BF16, (8, 0), 108)
    assert not reads_packed(1537, 64, 64, BF16, (8, 0), 108)
    assert not reads_packed(1, 4096, 4000, BF16, (8, 0), 108)
