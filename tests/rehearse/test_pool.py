"""Workers of a pool: small programs of the standard library that answer, hang, die and leave things behind."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from whichlora.rehearse.pool import Pool
from whichlora_estimators.errors import WhichloraError

WORKER = """
import json, os, sys, time
print(json.dumps({"environment": {"pid": os.getpid()}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    time.sleep(job.get("sleep_s", 0))
    if "signal" in job:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), job["signal"])
    print(json.dumps({"outcome": "ok", "error": "", **job}), flush=True)
"""


def pool(folder: Path, *, program: str = WORKER, jobs: int = 1, timeout_s: float = 30) -> Pool:
    (folder / "small_worker.py").write_text(program)
    return Pool({"PYTHONPATH": str(folder)}, module="small_worker", jobs=jobs, timeout_s=timeout_s)


def run(folder: Path, *jobs: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Return the answers in the order of the jobs, after a check that no process is left."""
    with pool(folder, **settings) as made:
        found = dict(made.answers(enumerate(jobs)))
    pids = {answer["environment"]["pid"] for answer in found.values()}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail("a worker is left")
    return [found[number] for number in range(len(jobs))]


def pids(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["environment"]["pid"] for answer in answers]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    """Its job has failed, by that signal and with its last words; the others are answered."""
    answers = run(tmp_path, {}, {"signal": 9}, {}, {})
    assert [answer["outcome"] for answer in answers] == ["ok", "failed", "ok", "ok"]
    assert "SIGKILL" in answers[1]["error"]
    assert "last words" in answers[1]["error"]
    first, died, then, last = pids(answers)
    assert first == died != then == last


def test_a_worker_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """A job beyond its time has failed and says so, soon; a new worker goes on."""
    begin = time.monotonic()
    late, fine = run(tmp_path, {"sleep_s": 60}, {}, timeout_s=0.5)
    assert time.monotonic() - begin < 30
    assert late["outcome"] == "failed"
    assert "no answer within 0.5 s" in late["error"]
    assert fine["outcome"] == "ok"


@pytest.mark.parametrize("word", [{"leftover_bytes": 512}, {"ends": True}])
def test_what_stays_behind_is_found_by_nobody(tmp_path: Path, word: dict[str, Any]) -> None:
    """A worker that says that something is left, or that it ends, gets no other job."""
    first, second, third = pids(run(tmp_path, word, {"leftover_bytes": 0}, {}))
    assert first != second == third


def test_a_pool_answers_more_than_once(tmp_path: Path) -> None:
    """Jobs that come one after the other find the worker that waited, or a new one where the last one has ended."""
    seen = []
    with pool(tmp_path) as made:
        for job in ({}, {}, {"ends": True}, {}):
            seen.append(next(made.answers([(0, job)]))[1])
    first, second, third, last = pids(seen)
    assert first == second == third != last


def test_workers_work_at_a_time(tmp_path: Path) -> None:
    """As many processes as were asked for, and no more than there are jobs."""
    assert len(set(pids(run(tmp_path, *[{"sleep_s": 0.5}] * 4, jobs=2)))) == 2
    assert len(set(pids(run(tmp_path, {}, jobs=8)))) == 1


def test_a_worker_that_never_starts_is_an_error(tmp_path: Path) -> None:
    """What it said is in the error: there is nothing to go on with."""
    broken = pool(tmp_path, program="raise SystemExit('no such thing')")
    with broken, pytest.raises(WhichloraError, match="no such thing"):
        list(broken.answers([(0, {})]))


def test_who_stops_asking_leaves_nobody(tmp_path: Path) -> None:
    """A pool that is left in the middle ends its workers, whatever they do."""
    with pool(tmp_path, jobs=2) as made:
        number, answer = next(made.answers([(0, {"sleep_s": 60}), (1, {})]))
    assert (number, answer["outcome"]) == (1, "ok")
    with pytest.raises(ProcessLookupError):
        os.kill(answer["environment"]["pid"], 0)
