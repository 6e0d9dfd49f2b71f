"""Where the timeline of a workload and its real allocation trace part: both as lists of allocations and releases."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whichlora.nulldevice import environment
from whichlora.rehearse.cards import find_card
from whichlora.rehearse.stacks import OtherStack, make_stack
from whichlora_estimators.families import find_family
from whichlora_estimators.stack import NEWEST_STACK, stack_of
from whichlora_estimators.timeline import Timeline, lay
from whichlora_estimators.workload import Workload, workload_from_json

#: The phase of a rehearsal that a segment of the timeline belongs to.
PHASES = {
    "optimizer state": "optimizer",
    "optimizer step": "optimizer",
    "zero grad": "optimizer",
    "clipping": "optimizer",
}
Event = tuple[int, str]  # bytes, negative for a release, and where it comes from


def trace_diff(
    fields: Mapping[str, Any], *, layers: int | None, smallest_bytes: int, step: int, hunks: int, stack: str = ""
) -> str:
    """Return the first places where a step (1 is the first one) differs, releases in a row taken in any order.

    `stack` are requirements of other releases (`whichlora rehearse --stack`), under which both run then.
    """
    fields = {key: value for key, value in fields.items() if key not in ("truth", "versions")}
    workload = _shallow(workload_from_json(fields), layers)
    other = make_stack(stack) if stack else None
    known = stack_of(other.versions) if other else NEWEST_STACK
    real, ours = real_phases(workload, other), our_phases(lay(workload, stack=known))
    parts = []
    for name in [name for name in ours if name in real]:
        index = min(step, len(ours[name]), len(real[name])) - 1
        there, here = (_comparable(phases[name][index], smallest_bytes) for phases in (real, ours))
        parts.append(f"{name} {index + 1}: {_diff(there, here, hunks)}")
    return "\n".join(parts)


def _shallow(workload: Workload, layers: int | None) -> Workload:
    key = find_family(str(workload.config.get("model_type"))).layers_key
    return workload if layers is None else workload.with_(config={**workload.config, key: layers})


def real_phases(workload: Workload, other: OtherStack | None = None) -> dict[str, list[list[Event]]]:
    """Rehearse on the null device with PyTorch's memory history: events by phase, in the order of its occurrences."""
    python = other.python if other else Path(sys.executable)
    settings = {**os.environ, **environment(find_card("unlimited"), context_bytes=0, python=python)}
    settings["TORCH_SYMBOLIZE_MODE"] = "dladdr"
    if other:
        paths = [path for path in settings["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
        settings["PYTHONPATH"] = os.pathsep.join([str(other.packages), *paths])
    text = json.dumps({name: getattr(workload, name) for name in workload.__dataclass_fields__}, default=list)
    script = Path(__file__).with_name("trace_real.py")
    done = subprocess.run([python, script], input=text, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout)
    stops = [count for _, count in found["marks"][1:]] + [len(found["events"])]
    phases: dict[str, list[list[Event]]] = {}
    for (name, start), stop in zip(found["marks"], stops, strict=True):
        phases.setdefault(name, []).append([(size, label) for size, label in found["events"][start:stop]])
    return phases


def our_phases(timeline: Timeline) -> dict[str, list[list[Event]]]:
    """Return the timeline's events alike, each occurrence of a phase whole."""
    phases: dict[str, list[list[Event]]] = {}
    last = ""
    sizes, tags = timeline.tape.sizes, timeline.tape.tags
    for segment in timeline.order:
        name = PHASES.get(segment.label, segment.label.split()[0])
        if name != last or name in ("decode", "forward", "backward"):
            phases.setdefault(name, []).append([])
        last = name
        for event in timeline.tape.events[segment.first.event : segment.last.event]:
            index = event if event >= 0 else ~event
            size = sizes[index] if event >= 0 else -sizes[index]
            phases[name][-1].append((size, f"{segment.label}: {tags[index]}"))
    return phases


def _comparable(events: Sequence[Event], smallest_bytes: int) -> list[Event]:
    """Leave out what is small, and sort releases that follow each other."""
    kept: list[Event] = []
    releases: list[Event] = []
    for event in [event for event in events if abs(event[0]) >= smallest_bytes] + [(0, "")]:
        if event[0] < 0:
            releases.append(event)
            continue
        kept += sorted(releases)
        releases = []
        kept.append(event)
    return kept[:-1]


def _diff(real: Sequence[Event], ours: Sequence[Event], hunks: int) -> str:
    sizes = [[size for size, _ in events] for events in (real, ours)]
    if sizes[0] == sizes[1]:
        return f"equal, {len(real)} events"
    blocks = difflib.SequenceMatcher(None, sizes[0], sizes[1], autojunk=False).get_opcodes()
    lines = [f"{len(real)} real events, {len(ours)} of the timeline"]
    for kind, a, b, c, d in [block for block in blocks if block[0] != "equal"][:hunks]:
        lines.append(f"  {kind} at {a} (live {sum(sizes[0][:a]):,} there, {sum(sizes[1][:c]):,} here)")
        lines += [f"    = {size:>14,} {label}" for size, label in real[max(0, a - 2) : a]]
        lines += [f"    real {size:>11,} {label}" for size, label in real[a:b]]
        lines += [f"    ours {size:>11,} {label}" for size, label in ours[c:d]]
    return "\n".join(lines)
