"""What `sinfo` prints is understood, and what jobs ask for is what was said."""

from __future__ import annotations

import pytest

from whichlora import BadValue
from whichlora.slurm.cluster import GpuType, find_types, format_time, parse, parse_time
from whichlora.slurm.scripts import Job, script
from whichlora.slurm.settings import Cluster, cluster_from_fields
from whichlora_estimators.gpus import find_gpu

SINFO = """\
short|2:00:00|up|gpu:a100:4(S:0-1),gpu:rtx4090:2
long|7-00:00:00|up|gpu:a100:4(S:0-1)
cpu|infinite|up|(null)
old|infinite|down|gpu:v100:8
plain|infinite|up|gpu:2
"""


def test_every_gpu_type_that_is_up_is_found_with_its_partitions() -> None:
    """Types in one line or several, with sockets or without a type; nothing of partitions that are down."""
    assert parse(SINFO) == {
        "a100": [("short", 7200), ("long", 604800)],
        "rtx4090": [("short", 7200)],
        "gpu": [("plain", None)],
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("infinite", None),
        ("30", 1800),
        ("2:30", 150),
        ("1:00:00", 3600),
        ("1-0", 86400),
        ("2-03:30", 185400),
        ("1-00:00:01", 86401),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    """Golden: sbatch(1), option --time."""
    assert parse_time(text) == seconds


@pytest.mark.parametrize("seconds", [1, 59, 60, 61, 3600, 100_000])
def test_a_time_that_is_asked_for_is_enough_and_not_a_minute_more(seconds: int) -> None:
    """Rounding goes up to whole minutes."""
    asked = parse_time(format_time(seconds))
    assert asked is not None
    assert 0 <= asked - seconds < 60


def test_a_type_of_several_cards_is_refused_until_it_is_said_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`a100` may be four cards: the message names them; a mapping settles it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "sinfo").write_text("#!/bin/sh\necho 'main|infinite|up|gpu:a100:1'\n", encoding="utf-8")
    (folder / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    with pytest.raises(BadValue, match="a100-sxm-80gb"):
        find_types(Cluster())
    (found,) = find_types(Cluster(gpu_types={"a100": "a100-sxm-40gb"}))
    assert found.gpu.slug == "a100-sxm-40gb"


def test_a_job_asks_for_what_was_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Account, partition, time within the limit, memory, modules and set-up lines stand in the script, in this order."""
    fields = {
        "account": "lab",
        "partition": "short",
        "memory": "32G",
        "modules": ["cuda/12.4"],
        "setup": ["source env"],
    }
    cluster = cluster_from_fields(fields)
    gpu_type = GpuType(name="rtx4090", gpu=find_gpu("rtx-4090"), partitions=("short", "long"), limit_s=7200)
    job = Job(name="stage1", gpu_type=gpu_type, lines=("first", "last"), seconds=1e6, tasks=3)
    text = script(job, cluster, tmp_path_factory.getbasetemp())
    wanted = [
        "--gres=gpu:rtx4090:1",
        "--time=2:00:00",
        "--account=lab",
        "--partition=short",
        "--mem=32G",
        "--array=1-3%8",
    ]
    for option in (*wanted, "--requeue"):
        assert f"#SBATCH {option}\n" in text
    places = [text.index(line) for line in ("#SBATCH", "module load cuda/12.4", "source env", "\nfirst", "exec last")]
    assert places == sorted(places)


@pytest.mark.parametrize("fields", [{"accont": "x"}, {"cpus": 0}, {"time_margin": 0.5}, {"account": "a\nb"}])
def test_what_is_not_allowed_is_refused(fields: dict[str, object]) -> None:
    """Unknown keys, and values out of range."""
    from whichlora import WhichloraError

    with pytest.raises(WhichloraError):
        cluster_from_fields(fields)
