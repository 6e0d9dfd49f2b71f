"""From the time of a step to hours, joules and money: a data set in batches, a card's power, a price."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import BadValue
from .gpus import Gpu
from .lengths import Epoch, Lengths

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What training takes in all. Energy is that of the card at its rated power, which it seldom draws throughout.

    `energy_j` is None where the card's power is not known, `price` where no price was given.
    """

    epoch: Epoch
    epochs: int
    epoch_s: float
    energy_j: float | None
    price: float | None

    @property
    def steps(self) -> int:
        """Optimizer steps, or passes where gradients accumulate, in all epochs."""
        return self.epochs * self.epoch.steps

    @property
    def total_s(self) -> float:
        """Seconds of all epochs."""
        return self.epochs * self.epoch_s


def widths_to_time(lengths: Lengths, epoch: Epoch, *, most: int = 6) -> list[int]:
    """Return a few widths between which step times are straight lines: the ends of the epoch's batches and some between."""
    widths = [width for width, share in epoch.widths if share > 0]
    if len(widths) <= most:
        return widths
    low, high = widths[0], widths[-1]
    return sorted({round(low + (high - low) * (index / (most - 1)) ** 2) for index in range(most)})


def epoch_seconds(epoch: Epoch, step_s: Mapping[int, float]) -> float:
    """Sum an epoch's steps: of each batch, the time of its width, on straight lines between those given.

    Raises BadValue without any.
    """
    if not step_s:
        raise BadValue("no step time is given", value=dict(step_s), todo="Give the time of at least one width.")
    known = sorted(step_s.items())
    return epoch.steps * sum(share * _interpolated(known, width) for width, share in epoch.widths)


def _interpolated(known: Sequence[tuple[int, float]], width: int) -> float:
    place = bisect_left(known, (width,))
    if place == 0 or place == len(known):  # beyond the ends, in proportion
        nearest, seconds = known[min(place, len(known) - 1)]
        return seconds if nearest == width or place == 0 else seconds * width / nearest
    (low, a), (high, b) = known[place - 1], known[place]
    return a + (b - a) * (width - low) / (high - low)


def training(
    epoch: Epoch, step_s: Mapping[int, float], gpu: Gpu, *, epochs: int = 1, price_per_hour: float | None = None
) -> Training:
    """Return what so many epochs take on a card. Raises BadValue for epochs or a price that are none."""
    if epochs < 1:
        raise BadValue("epochs must be a positive whole number", value=epochs, todo="Give 1 or more.")
    if price_per_hour is not None and not price_per_hour >= 0:
        raise BadValue("the price of an hour must not be negative", value=price_per_hour, todo="Give 0 or more.")
    epoch_s = epoch_seconds(epoch, step_s)
    return Training(
        epoch=epoch,
        epochs=epochs,
        epoch_s=epoch_s,
        energy_j=None if gpu.power_w is None else gpu.power_w * epochs * epoch_s,
        price=None if price_per_hour is None else price_per_hour * epochs * epoch_s / _HOUR_S,
    )
