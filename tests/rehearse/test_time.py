"""The card's clock as a script sees it, and rehearsed times of workloads: laws that hold on any card."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from whichlora.rehearse.lanes import BACKWARD, LISTED, OUTSIDE, RECORDED, START_S
from whichlora.rehearse.script import rehearse_script
from whichlora.rehearse.timed import TimedRehearsal, answer, rehearse_times
from whichlora_estimators.decomposed import SVD_S, WAIT_S, svd_seconds
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.roofline import Roofline, launch_seconds
from whichlora_estimators.tape import Kernel

from .conftest import tiny

pytestmark = pytest.mark.stack

GPU = "l40s"
#: A script that times itself as scripts do, and writes down what it saw.
SCRIPT = """
import json, sys, torch

def timed(work):
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    result = work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3

def square(n):
    return torch.empty(n, n, dtype=torch.bfloat16, device="cuda")

def many(n):
    for _ in range(n):
        small.add_(1)

small, lists = square(8), [square(8) for _ in range(50)]
large, larger, layer = square(4096), square(8192), torch.nn.SiLU()
tall = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
seen = {
    "large": timed(lambda: large @ large),
    "larger": timed(lambda: larger @ larger),
    "bytes": timed(lambda: tall.add_(1)),
    "100": timed(lambda: many(100)),
    "200": timed(lambda: many(200)),
    "module": timed(lambda: layer(small)),
    "listed": timed(lambda: torch._foreach_add_(lists, 1.0)),
    "hidden": timed(lambda: (larger @ larger, many(100))),
    "read": timed(lambda: ((larger @ larger)[0, 0].item(), many(100))),
    "once": timed(lambda: (larger @ larger)[0, 0].item()),
    "again": timed(lambda: ((larger @ larger)[0, 0].item(), torch.cuda.synchronize())),
    "svd": timed(lambda: torch.linalg.svd(torch.empty(32, 32, device="cuda"))),
    "pinv": timed(lambda: torch.linalg.pinv(torch.empty(32, 32, device="cuda"))),
    "nothing": timed(lambda: None),
}
weight = square(64).requires_grad_()
recorded = torch.nn.Linear(64, 64, bias=False, device="cuda", dtype=torch.bfloat16)
optimizer = torch.optim.SGD(recorded.parameters(), lr=0.1)
events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
for event in events:
    recorded(weight).sum().backward()
    optimizer.step()
    event.record()
