"""Where the bytes are at the peak."""

from __future__ import annotations

from typing import Any

from whichlora.rehearse.breakdown import break_down, from_json, to_json
from whichlora.rehearse.icicle import nodes


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
    assert nodes(found)[()] == sum(held.allocated_bytes for held in found.held) == 4608
    assert nodes(found)["activations",] == 2048
