"""Corrections: what they learn, what they refuse to, and that held-out means held out. Cases are made, not measured."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from whichlora_calibration.calibrate import Calibration, calibrate, summary_to_json
from whichlora_calibration.cases import PHASES, TARGETS, Case
from whichlora_calibration.correction import (
    MOST,
    Correction,
    correction_from_json,
    correction_to_json,
    read_correction,
)
from whichlora_calibration.current import correction_history, correction_path, current_correction, save_correction
from whichlora_calibration.fit import Candidate, candidates, choose, fit, folds, held_out, weighted_quantile
from whichlora_calibration.modes import FEWEST_GROUPS
from whichlora_estimators.errors import BadValue

NAMES = ("four bit", "int8", "checkpointing", "log tokens", "log weights")
NOISE = 0.02


def case(place: int, log_ratio: float, *, target: str = "step", **changes: Any) -> Case:
    made: dict[str, Any] = {
        "measurement_id": f"{target}-{place}",
        "target": target,
        "phase": PHASES[target][0],
        "measured": 2.0 * math.exp(log_ratio),
        "predicted": 2.0,
        "out_of_memory": False,
        "card_bytes": 24 * 2**30,
        "features": {**dict.fromkeys(ALL_FEATURES, 0.0), **changes.pop("features", {})},
        "model": f"model {place % 6}",
        "gpu": f"card {place % 4}",
        "stack": "torch 2.6, transformers 4.51",
        "source": "measured",
        "cell": f"cell {place}",
    }
    return Case(**{**made, **changes})


ALL_FEATURES = {name for target in TARGETS for candidate in candidates(target) for name in candidate.features}


def lab(offsets: dict[str, float], count: int = 120, seed: int = 0, **changes: Any) -> list[Case]:
    """Make cases whose cards are off by `offsets` (in logarithms) beside a little noise."""
    rng = random.Random(seed)
    found = []
    for place in range(count):
        gpu = f"card {place % len(offsets)}"
        found.append(case(place, offsets[gpu] + rng.gauss(0, NOISE), gpu=gpu, **changes))
    return found


CARDS = {"card 0": 0.3, "card 1": -0.2, "card 2": 0.1, "card 3": 0.0}


def test_offsets_of_cards_are_found() -> None:
    """With many runs, each card's offset comes out to within the noise."""
    fitted = fit(lab(CARDS), choose(lab(CARDS), candidates("step")))
    for gpu, offset in CARDS.items():
        found = fitted.log_ratio(case(0, 0.0, gpu=gpu))
        assert found == pytest.approx(offset, abs=0.05)


def test_few_runs_shrink_to_the_pool() -> None:
    """A card with one run takes part of the offset it shows, one with many nearly all of it, an unknown one none."""
    pool = lab({"card 0": 0.0, "card 1": 0.0}, count=60)
    candidate = candidates("step")[1]

    def offset(runs: int) -> float:
        new = [case(1000 + i, 0.08, gpu="new") for i in range(runs)]
        return fit([*pool, *new], candidate).log_ratio(case(0, 0.0, gpu="new"))

    one, few, many = (offset(runs) for runs in (1, 4, 40))
    assert 0.005 < one < few < many < 0.085
    assert many > 0.06
    assert abs(fit(pool, candidate).log_ratio(case(0, 0.0, gpu="new"))) < 0.01


def test_outliers_hardly_matter() -> None:
    """One wild run in ten moves no card's offset by more than a little."""
    cases = lab(CARDS)
    wild = [replace(each, measured=each.measured * 50) if place % 10 == 3 else each for place, each in enumerate(cases)]
    candidate = candidates("step")[1]
    clean, spoilt = fit(cases, candidate), fit(wild, candidate)
    for gpu in CARDS:
        probe = case(0, 0, gpu=gpu)
        assert spoilt.log_ratio(probe) == pytest.approx(clean.log_ratio(probe), abs=0.06)


