"""Launches of a deep model's step in a row, from those of a shallow and a deeper one: seconds on the two lanes.

What the device waits for the host in total is the largest lead, over all launches, of the issue of one over the device
time of all before it (see `roofline.py`). Of a stretch that is repeated the largest lead is in its first or in its last
repetition, since it rises or falls evenly; so a few numbers for each stretch give the seconds of any depth.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby


@dataclass(frozen=True, slots=True)
class Stretch:
    """Launches in a row: how many, their device seconds, the largest lead of an issue over the device time before it."""

    launches: float
    device_s: float
    lead_s: float

    def extended(self, deeper: Stretch, steps: int) -> Stretch:
        """Continue the line from this depth through a deeper one for so many of their difference."""

        def line(here: float, there: float) -> float:
            return here + steps * (there - here)

        return Stretch(
            line(self.launches, deeper.launches),
            line(self.device_s, deeper.device_s),
            line(self.lead_s, deeper.lead_s),
        )


def stretch(lane: Sequence[float], launch_s: float) -> Stretch:
    """Sum launches up; `lane` holds the device seconds of each, `launch_s` is what the host takes for one."""
    if not lane:
        return Stretch(0.0, 0.0, 0.0)
    before = accumulate(chain((0.0,), lane[:-1]))
    lead_s = max(launch_s * number - done for number, done in enumerate(before, 1))
    return Stretch(float(len(lane)), sum(lane), lead_s)


def deep_seconds(
    shallow: Mapping[Hashable, Stretch], deeper: Mapping[Hashable, Stretch], steps: int, launch_s: float
) -> float:
    """Return the seconds of `steps` more of what `deeper` has beyond `shallow`; both by section, in order.

    Sections that only `deeper` has are repeated where they stand; all others lie on the line through both depths.
    """
    launches = device_s = lead_s = 0.0
    for added, keys in groupby(deeper, key=lambda key: key not in shallow):
        some = [deeper[key] if added else shallow[key].extended(deeper[key], steps) for key in keys]
        times = steps if added else 1
        rise_s = launch_s * sum(each.launches for each in some) - sum(each.device_s for each in some)
        for each in some:
            lead = launch_s * launches - device_s + each.lead_s
            lead_s = max(lead_s, lead, lead + (times - 1) * rise_s)
            launches, device_s = launches + each.launches, device_s + each.device_s
        launches += (times - 1) * sum(each.launches for each in some)
        device_s += (times - 1) * sum(each.device_s for each in some)
    return device_s + lead_s
