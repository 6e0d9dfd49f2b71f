"""A process on the null device that times workloads on the card's lanes: JSON lines on stdin, JSON lines on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from whichlora_estimators.workload import workload_from_json

from .lanes import Lanes, start
from .parent import end_with_parent
from .ticking import follow
from .worker import clean_up, say, take_stdout, warm_up


@dataclass(frozen=True, slots=True)
class LanesClock:
    """Marks moments by when the card would reach them; the first steps are the recorder's."""

    lanes: Lanes
    warmup: int = 0
    steps: int = 2

    def mark(self) -> float:
        """Return when the card has done all that was issued."""
        return self.lanes.device_s()

    def between_s(self, marks: list[Any]) -> list[float]:
        """Return the seconds between each mark and the next."""
        return [later - earlier for earlier, later in pairwise(marks)]


def main() -> None:
    """Say what is installed, then answer workloads until stdin ends."""
    answers = take_stdout()
    end_with_parent()
    import torch

    from whichlora.nulldevice import control
    from whichlora_profiles_db import environment_to_json, local_environment

    warm_up()
    versions = {"cuda": str(torch.version.cuda)}
    say(answers, {"environment": environment_to_json(local_environment(versions=versions))})
    clock = LanesClock(follow(start(control)))
    for line in sys.stdin:
        say(answers, _time(json.loads(line)["workload"], clock) | {"leftover_bytes": clean_up() * 0})


def _time(workload: Mapping[str, Any], clock: LanesClock) -> dict[str, Any]:
    from whichlora.nulldevice import control

    from .step import Recorder, run

    class NullRecorder(Recorder):
        """Tells the device what it would read back from a mask."""

        def mask_is_full(self, full: bool) -> None:
            control.reset()
            control.set_bool(full)

    recorder, error = NullRecorder(), ""
    try:
        run(workload_from_json(workload), recorder, clock)
    except Exception as problem:  # whatever a library raises is an answer
        error = f"{type(problem).__name__}: {problem}"[:2000]
    return {"outcome": "failed" if error else "ok", "error": error, "times": recorder.times}


if __name__ == "__main__":
    main()