def test_a_feature_that_explains_is_learnt() -> None:
    """Where 4-bit runs are slower than the formula says, it is they that get corrected."""
    rng = random.Random(1)
    cases = []
    for place in range(120):
        packed = float(rng.random() < 0.5)
        features = {"four bit": packed, "log tokens": rng.uniform(2, 4)}
        cases.append(case(place, 0.25 * packed + rng.gauss(0, NOISE), features=features))
    fitted = fit(cases, choose(cases, candidates("step")))
    four_bit, plain = (case(0, 0, features={"four bit": bit, "log tokens": 3.0}) for bit in (1.0, 0.0))
    assert fitted.log_ratio(four_bit) - fitted.log_ratio(plain) == pytest.approx(0.25, abs=0.06)


def test_out_of_memory_is_a_bound_from_below() -> None:
    """A bound above the fit pulls it up; one below it changes nothing."""
    cases = lab({"card 0": 0.0}, count=30, target="process")
    candidate = candidates("process")[1]
    before = fit(cases, candidate)
    probe = case(0, 0, target="process", gpu="card 0")
    above = [case(500 + i, 0.5, target="process", gpu="card 0", out_of_memory=True) for i in range(6)]
    below = [case(600 + i, -0.5, target="process", gpu="card 0", out_of_memory=True) for i in range(6)]
    assert fit([*cases, *above], candidate).log_ratio(probe) > before.log_ratio(probe) + 0.005
    assert fit([*cases, *below], candidate) == before


def test_no_correction_exceeds_a_factor_of_two() -> None:
    """However far off runs are, what is applied stays within the bound."""
    cases = lab({"card 0": 5.0, "card 1": -5.0}, count=40)
    fitted = fit(cases, candidates("step")[1])
    assert fitted.log_ratio(case(0, 0, gpu="card 0")) == MOST
    assert fitted.log_ratio(case(0, 0, gpu="card 1")) == -MOST


@pytest.mark.parametrize("group", ["model", "chip", "source"])
def test_folds_share_no_group_and_hold_everything(group: str) -> None:
    """Each case is in one fold, and no group is in two."""
    cases = lab(CARDS)
    parts = folds(cases, group, 5)
    assert sorted(place for part in parts for place in part) == list(range(len(cases)))
    seen = [{getattr(cases[place], group) for place in part} for part in parts]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_what_is_held_out_is_not_learnt_from() -> None:
    """Changing a group's own measurements does not change what is predicted for it."""
    cases = lab(CARDS, count=48)
    changed = [replace(each, measured=each.measured * 1.3) if each.gpu == "card 2" else each for each in cases]
    before, after = (held_out(some, "chip", candidates("step"))[0] for some in (cases, changed))
    places = [place for place, each in enumerate(cases) if each.gpu == "card 2"]
    assert [before[place] for place in places] == [after[place] for place in places]


def scored(cases: list[Case]) -> Calibration:
    return calibrate(cases, whichlora="0")


def test_a_known_card_is_corrected_and_a_new_one_only_where_that_helps() -> None:
    """Offsets of single cards help on the next model of those cards; the pool's bias helps on any card."""
    found = scored(lab(CARDS)).correction.targets["step"]
    assert found.mode("train", "card 0").applied
    assert found.ratio(case(0, 0).features, "train", "card 0") == pytest.approx(math.exp(0.3), rel=0.05)
    biased = scored(lab({f"card {i}": 0.3 for i in range(FEWEST_GROUPS)})).correction.targets["step"]
    assert biased.mode("train", "never seen").applied
    assert biased.ratio(case(0, 0).features, "train", "never seen") == pytest.approx(math.exp(0.3), rel=0.05)


