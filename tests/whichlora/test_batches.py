"""Batches of a search: accumulated ones, and those of a data set whose samples are not all as long."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from whichlora import BadValue, PickConfig, WhichloraError, config_from_fields, pick
from whichlora.cli import main
from whichlora.data import Lengths
from whichlora.data.spec import DataSpec
from whichlora.pick import Row, stage2_rows
from whichlora.policy import by_policy
from whichlora_estimators.estimate import estimate
from whichlora_estimators.models import load_model

MODEL = "facebook/opt-125m"


def config(**changes: Any) -> PickConfig:
    fields = {
        "gpu": "l4",
        "stage1_profile": {"model_names": [MODEL], "prefill_length": 64, "tokens_to_generate": 8},
        "stage2_profile": {"batch_size": [1, 4], "accumulation": [1, 2, 8]},
        "methods": ["lora"],
        "seq_len": 512,
        "dataset": {"samples": 320},
    }
    return config_from_fields(fields | changes)


def rows_of(asked: PickConfig) -> list[Row]:
    return list(stage2_rows(asked, load_model(MODEL, offline=True)))


def skewed(asked: PickConfig, **data: Any) -> PickConfig:
    """Give a config 2,000 samples, most of them short."""
    draw = random.Random(0)
    counts = Counter(min(500, int(draw.lognormvariate(4.3, 0.7)) + 3) for _ in range(2000))
    known = Lengths(counts=counts, learnt=counts.total())
    return replace(asked, samples=2000, lengths={MODEL: known}, data=DataSpec(source="x.jsonl", **data))


def test_an_accumulated_row_takes_what_its_steps_take() -> None:
    """Bytes and time of every row are those of its workload, laid out whole; steps and samples a step are counted so."""
    asked = config()
    found = rows_of(asked)
    assert {(row.workload.batch_size, row.workload.accumulation) for row in found} == {
        (batch, times) for batch in (1, 4) for times in (1, 2, 8)
    }
    for row in found:
        whole = estimate(row.workload, asked.gpu)
        assert row.schedule is not None
        assert row.schedule.steps == 320 // row.effective_batch
        assert row.allocated_peak_bytes == pytest.approx(whole.peak.live_bytes, rel=1e-3)
        assert row.time is not None
        assert row.time_s == pytest.approx(row.schedule.total_steps * (whole.times.step_s or 0), rel=0.02)
        assert row.time.low_s < row.time.expected_s < row.time.high_s


@pytest.mark.parametrize(("useful", "samples", "chosen"), [(None, 320, 32), (8, 320, 8), (6, 320, 4), (None, 3, 2)])
def test_the_largest_useful_batch_is_preferred(useful: int | None, samples: int, chosen: int) -> None:
    """It is what a step learns from, accumulated or not: no more than the config calls useful, or there are samples."""
    asked = config(
        stage2_profile={"batch_size": [1, 4], "accumulation": [1, 2, 8], "useful_batch": useful},
        dataset={"samples": samples},
    )
    asked = replace(asked, policy=("batch", "time"))
    assert by_policy(asked, rows_of(asked))[0].effective_batch == chosen


@pytest.mark.parametrize("data", [{}, {"group_by_length": True}, {"packing": True}])
def test_memory_is_of_the_longest_batch_and_time_of_all_tokens(data: dict[str, Any]) -> None:
    """Bytes are those at the longest width; time is that of every batch at its own, laid out whole one by one."""
    asked = skewed(config(stage2_profile={"batch_size": [8], "accumulation": [1, 4]}), **data)
    known = asked.lengths[MODEL]
    for row in rows_of(asked):
        assert row.schedule is not None
        width = 512 if data.get("packing") else -(-known.longest // 8) * 8
        assert (row.workload.seq_len, row.schedule.longest_tokens) == (width, width)
        assert row.workload.padded == (not data.get("packing"))
        exact = estimate(row.workload, asked.gpu)
        assert row.allocated_peak_bytes == pytest.approx(exact.peak.live_bytes, rel=1e-3)
        epoch = known.epoch(8, collation=asked.data.collation if asked.data else "", seq_len=512)
        passes = {
            each: estimate(row.workload.with_(seq_len=each, accumulation=1), asked.gpu).times.step_s or 0.0
            for each in sorted({width for width, _ in epoch.widths})[:: max(1, len(epoch.widths) // 30)]
        }
        total = epoch.steps * sum(share * _nearest(passes, each) for each, share in epoch.widths)
        assert row.time_s == pytest.approx(total, rel=0.05)


def _nearest(times: dict[int, float], width: int) -> float:
    return times[min(times, key=lambda each: abs(each - width))]


def test_grouped_samples_take_less_time_than_shuffled_ones() -> None:
    """Less padding, less time, equal memory; packing pads nothing at all."""
    asked = config(stage2_profile={"batch_size": [16]})
    pad, group, pack = (
        rows_of(skewed(asked, **data))[0] for data in ({}, {"group_by_length": True}, {"packing": True})
    )
    assert pad.allocated_peak_bytes == group.allocated_peak_bytes
    assert (pad.time_s or 0) > (group.time_s or 0)
    shares = [row.schedule.padding_share for row in (pad, group, pack) if row.schedule]
    assert shares[0] > shares[1] > shares[2] == 0


def test_a_data_set_shows_in_what_pick_says(tmp_path: Path) -> None:
    """Tokens, padding, steps, an epoch, all of it with its interval, and advice on seq_len: on the terminal, in the page."""
    draw = random.Random(1)
    rows = [{"prompt": "Say it", "completion": "word " * draw.randint(1, 120)} for _ in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    fields = {
        "gpu": "l4",
        "stage1_profile": {"model_names": [MODEL], "prefill_length": 64, "tokens_to_generate": 8},
        "stage2_profile": {"batch_size": [4], "accumulation": [4]},
        "methods": ["lora"],
        "seq_len": 64,
        "dataset": {"source": "rows.jsonl", "validation_share": 0},
        "epochs": 2,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(fields), encoding="utf-8")
    words = ["pick", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), "--offline", "--no-advice"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "steps: 38 in 2 epochs, batch size 4, accumulated 4 times (16 samples a step)" in found.stdout
    for text in ("with padding", "waste", "an epoch", "with 90% probability", "64 cuts off", "advised"):
        assert text in found.stdout
        assert text in page
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert plan["choice"]["workload"]["accumulation"] == 4
    assert plan["choice"]["schedule"]["steps"] == 19
    assert plan["choice"]["predicted"]["total"]["low_s"] < plan["choice"]["predicted"]["total"]["expected_s"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage2_profile": {"accumulation": 0}}, "stage2_profile.accumulation"),
        ({"stage2_profile": {"accumulation": [1, "four"]}}, "four"),
        ({"stage2_profile": {"useful_batch": -1}}, "useful_batch"),
        ({"dataset": {"source": "x.jsonl", "packing": True, "group_by_length": True}}, "packed samples"),
        ({"dataset": {"source": "x.jsonl", "group_by_length": "yes"}}, "group_by_length"),
        ({"finetune": {"accumulation": 4}}, "accumulation"),
    ],
)
def test_wrong_batches_are_named(changes: dict[str, Any], named: str) -> None:
    """Each mistake is refused with its key, before anything is searched."""
    with pytest.raises(WhichloraError, match=named):
        config(**changes)
    assert issubclass(BadValue, WhichloraError)


def test_a_data_set_can_be_packed_by_a_search() -> None:
    """Packed sequences are counted, not samples, and every token is real."""
    asked = config(dataset={"samples": 64}, stage2_profile={"batch_size": [4]})
    (row,) = rows_of(skewed(asked, packing=True))
    known = skewed(asked).lengths[MODEL]
    assert row.schedule is not None
    assert row.schedule.sequences == known.tokens // 512
    assert row.schedule.passes == -(-(known.tokens // 512) // 4)
    assert pick(asked, offline=True).choice is not None
