"""Where the bytes are at the peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whichlora.rehearse import rehearse
from whichlora.rehearse.breakdown import BACKWARD, COMPONENTS, break_down, from_json, to_json
from whichlora.rehearse.icicle import nodes, write_icicle

from .conftest import tiny

MIB = 2**20


def event(action: str, addr: int, size: int, time_us: int, *frames: tuple[str, str]) -> dict[str, Any]:
    shown = [{"filename": file, "line": 7, "name": name} for file, name in frames]
    return {"action": action, "addr": addr, "size": size, "time_us": time_us, "frames": shown}


def test_the_peak_is_that_of_what_is_live_together() -> None:
    """Blocks freed before the peak are not there, an address may be used again, and loading does not count."""
    model = ("/x/model.py", "from_pretrained")
    freed = ("/x/torch/optim/optimizer.py", "zero_grad")
    events = [
        event("alloc", 1, 900, 1, model),
        event("free_requested", 1, 900, 2),
        event("free_completed", 1, 900, 2),
        event("alloc", 1, 512, 3, model),
        event("alloc", 2, 1000, 10),
        event("alloc", 3, 2048, 11, ("/x/torch/nn/modules/module.py", "_call_impl"), ("/x/train.py", "main")),
        event("free_requested", 2, 1000, 12, freed),
        event("free_completed", 2, 1000, 12),
    ]
    found = break_down(events, allocated_peak_bytes=4608, before_bytes=512, since_us=10)
    assert found.components == {
        "activations": 2048,
        "gradients": 1024,
        "weights": 512,
        "workspaces": 512,
        "allocator rounding": 512,
    }
    assert found.lines["activations", "/x/train.py:7 main"] == 2048
    assert from_json(to_json(found, stacks=True)) == found


@pytest.mark.stack
def test_components_are_what_the_model_says(tmp_path: Path) -> None:
    """All that is held sums up to the peak; weights, adapters and Adam's moments are as large as the counts say."""
    full = tiny(method="full", precision="fp32", batch_size=2)
    lora = tiny(batch_size=16, seq_len=256)
    decode = tiny(phase="generate", prefill_len=64, decode_len=2)
    found = list(rehearse([full, lora, decode], "rtx-4090", jobs=1, explain=True))
    for each in found:
        assert each.outcome == "ok", each.error
        assert each.breakdown
        assert sum(held.allocated_bytes for held in each.breakdown.held) == each.allocated_peak_bytes
        assert each.breakdown.components.keys() <= {
            *COMPONENTS, BACKWARD, "workspaces", "allocator rounding", "inputs and others"
        }  # fmt: skip
        assert nodes(each.breakdown)[()] == each.allocated_peak_bytes
    trained = [4 * (each.trainable_params or 0) for each in found]
    parts = [each.breakdown.components if each.breakdown else {} for each in found]
    assert parts[0]["weights"] == pytest.approx(trained[0], rel=0.02)
    assert parts[0]["optimizer state"] >= 2 * trained[0]
    assert parts[1]["adapters"] == pytest.approx(trained[1], rel=0.1)
    assert parts[1]["logits and loss"] >= 16 * 256 * 1000 * 4
    assert parts[2]["cache"] >= 2 * 2 * 64 * 256 * 2  # keys and values, layers, tokens, width, bytes
    page = tmp_path / "page.html"
    write_icicle([(each.workload.phase, each.breakdown) for each in found if each.breakdown], page)
    assert "modeling_llama.py" in page.read_text(encoding="utf-8")