def test_noise_is_not_corrected() -> None:
    """Where the formula is right but for noise, nothing is applied and every ratio is 1."""
    applied = []
    for seed in range(3):
        found = scored(lab({f"card {i}": 0.0 for i in range(4)}, seed=seed)).correction.targets["step"]
        applied += [mode.applied for mode in found.modes["train"].values()]
        if not found.mode("train", "card 1").applied:
            assert found.ratio(case(0, 0).features, "train", "card 1") == 1.0
    assert sum(applied) <= 2


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_intervals_hold_what_they_promise(coverage: float) -> None:
    """Runs that no fit saw fall into the interval as often as it says, to within the noise of the count."""
    inside = []
    for seed in range(3):
        found = calibrate(lab(CARDS, count=160, seed=seed), coverage=coverage).correction.targets["step"]
        for each in lab(CARDS, count=400, seed=99 + seed):
            expected = each.predicted * found.ratio(each.features, each.phase, each.gpu, each.stack)
            mode = found.mode(each.phase, each.gpu)
            inside.append(mode.low <= each.measured / expected <= mode.high)
    assert sum(inside) / len(inside) == pytest.approx(coverage, abs=0.05)


def test_false_fits_are_counted() -> None:
    """A run that was said to fit and ran out counts; one that was said not to fit does not."""
    total = 24 * 2**30
    ok = [
        case(i, 0.0, target="process", predicted=total / 2, measured=total / 2 * (1 + 0.001 * (i % 7)))
        for i in range(30)
    ]
    wrong = case(90, 0.0, target="process", predicted=total * 0.8, measured=float(total), out_of_memory=True)
    right = case(91, 0.0, target="process", predicted=total * 1.2, measured=float(total), out_of_memory=True)
    assert scored([*ok, right]).correction.false_fits["wrong"] == 0
    counted = scored([*ok, wrong, right]).correction.false_fits
    assert counted["wrong"] == 1
    assert counted["did_not_fit"] == 2
    assert counted["rate"] == pytest.approx(1 / 32)


def test_a_correction_survives_its_file(tmp_path: Path) -> None:
    """Written and read it is the same, and what is no correction is refused by name."""
    made = scored(lab(CARDS)).correction
    path = tmp_path / "correction.json"
    save_correction(made, path)
    assert read_correction(path) == made
    assert correction_from_json(json.loads(json.dumps(correction_to_json(made)))) == made
    wrong: list[Any] = [{}, [], {"schema": 99}, {"schema": 0}, {**correction_to_json(made), "targets": {"step": {}}}]
    for spoilt in wrong:
        with pytest.raises(BadValue):
            correction_from_json(spoilt)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BadValue, match=r"correction\.json"):
        read_correction(path)


def test_a_correction_from_before_there_were_phases_is_read(tmp_path: Path) -> None:
    """Its modes are those of training and of generation, and it says the same of both; a phase that lacks is refused."""
    made = correction_to_json(scored(phased(0.01, 0.01)).correction)
    old = {**made, "schema": 1, "targets": {n: {**p, "modes": p["modes"]["train"]} for n, p in made["targets"].items()}}
    found = correction_from_json(json.loads(json.dumps(old))).targets["allocated"]
    assert found.modes["train"] == found.modes["generate"]
    assert found.modes["train"] == correction_from_json(made).targets["allocated"].modes["train"]
    for spoilt in ({**made, "schema": 1}, {**old, "schema": 2}):
        with pytest.raises(BadValue, match="cannot be read"):
            correction_from_json(spoilt)


def test_the_users_correction_is_used_and_its_history_kept(tmp_path: Path) -> None:
    """The newest one is in use, the others are remembered; a variable may name another or none."""
    environ = {"WHICHLORA_DB": str(tmp_path / "lab.duckdb")}
    first = scored(lab(CARDS)).correction
    second: Correction = replace(scored(lab(CARDS, seed=7)).correction, version="second", made_at="2999-01-01T00:00:00")
    for made in (first, second):
        save_correction(made, correction_path(environ))
    assert current_correction(environ) == second
    assert correction_history(correction_path(environ)) == [second, first]
    assert current_correction({**environ, "WHICHLORA_CORRECTION": "none"}) is None
    with pytest.raises(BadValue, match="nowhere"):
        current_correction({**environ, "WHICHLORA_CORRECTION": str(tmp_path / "nowhere.json")})


