"""Fine-tuning for real on the host: a small Llama, a JSON-lines data set, every method, and what comes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from whichlora.finetune.recipe import make_recipe, read_recipe, write_recipe
from whichlora.finetune.run import Options, run
from whichlora.plan import read_plan
from whichlora_profiles_db import open_store

from .conftest import UNITS, make_plan, read_json

pytestmark = pytest.mark.stack
#: Rates at which so small a model learns something in ten steps.
RATES = {"lora": 0.02, "lora-fa": 0.02, "dora": 0.02, "ia3": 0.3, "prompt-tuning": 0.3, "adalora": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Matrices this small are slower on several threads than on one."""
    import torch

    torch.set_num_threads(1)


def tuned(model: Path, folder: Path, method: str, **options: Any) -> Any:
    settings = {"learning_rate": RATES[method], "eval_steps": 100, "save_steps": 100}
    plan = make_plan(model, folder, methods=[method], finetune=settings)
    recipe = make_recipe(read_plan(plan))
    return run(recipe, folder / "finetune", Options(on="cpu", offline=True, **options))


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(10, 40)[None]).logits[:, -30:]  # virtual tokens come first


@pytest.mark.parametrize("method", RATES)
def test_loss_falls_and_the_adapter_loads_in_plain_peft(method: str, small_model: Path, tmp_path: Path) -> None:
    """The last loss is below the first, PEFT alone loads the adapter, which changes the output, and the store knows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with open_store(tmp_path / "store.duckdb") as store:
        found = tuned(small_model, tmp_path, method, store=store)
        (kept,) = store.query()
    assert found.outcome == "ok"
    assert found.steps == found.total_steps == 16
    assert found.last_loss < found.first_loss
    base = AutoModelForCausalLM.from_pretrained(small_model)
    before = logits(base)
    assert not torch.allclose(logits(PeftModel.from_pretrained(base, found.adapter)), before, atol=1e-3)
    assert kept.id == found.measurement
    assert (kept.device, kept.evidence, kept.outcome) == ("cpu", "measured", "ok")
    assert kept.workload.method == method
    assert kept.step is not None
    assert kept.trainable_params
    assert kept.process_bytes


def test_a_merged_model_answers_as_model_and_adapter_do(small_model: Path, tmp_path: Path) -> None:
    """Merging changes nothing about the output; the evaluation's scores are shares and its perplexity is at least 1."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = tuned(small_model, tmp_path, "lora", merge=True, evaluate=True)
    base = AutoModelForCausalLM.from_pretrained(small_model)
    with_adapter = logits(PeftModel.from_pretrained(base, found.adapter))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(found.merged)), with_adapter, atol=1e-4)
    scores = found.scores
    assert scores.samples == 8
    assert 0 <= scores.exact_match <= scores.jaccard <= 1
    assert scores.perplexity >= 1
    assert scores.tokens_per_s > 0


def test_a_finished_run_is_not_run_again(small_model: Path, tmp_path: Path) -> None:
    """The second call returns what the first one did and trains nothing; another recipe is refused the folder."""
    from whichlora import BadValue

    first = tuned(small_model, tmp_path, "lora")
    lines = (tmp_path / "finetune" / "log.jsonl").read_text(encoding="utf-8")
    recipe = make_recipe(read_plan(tmp_path))
    assert run(recipe, tmp_path / "finetune", Options(on="cpu")) == first
    assert (tmp_path / "finetune" / "log.jsonl").read_text(encoding="utf-8") == lines
    evaluated = run(recipe, tmp_path / "finetune", Options(on="cpu", evaluate=True))
    assert evaluated.scores is not None
    assert dataclasses.replace(evaluated, scores=None) == first
    write_recipe(recipe, tmp_path / "finetune")
    assert read_recipe(tmp_path / "finetune") == recipe
    other = make_recipe(read_plan(make_plan(small_model, tmp_path / "other", ranks=[8])))
    with pytest.raises(BadValue, match="another fine-tuning"):
        write_recipe(other, tmp_path / "finetune")


def test_the_first_batch_is_the_largest(small_model: Path, tmp_path: Path) -> None:
    """Whatever follows, no batch is longer than the first: a run that will run out of memory does so at once."""
    import json

    tuned(small_model, tmp_path, "ia3")
    lines = map(json.loads, (tmp_path / "finetune" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    widths = [line["width"] for line in lines if "width" in line]
    assert widths[0] == max(widths) > min(widths)
    assert read_json(tmp_path / "finetune" / "result.json")["outcome"] == "ok"


def test_a_run_has_the_steps_that_its_plan_says(small_model: Path, tmp_path: Path) -> None:
    """Micro-batches are accumulated and samples grouped as the plan has it; its measurement is of such a step."""
    stage2 = {"batch_size": [4], "accumulation": [3]}
    data = {"source": str(UNITS), "validation_share": 0.1, "test_share": 0.1, "group_by_length": True}
    plan = read_plan(make_plan(small_model, tmp_path, stage2_profile=stage2, dataset=data))
    assert plan.choice is not None
    assert plan.choice.schedule is not None
    with open_store(tmp_path / "store.duckdb") as store:
        found = run(make_recipe(plan), tmp_path / "finetune", Options(on="cpu", offline=True, store=store))
        (kept,) = store.query()
    assert found.outcome == "ok"
    assert found.steps == plan.choice.schedule.total_steps == 2 * -(-64 // (4 * 3))
    assert (kept.workload.batch_size, kept.workload.accumulation) == (4, 3)
    assert kept.workload.seq_len == plan.choice.schedule.longest_tokens
