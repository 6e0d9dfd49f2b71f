"""The search: its laws, its config, its policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import whichlora
from whichlora import BadValue, PickConfig, WhichloraError, config_from_fields, pick, read_config
from whichlora_calibration import Verdict

SMALL: dict[str, Any] = {
    "gpu": "l4",
    "stage1_profile": {"model_names": ["gpt2", "facebook/opt-125m"], "prefill_length": 64, "tokens_to_generate": 16},
    "stage2_profile": {"batch_size": [1, 4]},
    "seq_len": 128,
}


def config(**changes: Any) -> PickConfig:
    return config_from_fields({**SMALL, **changes})


def test_choice_is_the_largest_model_that_satisfies() -> None:
    """The choice has the most parameters of all rows that were not rejected."""
    result = pick(config(dataset={"samples": 100}))
    assert result.choice is not None
    assert result.choice.parameters == max(row.parameters for row in result.stage2 if not row.rejected)
    assert result.prediction is not None
    assert result.prediction.estimate.workload == result.choice.workload


def test_every_rejected_row_says_why_and_every_other_keeps_the_limits() -> None:
    """Reasons and limits agree on every row of both stages."""
    result = pick(config(stage2_profile={"batch_size": [1, 8, 64], "peak_memory_gb": 4}, dataset={"samples": 64}))
    assert any(row.rejected for row in result.stage2)
    for row in result.stage2:
        if row.process_bytes is None:
            assert row.rejected
        else:
            assert bool(row.rejected) == (row.process_bytes[1] > 4e9)


def test_more_memory_never_means_a_smaller_model() -> None:
    """Relaxing a limit keeps or enlarges the choice."""
    sizes = []
    for limit_gb in (0.5, 1, 2, 4, 20):
        result = pick(config(stage2_profile={"batch_size": [1, 4], "peak_memory_gb": limit_gb}))
        sizes.append(result.choice.parameters if result.choice else 0)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_stage_1_limits_keep_models_out_of_stage_2() -> None:
    """A model that serves too slowly is not fine-tuned; all models that pass are kept."""
    profile = {**SMALL["stage1_profile"], "time_per_token_ms": 1e-6}
    result = pick(config(stage1_profile=profile))
    assert result.kept == ()
    assert result.stage2 == ()
    assert result.choice is None
    assert all("too slow" in row.rejected[0] for row in result.stage1)
    assert set(pick(config()).kept) == {"openai-community/gpt2", "facebook/opt-125m"} or len(pick(config()).kept) == 2


def test_time_limit_needs_and_uses_the_data_set() -> None:
    """Total time is linear in the data set, and a limit below it rejects."""
    with pytest.raises(BadValue, match="dataset"):
        config(stage2_profile={"total_time_mins": 10})
    one, two = (pick(config(dataset={"samples": n})) for n in (400, 800))
    for a, b in zip(one.stage2, two.stage2, strict=True):
        assert (a.time_s is None) == (b.time_s is None)
        if a.time_s is not None and b.time_s is not None:
            assert b.time_s == pytest.approx(2 * a.time_s)
    tight = config(dataset={"samples": 400}, stage2_profile={"batch_size": [1, 4], "total_time_mins": 1e-6})
    assert pick(tight).choice is None


def test_less_lossy_storage_comes_first() -> None:
    """Of two methods that fit, 16-bit weights are preferred to 4-bit ones whatever the order in the config."""
    result = pick(config(methods=["qlora", "lora"]))
    assert result.choice is not None
    assert result.choice.method == "lora"


def test_verdicts_follow_from_the_range() -> None:
    """fits, tight and does-not-fit are what the range says of the card."""
    for row in pick(config(stage2_profile={"batch_size": [1, 64, 128, 256]})).stage2:
        if row.process_bytes is None:
            continue
        low, high = row.process_bytes
        limit = whichlora.find_gpu("l4").total_bytes
        expected = Verdict.FITS if high <= limit else Verdict.TIGHT if low <= limit else Verdict.DOES_NOT_FIT
        assert row.verdict is expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gpu": None}, "gpu"),
        ({"gpu": "gtx-1"}, "gtx-1"),
        ({"gpus": "l4"}, "gpus"),
        ({"stage1_profile": []}, "stage1_profile"),
        ({"stage1_profile": {"model_names": []}}, "model_names"),
        ({"stage1_profile": {"model_names": [3]}}, "model_names"),
        ({"stage1_profile": {"batch_size": [0]}}, "stage1_profile.batch_size"),
        ({"stage1_profile": {"batch_size": [True]}}, "stage1_profile.batch_size"),
        ({"stage1_profile": {"time_per_token_ms": -1}}, "time_per_token_ms"),
        ({"stage1_profile": {"peak_memory_gb": "lots"}}, "peak_memory_gb"),
        ({"stage1_profile": {"satisfy": "most"}}, "most"),
        ({"stage1_profile": {"model_names": ["gpt2"], "tokenizers": ["a", "b"]}}, "tokenizers"),
        ({"stage2_profile": {"total_time_minutes": 5}}, "total_time_minutes"),
        ({"methods": ["lora", "qlorra"]}, "qlorra"),
        ({"methods": []}, "methods"),
        ({"methods": [{"method": "lora", "bits": 4}]}, "bits"),
        ({"ranks": [-8]}, "-8"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 1.5}, "seq_len"),
        ({"precision": "bf17"}, "bf17"),
        ({"checkpointing": "sometimes"}, "checkpointing"),
        ({"dropout": 1}, "dropout"),
        ({"dataset": {"rows": 5}}, "rows"),
    ],
)
def test_wrong_configs_name_the_key_and_the_value(changes: dict[str, Any], named: str) -> None:
    """Every mistake is refused before anything is searched."""
    with pytest.raises(WhichloraError) as caught:
        config(**changes)
    assert named in str(caught.value)
    assert caught.value.todo


@pytest.mark.parametrize("text", ["gpu: [", "- a\n- b\n", "", "gpu: l4\n\tx: 1\n", "\x00"])
def test_unreadable_yaml_is_refused(text: str, tmp_path: Path) -> None:
    """What is not a mapping in YAML is one clear error."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadValue):
        read_config(path)


def test_missing_config_is_refused(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(BadValue, match="nowhere"):
        read_config(tmp_path / "nowhere.yaml")


def test_a_custom_card_can_be_described() -> None:
    """A mapping in place of a name describes a card of one's own."""
    own = {
        "name": "My card",
        "compute_capability": "8.9",
        "sm_count": 100,
        "total_bytes": 20_000_000_000,
        "hbm_bytes_per_s": 9e11,
        "matmul_flops_per_s": {"bf16": 1e14, "fp16": 1e14, "tf32": 5e13, "fp32": 4e13},
    }
    assert config(gpu=own).gpu.total_bytes == 20_000_000_000


def test_a_rank_above_a_layers_width_rejects_its_rows() -> None:
    """The mistake is a reason in the table, and other ranks are still searched."""
    result = pick(config(ranks=[8, 4096]))
    reasons = {row.rejected for row in result.stage2 if row.workload.rank == 4096}
    assert all("rank above" in reason[0] for reason in reasons)
    assert result.choice is not None