def test_scores_are_told_for_memory_and_time() -> None:
    """The summary holds what the documentation promises."""
    cases = [*lab(CARDS, count=40), *lab(CARDS, count=40, target="allocated"), *lab(CARDS, count=40, target="process")]
    summary = summary_to_json(scored(cases))
    for kind in ("memory", "time"):
        for group in ("leave_one_model_out", "leave_one_card_out"):
            for which in ("formula", "corrected"):
                assert 0 <= summary[kind][group][which]["median_abs_error"] < 1
        assert 0 <= summary[kind]["coverage_90"] <= 1
    assert summary["memory"]["false_fits"] == 0
    training = summary["memory"]["phases"]["train"]["leave_one_model_out"]
    assert training == summary["memory"]["leave_one_model_out"]
    assert summary["memory"]["phases"]["generate"]["leave_one_model_out"]["cases"] == 0
    assert set(summary["intervals"]["process"]) == {"train", "generate"}
    corrected, formula = (summary["time"]["leave_one_model_out"][which] for which in ("corrected", "formula"))
    assert corrected["median_abs_error"] < formula["median_abs_error"]


def test_a_candidate_without_columns_is_the_median() -> None:
    """The simplest correction is the weighted median of all log ratios."""
    cases = [case(place, value) for place, value in enumerate((0.1, 0.2, 0.9))]
    plain = Candidate(features=(), penalty=1.0, card_scale=0.0, stack_scale=0.0)
    assert fit(cases, plain).intercept == pytest.approx(0.2)
    assert weighted_quantile([1.0, 2.0, 3.0], [1.0, 1.0, 5.0], 0.5) == 3.0


def test_cards_of_one_chip_are_held_out_together() -> None:
    """What a chip's other card shows is not learnt from where one of them is held out; the card itself is then unknown."""
    cases = lab({f"card {place}": 0.1 * place for place in range(4)}, count=48)
    paired = [replace(each, chip="chip 0" if each.gpu in ("card 0", "card 1") else each.gpu) for each in cases]
    changed = [replace(each, measured=each.measured * 1.3) if each.gpu == "card 1" else each for each in paired]
    (before, known), (after, _) = (held_out(some, "chip", candidates("step")) for some in (paired, changed))
    places = [place for place, each in enumerate(cases) if each.gpu in ("card 0", "card 1")]
    assert [before[place] for place in places] == [after[place] for place in places]
    assert not any(known)


def test_published_times_are_judged_by_a_formula_that_has_not_seen_them() -> None:
    """Scores and intervals hang on unseen numbers alone; what is applied is fitted to the numbers that are given out."""
    offsets = {f"card {place}": 0.3 for place in range(4)}
    seen = [replace(each, unseen=each.predicted, predicted=each.measured) for each in lab(offsets)]
    found, plain = scored(seen), scored(lab(offsets))
    step, other = (each.targets["step"].correction for each in (found, plain))
    assert (step.scores, step.modes) == (other.scores, other.modes)
    assert step.mode("train", "card 0").applied
    assert step.ratio(seen[0].features, "train", "card 0") == pytest.approx(1.0, abs=0.01)
    assert other.ratio(seen[0].features, "train", "card 0") == pytest.approx(math.exp(0.3), rel=0.03)


def test_features_need_models_that_tell_of_them() -> None:
    """Three models do not tell two features from themselves; twelve do."""

    def chosen(models: int) -> Candidate:
        rng, cases = random.Random(2), []
        for place in range(240):
            model = place % models
            features = {"four bit": float(model % 2), "int8": float(model % 3 == 0)}
            ratio = 0.4 * features["four bit"] - 0.3 * features["int8"] + rng.gauss(0, NOISE)
            cases.append(case(place, ratio, model=f"model {model}", features=features))
        return choose(cases, candidates("step"))

    assert chosen(3).features == ()
    assert chosen(12).features == ("four bit", "int8")


