"""Lengths of samples, their collations, and hours."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whichlora_estimators.errors import BadValue, UnknownName
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.lengths import (
    COLLATIONS,
    GROUPED_BATCHES,
    epoch_of,
    lengths_from_histogram,
    lengths_from_mean,
    lengths_from_percentiles,
    lengths_of,
)
from whichlora_estimators.schedule import epoch_seconds, training, widths_to_time

tokens = st.lists(st.integers(1, 900), min_size=1, max_size=60)
batches = st.integers(1, 9)
collations = st.sampled_from(COLLATIONS)


@given(tokens, batches, collations, st.integers(8, 1000))
def test_computed_tokens_are_never_fewer_than_the_real_ones(
    given_tokens: list[int], batch: int, collation: str, cut: int
) -> None:
    """Padding only adds, and packing loses nothing: every real token is computed."""
    lengths = lengths_of(given_tokens)
    epoch = epoch_of(lengths, batch, collation=collation, seq_len=cut)
    real = sum(given_tokens) if collation == "pack" else sum(min(n, cut) for n in given_tokens)
    assert epoch.real_tokens == pytest.approx(real)
    assert epoch.computed_tokens >= epoch.real_tokens * (1 - 1e-9)
    assert 0 <= epoch.padding_share < 1


@given(tokens, batches, collations)
def test_widths_are_shares_of_the_steps_and_none_exceeds_the_longest(
    given_tokens: list[int], batch: int, collation: str
) -> None:
    """The shares of an epoch's widths sum to one, and the batch that decides memory is the widest."""
    epoch = epoch_of(lengths_of(given_tokens), batch, collation=collation, seq_len=512)
    assert sum(share for _, share in epoch.widths) == pytest.approx(1)
    assert max(width for width, share in epoch.widths if share) <= epoch.longest_tokens


def test_padding_is_what_drawing_batches_at_random_gives() -> None:
    """The expected width of a batch is the mean longest of B samples, within the error of 4,000 simulated batches."""
    dice = random.Random(1)
    known = [int(dice.lognormvariate(5, 0.6)) + 1 for _ in range(5000)]
    epoch = epoch_of(lengths_of(known), 8, collation="pad", seq_len=4096)
    simulated = statistics.mean(max(dice.choices(known, k=8)) for _ in range(4000))
    assert epoch.computed_tokens / 5000 == pytest.approx(simulated, rel=0.02)


def test_grouping_is_what_sorting_fifty_batches_gives() -> None:
    """Sorted within 50 batches, batches are as wide as simulated, and pad far less than random ones."""
    dice = random.Random(2)
    known = [int(dice.lognormvariate(5, 0.6)) + 1 for _ in range(8000)]
    epoch = epoch_of(lengths_of(known), 8, collation="group", seq_len=4096)
    widths = []
    for start in range(0, 8000, 8 * GROUPED_BATCHES):
        together = sorted(known[start : start + 8 * GROUPED_BATCHES], reverse=True)
        widths += together[::8]
    assert epoch.computed_tokens / 8000 == pytest.approx(statistics.mean(widths), rel=0.03)
    assert 3 * epoch.padding_share < epoch_of(lengths_of(known), 8, collation="pad", seq_len=4096).padding_share


@given(tokens, batches)
def test_equal_lengths_need_no_padding(given_tokens: list[int], batch: int) -> None:
    """Samples of one length pad nothing, however they are collated."""
    lengths = lengths_of([given_tokens[0]] * len(given_tokens))
    for collation in ("pad", "group"):
        assert epoch_of(lengths, batch, collation=collation, seq_len=1000).padding_share == pytest.approx(0)


def test_a_described_distribution_has_what_describes_it() -> None:
    """A log-normal distribution of PEFT's MetaMathQA has its mean; straight lines have their percentiles."""
    by_mean = lengths_from_mean(210, 20_000, percentile=95, at_percentile_tokens=430)
    assert by_mean.mean_tokens == pytest.approx(210, rel=0.02)
    assert by_mean.quantile(0.95) == pytest.approx(430, rel=0.03)
    lines = lengths_from_percentiles({5: 80, 50: 190, 95: 430, 100: 768}, 1000)
    assert lines.samples == pytest.approx(1000)
    assert lines.quantile(0.5) == pytest.approx(190, rel=0.02)
    assert lines.longest_tokens == 768


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: lengths_of([]), BadValue),
        (lambda: lengths_of([3, 0]), BadValue),
        (lambda: lengths_from_histogram({5: -1.0}), BadValue),
        (lambda: lengths_from_percentiles({50: 200, 95: 100}, 10), BadValue),
        (lambda: lengths_from_mean(400, 10, at_percentile_tokens=200), BadValue),
        (lambda: epoch_of(lengths_of([3]), 1, collation="stack", seq_len=8), UnknownName),
        (lambda: epoch_of(lengths_of([3]), 0, collation="pad", seq_len=8), BadValue),
        (lambda: epoch_seconds(epoch_of(lengths_of([3]), 1, collation="pad", seq_len=8), {}), BadValue),
    ],
)
def test_what_is_no_distribution_is_refused(make: object, error: type[Exception]) -> None:
    """Each wrong description raises, none becomes a guess."""
    with pytest.raises(error):
        make()  # type: ignore[operator]


@settings(max_examples=30)
@given(tokens, batches, collations, st.integers(2, 5))
def test_time_is_linear_in_the_data(given_tokens: list[int], batch: int, collation: str, times: int) -> None:
    """So many times the data, in whole batches, take so many times as long."""
    lengths = lengths_of(given_tokens * batch * GROUPED_BATCHES)
    more = lengths.scaled(lengths.samples * times)
    step_s = {1: 0.1, 900: 2.0}
    once, often = (epoch_of(each, batch, collation=collation, seq_len=128) for each in (lengths, more))
    seconds, many = epoch_seconds(once, step_s), epoch_seconds(often, step_s)
    assert many == pytest.approx(times * seconds, rel=times / once.steps + 1e-9)  # the last batch counts whole


@given(tokens, batches)
def test_few_widths_stand_for_all(given_tokens: list[int], batch: int) -> None:
    """Where step time is a straight line, timing a few widths gives what timing all of them would."""
    lengths = lengths_of(given_tokens)
    epoch = epoch_of(lengths, batch, collation="pad", seq_len=1000)
    few = {width: 0.05 + 0.001 * width for width in widths_to_time(lengths, epoch)}
    exact = epoch.steps * sum(share * (0.05 + 0.001 * width) for width, share in epoch.widths)
    assert len(few) <= 6
    assert epoch_seconds(epoch, few) == pytest.approx(exact, rel=1e-6)


def test_energy_and_price_are_power_and_price_times_time() -> None:
    """An hour on a card of 350 W at 1.50 an hour takes 1.26 MJ and costs 1.50."""
    epoch = epoch_of(lengths_of([100] * 3600), 1, collation="pad", seq_len=128)
    found = training(epoch, {100: 1.0}, find_gpu("l40s"), price_per_hour=1.5)
    assert [found.total_s, found.price] == pytest.approx([3600, 1.5])
    assert found.energy_j == pytest.approx((find_gpu("l40s").power_w or 0) * 3600)