torch.cuda.synchronize()
seen["ends"] = [events[0].elapsed_time(event) for event in events]
json.dump(seen, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the script's own events showed, and what was reported of it."""
    folder = tmp_path_factory.mktemp("timed")
    script, path = folder / "script.py", folder / "seen.json"
    script.write_text(SCRIPT, encoding="utf-8")
    run = rehearse_script([sys.executable, str(script), str(path)], gpu=GPU, timed=True)
    assert run.outcome == "ok", run.error
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found | {"report": run.times}


def test_a_large_product_takes_what_the_card_s_roofline_says(seen: dict[str, Any]) -> None:
    """Between two events lies the time of the product between them, and eight times the FLOPs take about that longer."""
    n = 4096
    kernel = Kernel(3 * n * n * 2, 1, n, n, n, "bf16")
    expected_s = Roofline(find_gpu(GPU)).kernel_s(kernel)
    assert seen["large"] == pytest.approx(expected_s, abs=2 * launch_seconds(find_gpu(GPU)))
    assert seen["larger"] / seen["large"] == pytest.approx(8, rel=0.15)


def test_bytes_take_the_bandwidth(seen: dict[str, Any]) -> None:
    """Half a gigabyte read and written takes at least what the card's rated bandwidth needs."""
    rated_s = 2 * 2**29 / find_gpu(GPU).hbm_bytes_per_s
    assert rated_s < seen["bytes"] < 2.5 * rated_s


def test_small_work_waits_for_the_host(seen: dict[str, Any]) -> None:
    """Twice as many small operators take twice as long, each as long as the host needs outside of modules."""
    assert seen["200"] / seen["100"] == pytest.approx(2, rel=0.03)
    assert seen["100"] / 100 == pytest.approx(OUTSIDE * launch_seconds(find_gpu(GPU)), rel=0.03)


def test_who_calls_decides_what_a_launch_takes_the_host(seen: dict[str, Any]) -> None:
    """A module's launch takes longer than a bare one, recording longest; a list costs the host for every tensor in it."""
    launch_s = launch_seconds(find_gpu(GPU))
    assert OUTSIDE < 1 < BACKWARD < RECORDED
    assert seen["module"] > seen["100"] / 100
    assert seen["listed"] > 50 * LISTED * launch_s


def test_lanes_overlap_until_somebody_waits(seen: dict[str, Any]) -> None:
    """Two lanes take no less than either and no more than both; a value that is read back levels them."""
    device_s, host_s = seen["larger"], seen["100"]
    in_line_s = max(device_s, host_s) + 100 * START_S  # each of those that wait in line has to start
    assert in_line_s <= seen["hidden"] <= device_s + host_s
    assert seen["read"] == pytest.approx(device_s + WAIT_S + host_s, rel=0.05)
    assert seen["nothing"] == 0


def test_a_card_that_is_known_to_be_idle_is_not_waited_for(seen: dict[str, Any]) -> None:
    """Reading a value costs one wait, and a synchronisation right behind it none."""
    assert seen["once"] == pytest.approx(seen["larger"] + WAIT_S, rel=0.02)
    assert seen["again"] == pytest.approx(seen["once"], abs=WAIT_S / 4)


def test_decompositions_take_what_was_published(seen: dict[str, Any]) -> None:
    """A matrix that the host decomposes takes what cuSOLVER would, not the copies; pinv launches more around it."""
    assert seen["svd"] == pytest.approx(svd_seconds(32), rel=0.15)
    assert seen["pinv"] > seen["svd"]


def test_larger_decompositions_take_no_less() -> None:
    """Between published sizes the time grows, and beyond them it does not fall."""
    times = [svd_seconds(n) for n in range(1, 100)]
    assert times == sorted(times)
    assert [svd_seconds(n) for n, _ in SVD_S] == [seconds for _, seconds in SVD_S]


def test_the_clock_never_goes_back(seen: dict[str, Any]) -> None:
    """Events in a row show rising times, and steps are counted."""
    assert seen["ends"] == sorted(seen["ends"])
    assert seen["ends"][-1] > 0
    assert seen["report"]["steps"] == 4
    assert 0 < seen["report"]["step_s"] < seen["report"]["seconds"]


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, TimedRehearsal]:
    """Return times of small workloads, one after the other in a single worker."""
    shared = {"precision": "bf16-true"}
    workloads = [
        tiny(id="short", seq_len=64, **shared),
        tiny(id="long", seq_len=1024, batch_size=16, **shared),
        tiny(id="full", method="full", seq_len=64, **shared),
        tiny(id="dynamic", phase="generate", prefill_len=64, decode_len=4, **shared),
        tiny(id="static", phase="generate", prefill_len=64, decode_len=4, cache="static", **shared),
        tiny(id="wrong", targets=("no_such_layer",), **shared),
    ]
    return {found.workload.id: found for found in rehearse_times(workloads, GPU)}


def test_more_tokens_take_longer_once_the_card_decides(rehearsed: dict[str, TimedRehearsal]) -> None:
    """A step of 256 times the tokens takes longer, but a small one is bound by launches, as many in either."""
    short_s, long_s = rehearsed["short"].times["step"], rehearsed["long"].times["step"]
    assert short_s < long_s < 256 * short_s


def test_adapters_of_a_small_model_cost_the_host_more_than_they_save(rehearsed: dict[str, TimedRehearsal]) -> None:
    """Where launches decide, LoRA's additional operators make its step longer than that of full fine-tuning."""
    assert rehearsed["full"].times["step"] < rehearsed["short"].times["step"]


def test_generation_is_timed_with_either_cache(rehearsed: dict[str, TimedRehearsal]) -> None:
    """A static cache, which is written in place, takes a token about as long as one that grows."""
    for name in ("dynamic", "static"):
        assert set(rehearsed[name].times) == {"prefill", "decode_per_token"}
    ratio = rehearsed["static"].times["decode_per_token"] / rehearsed["dynamic"].times["decode_per_token"]
    assert 0.7 < ratio < 1.4


def test_what_fails_says_why_and_what_is_timed_has_its_interval(rehearsed: dict[str, TimedRehearsal]) -> None:
    """An answer holds the time and its interval, or the error."""
    assert "no_such_layer" in answer(rehearsed["wrong"])["error"]
    told = answer(rehearsed["short"])
    low_s, high_s = told["step_s_interval"]
    assert low_s < told["step_s"] < high_s
    assert told["evidence"] == "rehearsed"
