"""Repeated times, raw and summed up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from whichlora_estimators.errors import BadValue

from .checks import known_keys, seconds

SUMMARY = ("min_s", "mean_s", "median_s", "max_s")
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeStats:
    """Seconds of one thing done several times: every sample in order, and their summary.

    Given samples, the summary follows from them. A publication that gives only a mean or a median leaves the rest None.
    Raises BadValue for a summary that no samples can have.
    """

    samples_s: tuple[float, ...] = ()
    min_s: float | None = None
    mean_s: float | None = None
    median_s: float | None = None
    max_s: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.samples_s, str) or not isinstance(self.samples_s, Iterable):
            raise BadValue("samples_s must be a list of times", value=self.samples_s, todo="Give seconds.")
        samples = tuple(_sample(value) for value in self.samples_s)
        object.__setattr__(self, "samples_s", samples)
        derived = _summary(samples) if samples else {}
        for name in SUMMARY:
            given = seconds(name, getattr(self, name))
            if given is not None and samples and not math.isclose(given, derived[name], rel_tol=_TOLERANCE):
                raise BadValue(f"{name} is not that of the samples", value=given, todo=f"They give {derived[name]}.")
            object.__setattr__(self, name, derived.get(name, given))
        self._check_order()

    def _check_order(self) -> None:
        given = [value for name in SUMMARY if (value := getattr(self, name)) is not None]
        if not given:
            raise BadValue("times without a single time", todo="Leave the whole field None where nothing is known.")
        below = self.min_s is not None and min(given) < self.min_s * (1 - _TOLERANCE)
        above = self.max_s is not None and max(given) > self.max_s * (1 + _TOLERANCE)
        if below or above:
            raise BadValue("mean and median must lie between min and max", value=self, todo="Check the summary.")


def times_to_json(times: TimeStats) -> dict[str, object]:
    """Return what is known of `times`, as JSON's types."""
    known: dict[str, object] = {name: value for name in SUMMARY if (value := getattr(times, name)) is not None}
    return {"samples_s": list(times.samples_s), **known} if times.samples_s else known


def times_from_json(kind: str, fields: object) -> TimeStats:
    """Read what `times_to_json` writes. Raises BadValue or UnknownName."""
    return TimeStats(**known_keys(kind, fields, ("samples_s", *SUMMARY)))


def _sample(value: object) -> float:
    sample = seconds("a sample", value)
    if sample is None:
        raise BadValue("a sample without its time", todo="Leave out what was not measured.")
    return sample


def _summary(samples: tuple[float, ...]) -> dict[str, float]:
    return {
        "min_s": min(samples),
        "mean_s": statistics.fmean(samples),
        "median_s": statistics.median(samples),
        "max_s": max(samples),
    }
