"""Laws of a processor's entry: rates that made the times are found, a disturbed time does not move them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from whichlora_estimators.errors import BadValue
from whichlora_estimators.estimate import Times
from whichlora_estimators.host_entry import FEWEST, HostEntry, Work, fit_host, work, work_of
from whichlora_estimators.models import bundled_model
from whichlora_estimators.tape import Kernel
from whichlora_estimators.workload import Workload

ENTRY = HostEntry(
    s_per_flop=1e-11, s_per_operand_byte=1e-10, s_per_row_byte=7e-11, s_per_other_byte=6e-11, s_per_launch=1e-5
)


def training(tokens: int, method: str = "lora") -> Workload:
    config = bundled_model("EleutherAI/pythia-70m").config
    return Workload(model="pythia", config=config, precision="fp32", seq_len=tokens, method=method)


def generation(tokens: int) -> Workload:
    config = bundled_model("distilgpt2").config
    return Workload(model="gpt2", config=config, precision="fp32", phase="generate", prefill_len=tokens, decode_len=6)


ALL = [*(training(tokens, method) for tokens in (8, 64, 256) for method in ("lora", "full")), generation(16)]


@pytest.fixture(scope="module")
def done() -> list[Work]:
    """Return the work of training and generation of several sizes."""
    return [each for workload in ALL for each in work_of(workload).values()]


def timed(done: Sequence[Work]) -> list[tuple[Work, float]]:
    return [(each, ENTRY.seconds(each)) for each in done]


def test_rates_that_made_the_times_are_found(done: list[Work]) -> None:
    """Times that some rates make are predicted by the fit as the rates say, also for work that it has not seen."""
    found = fit_host(timed(done))
    unseen = work_of(training(128))["step_s"]
    assert found.seconds(unseen) == pytest.approx(ENTRY.seconds(unseen), rel=0.01)


def test_a_disturbed_time_pulls_no_harder(done: list[Work]) -> None:
    """A single time that is three times too long moves the prediction of others by less than a twentieth."""
    rows = timed(done)
    rows[1] = (rows[1][0], 3 * rows[1][1])
    found = fit_host(rows)
    unseen = work_of(training(128))["step_s"]
    assert found.seconds(unseen) == pytest.approx(ENTRY.seconds(unseen), rel=0.05)


def test_no_rate_is_negative(done: list[Work]) -> None:
    """Whatever the times are, no work is predicted to take less than none."""
    found = fit_host([(each, 1e-3 * (1 + place % 3)) for place, each in enumerate(done)])
    single = (Work(flops=0, operand_bytes=0, row_bytes=0, other_bytes=0, launches=0),)
    assert all(found.seconds(each) == 0 for each in single)
    assert min(found.s_per_flop, found.s_per_operand_byte, found.s_per_row_byte) >= 0
    assert min(found.s_per_other_byte, found.s_per_launch) >= 0


def test_work_of_operators_is_told_apart() -> None:
    """A product of several rows counts FLOPs and operands, one of one row its bytes, anything else its bytes."""
    kernels = [Kernel(100, 1, 4, 5, 6, "fp32"), Kernel(30, 2, 1, 5, 3, "fp32"), Kernel(7)]
    assert work(kernels) == Work(flops=240.0, operand_bytes=100, row_bytes=30, other_bytes=7, launches=3)


def test_decoding_is_bound_by_rows_and_times_have_their_names() -> None:
    """A decoded token multiplies single rows only, and a generation has a prefill and a token where training has a step."""
    found = work_of(generation(16))
    assert found["decode_s_per_token"].flops == 0
    assert found["decode_s_per_token"].row_bytes > 0
    assert found["prefill_s"].flops > 0
    assert set(ENTRY.times(generation(16)).__dataclass_fields__) == set(Times.__dataclass_fields__)
    assert (ENTRY.times(training(8)).step_s or 0) > 0
    assert ENTRY.times(training(8)).prefill_s is None


def test_too_few_times_are_refused(done: list[Work]) -> None:
    """Fewer times than the fit needs, or one that is none, is an error that says what to do."""
    with pytest.raises(BadValue, match="Time at least"):
        fit_host(timed(done)[: FEWEST - 1])
    with pytest.raises(BadValue):
        fit_host([*timed(done), (done[0], 0.0)])