def test_few_cards_of_each_time_are_bounded_together() -> None:
    """Three cards a target are too few; with those of the other targets they are enough, and held-out ones are covered."""
    cases = []
    for target, first in (("step", 0), ("decode", 3)):
        rng = random.Random(first)
        for place in range(90):
            gpu = f"card {first + place % 3}"
            offset = random.Random(gpu).gauss(0, 0.1)
            cases.append(case(place, offset + rng.gauss(0, NOISE), target=target, gpu=gpu))
    found = scored(cases)
    for target in ("step", "decode"):
        assert found.targets[target].correction.scores["gpu"]["groups"] == 3
        assert not found.targets[target].correction.mode(PHASES[target][0], "never seen").joined
    few = scored([each for each in cases if each.target == "step"])
    assert few.targets["step"].correction.mode("train", "never seen").joined


def phased(
    train: float, generate: float, models: tuple[int, int] = (8, 8), seed: int = 0, **changes: Any
) -> list[Case]:
    """Make cases of allocated bytes with this much noise in training and in generation, of so many models."""
    rng = random.Random(seed)
    found = []
    for place in range(240):
        phase = ("train", "generate")[place % 2]
        spread, count = (train, models[0]) if phase == "train" else (generate, models[1])
        made = {
            "target": "allocated",
            "phase": phase,
            "features": {"generation": float(phase == "generate")},
            **changes,
        }
        model = f"{phase} model {place // 2 % count}"
        found.append(case(place, rng.gauss(0, spread), model=model, gpu=f"card {place // 2 % 3}", **made))
    return found


def test_training_and_generation_have_intervals_of_their_own() -> None:
    """What generation misses widens no interval of training, and each holds its share of runs that no fit saw."""
    found = scored(phased(0.001, 0.1)).correction.targets["allocated"]
    spans = {phase: found.mode(phase, "card 0") for phase in ("train", "generate")}
    assert spans["train"].high - spans["train"].low < 0.01
    assert spans["generate"].high - spans["generate"].low > 0.2
    fresh = [each for seed in range(1, 4) for each in phased(0.001, 0.1, seed=seed)]
    for phase, mode in spans.items():
        inside = [mode.low <= math.exp(each.log_ratio) <= mode.high for each in fresh if each.phase == phase]
        assert sum(inside) / len(inside) == pytest.approx(0.9, abs=0.08), phase
    for phase, part in found.scores["model"]["phases"].items():
        assert part["groups"] == 8
        assert part["coverage"] == pytest.approx(0.9, abs=0.05), phase


def test_a_phase_of_few_models_borrows_from_the_other() -> None:
    """Two models of training are bounded by all errors, three by their own."""

    def width(models: int) -> float:
        mode = scored(phased(0.001, 0.1, (models, 8))).correction.targets["allocated"].mode("train", "card 0")
        return mode.high - mode.low

    assert width(2) > 0.2
    assert width(3) < 0.02


def test_a_phase_that_is_right_is_not_corrected_for_the_other() -> None:
    """Where generation alone takes a quarter more, generation alone is corrected."""
    off = [
        replace(each, measured=each.measured * 1.25) if each.phase == "generate" else each
        for each in phased(0.002, 0.01)
    ]
    found = scored(off).correction.targets["allocated"]
    features = {phase: next(each.features for each in off if each.phase == phase) for phase in ("train", "generate")}
    assert found.ratio(features["generate"], "generate", "card 0") == pytest.approx(1.25, rel=0.03)
    assert found.ratio(features["train"], "train", "card 0") == 1.0
    assert not found.mode("train", "card 0").applied


def test_a_joined_interval_counts_what_the_formulas_own_holds() -> None:
    """Of few models, runs within the formula's own interval are covered, and need no bounds any wider."""

    def spans(own: tuple[float, float]) -> tuple[float, float, float]:
        found = scored(
            [
                *phased(0.01, 0.01, (8, 8), own=own),
                *[replace(each, target="process", own=own, model="one") for each in phased(0.03, 0.03)],
            ]
        )
        mode = found.targets["process"].correction.mode("train", "card 0")
        assert mode.joined
        return mode.low, mode.high, found.targets["process"].correction.scores["gpu"]["coverage"]

    narrow, wide = spans((0.0, 0.0)), spans((-0.2, 0.2))
    assert wide[1] - wide[0] <= narrow[1] - narrow[0]
    assert wide[2] == 1.0
