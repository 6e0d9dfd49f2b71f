"""Answers: prefill shared among tokens, drafts, examples."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whichlora_estimators.errors import BadValue
from whichlora_estimators.estimate import Times
from whichlora_estimators.strategies import (
    Answering,
    accepted_tokens,
    answering,
    speculative,
    with_examples,
)


def answer(new_tokens: int, *, decode_s: float = 0.02) -> Answering:
    return Answering(batch_size=1, new_tokens=new_tokens, prefill_s=0.5, decode_s_per_token=decode_s)


@given(st.integers(1, 500), st.integers(1, 500))
def test_more_tokens_amortise_the_prefill(few: int, more: int) -> None:
    """A token's time, the prompt's share included, falls as more tokens are generated after the same prompt."""
    assert answer(few + more).s_per_token < answer(few).s_per_token


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 12))
def test_a_round_gives_one_token_at_least_and_all_drafted_ones_at_most(a: float, b: float, drafted: int) -> None:
    """Accepted tokens lie between the target's own and all that were drafted, and grow with the acceptance."""
    low, high = sorted((a, b))
    assert (
        1 <= accepted_tokens(low, drafted) <= accepted_tokens(high, drafted) * (1 + 1e-9) <= (drafted + 1) * (1 + 2e-9)
    )


def test_accepted_tokens_are_what_drawing_gives() -> None:
    """The mean over 20,000 rounds drawn at an acceptance of 0.7 is that of the formula, within 2%."""
    dice = random.Random(3)

    def one_round() -> int:
        kept = 0
        while kept < 5 and dice.random() < 0.7:
            kept += 1
        return kept + 1

    assert statistics.mean(one_round() for _ in range(20_000)) == pytest.approx(accepted_tokens(0.7, 5), rel=0.02)


def test_a_free_draft_that_is_always_right_pays_and_one_that_never_is_costs() -> None:
    """Drafting five free tokens divides decode time by six; a draft that is never right only adds its time."""
    target, free = answer(100), answer(100, decode_s=0.0)
    assert speculative(target, free, 0.02, acceptance=1, draft_tokens=5).decode_s_per_token == pytest.approx(0.02 / 6)
    wrong = speculative(target, answer(100, decode_s=0.005), 0.02, acceptance=0, draft_tokens=5)
    assert wrong.decode_s_per_token == pytest.approx(0.045)


def test_examples_lengthen_the_prompt() -> None:
    """Four shots of 100 tokens make a prompt of 50 one of 450."""
    assert with_examples(50, shots=4, shot_tokens=100) == 450


@pytest.mark.parametrize(
    "make",
    [
        lambda: accepted_tokens(1.2, 5),
        lambda: accepted_tokens(0.5, 0),
        lambda: with_examples(50, shots=-1, shot_tokens=100),
        lambda: answering(Times(step_s=1.0), batch_size=1, new_tokens=1),
    ],
)
def test_what_cannot_be_is_refused(make: object) -> None:
    """Rates outside 0 to 1, negative shots and the times of training raise."""
    with pytest.raises(BadValue):
        make()  # type: ignore[operator]
