"""`whichlora calibrate` and what it changes in `estimate`, on made runs of small models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("sklearn")

from benchmarks.shared_lab import RAN, Truth, errors, learnt, run, runs, workload
from tests.browsing import quiet_page
from whichlora.cli import main
from whichlora_calibration import predict
from whichlora_estimators.gpus import find_gpu
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import Measurement, open_store, workload_id

CARDS = ("l4", "rtx-4090")
SMALL_CARD = "rtx-2060-6gb"


def made() -> list[Measurement]:
    """Make runs on two cards, one that ran out of memory, and one wild one among many."""
    found = [*runs(CARDS, RAN, 0)]
    rng, truth = random.Random(0), Truth(memory=1.0, time=1.0)
    large = workload(3, batch_size=1024, seq_len=512)
    found.append(run(large, "l4", truth, rng, 900, outcome="oom", error="CUDA out of memory"))
    repeated = [run(workload(1), "l4", Truth.of("l4", 0), rng, 1000 + number) for number in range(9)]
    wild = repeated.pop()
    return [*found, *repeated, wild.with_(process_bytes=(wild.process_bytes or 0) * 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of these runs."""
    path: Path = tmp_path_factory.mktemp("calibrated") / "lab.duckdb"
    open_store(path).add(made())
    return path


@pytest.fixture(autouse=True)
def own_place(store: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep corrections and forecasts away from the user's own."""
    monkeypatch.setenv("WHICHLORA_DB", str(store))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(store.parent))
    monkeypatch.setattr("click.get_app_dir", lambda _: str(store.parent))
    monkeypatch.delenv("WHICHLORA_CORRECTION", raising=False)


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def calibrated(*arguments: object, code: int = 0) -> Result:
    return invoke("calibrate", "--no-published", *arguments, code=code)


def estimated(*arguments: object) -> Any:
    config = Path(str(arguments[0]))
    done = invoke("estimate", config, "--gpu", "l4", "--offline", "--seq-len", 128, "--json", *arguments[1:])
    return json.loads(done.stdout)["predictions"][0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return the config of a model that nobody ran."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(workload(7).config), encoding="utf-8")
    return path


def test_a_dry_run_prints_scores_and_puts_nothing_in_use(store: Path) -> None:
    """Held-out errors of formula and corrected for memory and time, as JSON, and no file."""
    found = json.loads(calibrated("--dry-run", "--json").stdout)
    assert found["schema"] == 1
    for kind in ("memory", "time"):
        part = found[kind]["leave_one_model_out"]
        assert part["corrected"]["median_abs_error"] < part["formula"]["median_abs_error"]
        assert 0.85 <= found[kind]["coverage_90"] <= 1
    assert found["memory"]["false_fits"] == 0
    assert not (store.parent / "correction.json").exists()


def test_what_is_learnt_is_in_use_until_it_is_refused(
    store: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After calibrating, `estimate` says corrected; --no-correction and the variable give the formula back."""
    before = estimated(config, "--no-correction")
    calibrated()
    try:
        after = estimated(config)
        plain = estimated(config, "--no-correction")
        monkeypatch.setenv("WHICHLORA_CORRECTION", "none")
        refused = estimated(config)
    finally:
        (store.parent / "correction.json").unlink()
    assert after["evidence"] == "corrected"
    assert plain["evidence"] == "formula"
    assert before == plain == refused
    assert after["process_bytes"] != plain["process_bytes"]


def test_suggested_runs_are_workloads_that_fit_and_are_new(store: Path) -> None:
    """Each line is a workload, no two are one, each is predicted to fit; what was measured is not suggested again."""
    gpu, first = find_gpu(SMALL_CARD), _suggested(3)
    assert len({workload_id(work) for work in first}) == 3
    assert all(predict(work, gpu, correction=None).estimate.process_bytes < gpu.total_bytes for work in first)
    rng, truth = random.Random(1), Truth(memory=1.0, time=1.0)
    open_store(store).add([run(work, gpu.slug, truth, rng, 2000 + number) for number, work in enumerate(first)])
    second = _suggested(3)
    assert not {workload_id(work) for work in first} & {workload_id(work) for work in second}


def _suggested(count: int) -> list[Workload]:
    lines = calibrated("--suggest", count, "--gpu", SMALL_CARD).stdout.splitlines()
    assert len(lines) == count
    return [workload_from_json(json.loads(line)) for line in lines]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--coverage", "2"), "coverage"),
        (("--db", "nowhere.duckdb"), "no measurements"),
        (("--suggest", "3"), "--suggest needs a card"),
        (("--suggest", "0", "--gpu", "l4"), "--suggest needs a card"),
        (("--suggest", "1", "--gpu", "l44"), "l44"),
    ],
)
def test_what_cannot_be_done_says_so(arguments: tuple[str, ...], said: str) -> None:
    """Exit code 2, and the reason."""
    assert said in calibrated("--dry-run", *arguments, code=2).output


def test_the_report_shows_what_was_learnt(store: Path, request: pytest.FixtureRequest) -> None:
    """One page, with the run that is unlike its repeats named; a browser draws its charts without an error."""
    page = store.parent / "page.html"
    calibrated("--dry-run", "--report", page)
    text = page.read_text(encoding="utf-8")
    wild = made()[-1]
    assert "unlike their repeats" in text
    assert wild.id[:12] in text
    with quiet_page(request.getfixturevalue("browser"), lambda url: url == page.as_uri()) as shown:
        shown.goto(page.as_uri())
        shown.wait_for_function(
            "() => [...document.querySelectorAll('.js-plotly-plot')].every((p) => p.querySelector('.main-svg'))"
        )
        assert shown.locator(".js-plotly-plot").count() >= 5


def test_who_has_no_card_predicts_better_after_pull(tmp_path: Path) -> None:
    """Models that nobody ran, on the lab's cards: the error of bytes and of times falls to less than half."""
    correction = learnt(tmp_path, str(tmp_path / "remote"), 0)
    before, after = errors(None, 0), errors(correction, 0)
    assert all(after[name] < before[name] / 2 for name in before)
