"""The null device's two lanes on their own, called through ctypes: no PyTorch is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.stack

PROGRAM = """
import ctypes, time
from whichlora_null import control
cuda = ctypes.CDLL(None)

def event():
    made = ctypes.c_void_p()
    assert cuda.cudaEventCreate(ctypes.byref(made)) == 0
    return made

def ms(first, then):
    found = ctypes.c_float()
    assert cuda.cudaEventElapsedTime(ctypes.byref(found), first, then) == 0
    return found.value

def timed(work):
    cuda.cudaDeviceSynchronize()
    first, then = event(), event()
    cuda.cudaEventRecord(first, None)
    work()
    cuda.cudaEventRecord(then, None)
    return ms(first, then)

first, then = event(), event()
cuda.cudaEventRecord(first, None)
time.sleep(0.02)
cuda.cudaEventRecord(then, None)
result["untold"] = ms(first, then)

def issue(host_s, device_s, times=1, wait=None):
    for _ in range(times):
        control.work(host_s, device_s)
        if wait:
            wait()

issue(1e-3, 1e-3)
result["across"] = ms(first, then), (cuda.cudaEventRecord(then, None), ms(first, then))[1]
result["host bound"] = timed(lambda: issue(1e-3, 1e-4, 10))
result["device bound"] = timed(lambda: issue(1e-4, 1e-3, 10))
waits = (cuda.cudaDeviceSynchronize, lambda: cuda.cudaStreamSynchronize(None), lambda: cuda.cudaEventSynchronize(then))
result["waits"] = [timed(lambda: issue(1e-3, 1e-3, 10, wait)) for wait in waits]
control.wait_takes(1e-3)
result["slow waits"] = timed(lambda: issue(1e-3, 1e-3, 10, waits[0]))
control.wait_takes(0.0)
result["overlapped"] = timed(lambda: issue(1e-3, 1e-3, 10))
result["host only"] = timed(lambda: issue(5e-3, 0.0))
result["really"] = timed(lambda: time.sleep(0.02))
marks = []
for _ in range(5):
    marks.append(event())
    cuda.cudaEventRecord(marks[-1], None)
    issue(1e-6, 1e-5)
result["marks"] = [ms(marks[0], mark) for mark in marks]
"""


@pytest.fixture(scope="module")
def seen(on_null: Callable[..., Any]) -> dict[str, Any]:
    """Return what events showed of work whose duration was told."""
    found: dict[str, Any] = on_null(PROGRAM).result
    return found


def test_events_are_the_host_s_until_somebody_tells(seen: dict[str, Any]) -> None:
    """Without told work an event is the moment that it was recorded; with it, time that really passes does not count."""
    assert seen["untold"] >= 20
    assert seen["really"] == 0
    before, after = seen["across"]
    assert after >= before + 2


def test_the_slower_lane_decides(seen: dict[str, Any]) -> None:
    """Ten launches end with the last one's execution, which starts when it is issued or when the card is free."""
    assert seen["host bound"] == pytest.approx(10 * 1 + 0.1, abs=2e-3)
    assert seen["device bound"] == pytest.approx(0.1 + 10 * 1, abs=2e-3)
    assert seen["overlapped"] == pytest.approx(11, abs=2e-3)


def test_waiting_levels_the_lanes(seen: dict[str, Any]) -> None:
    """Where the host waits after each launch, by whatever call, issuing and executing take turns."""
    assert seen["waits"] == pytest.approx([20, 20, 20], abs=2e-3)


def test_a_wait_takes_the_host_what_it_was_told(seen: dict[str, Any]) -> None:
    """Ten waits of a millisecond each come on top."""
    assert seen["slow waits"] == pytest.approx(seen["waits"][0] + 10, abs=2e-3)


def test_work_without_a_kernel_is_the_host_s(seen: dict[str, Any]) -> None:
    """An idle card reaches what the host issues after five milliseconds of its own work after as many."""
    assert seen["host only"] == pytest.approx(5, abs=2e-3)


def test_the_clock_never_goes_back(seen: dict[str, Any]) -> None:
    """Events that are recorded one after the other show times that only rise."""
    assert seen["marks"] == sorted(seen["marks"])
    assert seen["marks"][-1] > seen["marks"][0]
