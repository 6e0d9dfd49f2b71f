"""Where the bytes are at the peak: by component and by source line, read from PyTorch's own memory history.

The history tells of every allocation and every release with the Python stack that made it. Components are told apart by
these stacks. Autograd's thread has none; of what it allocates, gradients are known by who frees them (`zero_grad`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPONENTS = ("weights", "adapters", "gradients", "optimizer state", "activations", "logits and loss", "cache")
WORKSPACES, BACKWARD, ROUNDING = "workspaces", "backward temporaries", "allocator rounding"
BLOCK_BYTES = 512  # PyTorch rounds every allocation up to these (c10/core/AllocatorConfig.h, kMinBlockSize)
_LARGE_BYTES = 2**20  # the loss allocates small things too
_NO_STACK = "autograd's backward (no Python stack)"

# The first rule of which a stack has a frame decides: (component, parts of file names, names of functions).
_RULES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("optimizer state", ("/torch/optim/", "/bitsandbytes/optim/", "/transformers/optimization.py"), ()),
    ("cache", ("/transformers/cache_utils.py",), ()),
    ("logits and loss", ("/transformers/loss/",), ("cross_entropy", "nll_loss")),
    ("adapters", (), ("get_peft_model", "add_adapter", "inject_adapter", "load_adapter")),
    ("weights", (), ("from_pretrained", "from_config", "build_model", "prepare_model_for_kbit_training", "_apply")),
    ("activations", (), ("_call_impl", "checkpoint", "recompute_fn", "apply")),
)
_NOT_A_SOURCE = (
    "/whichlora/rehearse/",
    "/torch/",
    "/contextlib.py",
    "/functools.py",
    "/bitsandbytes/functional.py",
    "/accelerate/hooks.py",
)

Frame = tuple[str, int, str]  # (file, line, function)
Stack = tuple[Frame, ...]  # innermost first


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Blocks that one stack holds at the peak, of one component; `line` is its innermost frame outside of PyTorch."""

    component: str
    line: str
    stack: tuple[str, ...]  # outermost first
    allocated_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What was live at the allocated peak; the bytes of all that is held sum up to `allocated_bytes`."""

    allocated_bytes: int
    held: tuple[Held, ...]

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component, most first."""
        return _sums((held.component, held.allocated_bytes) for held in self.held)

    @property
    def lines(self) -> dict[tuple[str, str], int]:
        """Bytes by (component, source line), most first."""
        return _sums(((held.component, held.line), held.allocated_bytes) for held in self.held)


