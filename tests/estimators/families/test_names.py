"""Names of weights and of linear layers, by which targets, ranks and modules are chosen, against Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whichlora_estimators.tape import Tape
from whichlora_estimators.timeline import build_model
from whichlora_estimators.workload import Workload

from ..golden import AUTO, golden_lines

FILES = sorted(Path(__file__).parent.glob("golden_*.jsonl"))


def real_model(config: dict[str, Any], task: str) -> Any:
    import torch
    import transformers

    fields = dict(config)
    real = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    real._attn_implementation = "eager"
    with torch.device("meta"):
        return getattr(transformers, AUTO[task]).from_config(real)


@pytest.mark.stack
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_weights_and_linear_layers_have_their_real_names(path: Path) -> None:
    """Every weight is called as in Transformers, and the layers that "all-linear" means are those that PEFT takes."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    seen = {}
    for line in golden_lines(path):
        tied = line["config"].get("tie_word_embeddings")
        seen[line["config"]["model_type"], line["task"], tied] = line
    for (_, task, _), line in seen.items():
        real = real_model(line["config"], task)
        workload = Workload(model="golden", config=line["config"], task=task)
        build = build_model(workload, Tape(), workload.config).build
        names: dict[int, set[str]] = {}  # of each weight; one that is tied has several, and here one of them
        for name, weight in real.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), set()).add(name)
        ours = {p.name for p in build.parameters}
        assert [known for known in names.values() if len(known & ours) != 1] == []
        assert ours <= set().union(*names.values())
        kind = {"seq-cls": "SEQ_CLS", "token-cls": "TOKEN_CLS"}.get(task)
        chosen: Any = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear", task_type=kind), real)
        heads = {name for name in chosen.target_modules or () if {"classifier", "score"} & {*name.split(".")}}
        saved = heads if kind else set()
        assert {layer.name for layer in build.linears} == {*(chosen.target_modules or ())} - saved