def break_down(
    events: Sequence[Mapping[str, Any]],
    *,
    allocated_peak_bytes: int,
    before_bytes: int = 0,
    since_us: int = 0,
    logit_bytes: Iterable[int] = (),
    workspace_bytes: int = 0,
) -> Breakdown:
    """Find the peak of a device trace (`_snapshot()["device_traces"][0]`) from `since_us` on, and say what is live.

    `before_bytes` were allocated before the history began; `logit_bytes` are the sizes that only logits have (where
    nobody knows, those of what the loss allocates, and half of them), `workspace_bytes` that which only a workspace has.
    """
    live = _live_at_peak(events, since_us)
    freed_by = _releases(events)
    known = frozenset(logit_bytes) or _sizes_of_losses(events)
    sums: dict[tuple[str, Stack], list[int]] = {}
    for place in live:
        event = events[place]
        stack = _stack(event)
        name = component(stack, freed_by.get(place, ()), is_logits=event["size"] in known)
        if event["size"] == workspace_bytes:
            name, stack = WORKSPACES, ()
        total = sums.setdefault((name, stack), [0, 0])
        total[0] += -(-event["size"] // BLOCK_BYTES) * BLOCK_BYTES
        total[1] += 1
    held = [_held(name, stack, *total) for (name, stack), total in sums.items()]
    held.append(_held(WORKSPACES, (), before_bytes, 1))
    rest = allocated_peak_bytes - sum(each.allocated_bytes for each in held)
    held.append(_held(ROUNDING, (), rest, 1))
    held.sort(key=lambda each: -each.allocated_bytes)
    return Breakdown(allocated_bytes=allocated_peak_bytes, held=tuple(each for each in held if each.allocated_bytes))


def component(stack: Stack, freed_by: Stack, *, is_logits: bool = False) -> str:
    """Name what a block is for, by who allocated it and who freed it."""
    if any(name == "zero_grad" for _, _, name in freed_by):
        return "gradients"
    if is_logits:
        return "logits and loss"
    for name, files, functions in _RULES:
        if any(function in functions or any(part in file for part in files) for file, _, function in stack):
            return name
    return "inputs and others" if stack else BACKWARD


def to_json(breakdown: Breakdown, *, stacks: bool = False) -> dict[str, Any]:
    """Return the breakdown for machines: components, lines and, if asked for, whole stacks."""
    lines = [
        {"component": name, "line": line, "allocated_bytes": size} for (name, line), size in breakdown.lines.items()
    ]
    whole = [
        {"component": h.component, "stack": list(h.stack), "allocated_bytes": h.allocated_bytes, "blocks": h.blocks}
        for h in breakdown.held
    ]
    shown = {"allocated_bytes": breakdown.allocated_bytes, "components": breakdown.components, "lines": lines}
    return {**shown, "stacks": whole} if stacks else shown


def from_json(fields: Mapping[str, Any]) -> Breakdown:
    """Read what `to_json` writes with stacks."""
    held = (
        Held(
            component=each["component"],
            line=_source_line(each["stack"]) or each["component"],
            stack=tuple(each["stack"]),
            allocated_bytes=each["allocated_bytes"],
            blocks=each["blocks"],
        )
        for each in fields["stacks"]
    )
    return Breakdown(allocated_bytes=fields["allocated_bytes"], held=tuple(held))


def _live_at_peak(events: Sequence[Mapping[str, Any]], since_us: int) -> list[int]:
    """Return the places of the allocations that are live when most bytes are, from `since_us` on."""
    live = highest = 0
    end = len(events)
    for place, event in enumerate(events):
        if event["action"] == "free_completed":
            live -= event["size"]
        elif event["action"] == "alloc":
            live += event["size"]
            if live > highest and event["time_us"] >= since_us:
                highest, end = live, place + 1
    by_address: dict[int, int] = {}
    for place, event in enumerate(events[:end]):
        if event["action"] == "alloc":
            by_address[event["addr"]] = place
        elif event["action"] == "free_completed":
            by_address.pop(event["addr"], None)
    return list(by_address.values())


def _releases(events: Sequence[Mapping[str, Any]]) -> dict[int, Stack]:
    """Return who freed what, by the allocation's place."""
    by_address: dict[int, int] = {}
    found: dict[int, Stack] = {}
    for place, event in enumerate(events):
        if event["action"] == "alloc":
            by_address[event["addr"]] = place
        elif event["action"] == "free_requested" and event["addr"] in by_address:
            found[by_address.pop(event["addr"])] = _stack(event)
    return found


def _sizes_of_losses(events: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """Return the sizes of what the loss allocated, and of the 16-bit logits that it made them from."""
    large = (event for event in events if event["action"] == "alloc" and event["size"] >= _LARGE_BYTES)
    sizes = {event["size"] for event in large if component(_stack(event), ()) == "logits and loss"}
    return frozenset(sizes | {size // 2 for size in sizes})


def _stack(event: Mapping[str, Any]) -> Stack:
    return tuple((frame["filename"], frame["line"], frame["name"]) for frame in event["frames"])


def _held(name: str, stack: Stack, allocated_bytes: int, blocks: int) -> Held:
    shown = tuple(f"{_short(file)}:{line} {function}" for file, line, function in reversed(stack))
    if not shown and name not in (WORKSPACES, ROUNDING):
        shown = (_NO_STACK,)
    return Held(
        component=name,
        line=_source_line(shown) or name,
        stack=shown,
        allocated_bytes=allocated_bytes,
        blocks=blocks,
    )


def _source_line(stack: Sequence[str]) -> str:
    for frame in reversed(stack):
        if not any(part in f"/{frame}" for part in _NOT_A_SOURCE):
            return frame
    return stack[-1] if stack else ""


def _short(file: str) -> str:
    """Return a path from its package on."""
    for root in ("/site-packages/", "/dist-packages/"):
        if root in file:
            return file.rpartition(root)[2]
    return file


def _sums(sizes: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    sums: dict[Any, int] = {}
    for key, size in sizes:
        sums[key] = sums.get(key, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
