"""A recipe: everything that one fine-tuning is made from. It is written beside its results, and reads back as it was."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue, Unsupported, WhichloraError
from whichlora_estimators.files import write_whole
from whichlora_estimators.gpus import Gpu
from whichlora_estimators.workload import Workload, workload_from_json
from whichlora_profiles_db import workload_to_json

from ..data.spec import DataSpec
from ..plan import Plan, Predicted
from ..records import from_json, to_json
from .settings import Training

SCHEMA = 2
FILE = "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What runs: a workload on data for some epochs. `workload.seq_len` is the most tokens of a sample.

    `model` and `tokenizer` are local folders or ids of the Hub. `predicted` is what the plan expects on `gpu`.
    """

    workload: Workload
    model: str
    tokenizer: str
    data: DataSpec
    training: Training
    epochs: int
    gpu: Gpu
    predicted: Predicted | None

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward and backward pass."""
        return self.workload.batch_size


def make_recipe(plan: Plan, *, data: DataSpec | None = None, model_path: Path | None = None) -> Recipe:
    """Make the recipe of a plan's choice, with other data or a local copy of its model where these are given.

    Raises WhichloraError for a plan without a choice or without data, and for a task that is not language modelling.
    """
    choice = plan.choice
    if choice is None:
        todo = "Its report says what came closest; relax a limit and pick anew."
        raise WhichloraError("the plan chose nothing to fine-tune", todo=todo)
    spec = data or plan.finetune.data
    if spec is None:
        todo = "Add `dataset: {source: …}` to the config and pick anew, or give --data."
        raise BadValue("the plan names no data set", todo=todo)
    if choice.workload.task != "causal":
        todo = "Fine-tune it with a script of your own; docs/finetune.md says what this command does."
        raise Unsupported("only language models are fine-tuned here", value=choice.workload.task, todo=todo)
    source = plan.finetune.source(choice.workload.model)
    path = _local(model_path) if model_path else source.path
    tokenizer = path if path and source.tokenizer == source.model else source.tokenizer
    training = plan.finetune.training
    return Recipe(
        workload=choice.workload,
        model=path or source.model,
        tokenizer=tokenizer,
        data=spec,
        training=training,
        epochs=choice.epochs or 1,
        gpu=plan.gpu,
        predicted=choice.predicted,
    )


def _local(path: Path) -> str:
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise BadValue("no model at this path", value=str(path), todo="Give a folder with a config.json and weights.")
    return str(folder.resolve())


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Put a recipe into a folder of results. Raises BadValue where another recipe is there already."""
    text = json.dumps(recipe_to_json(recipe), indent=1) + "\n"
    file = folder / FILE
    if file.exists() and file.read_text(encoding="utf-8") != text:
        todo = "Go on with the plan that it was made from, or name another folder with --out."
        raise BadValue("the folder holds another fine-tuning", value=str(folder), todo=todo)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole({file: text})


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a folder. Raises BadValue where there is none."""
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadValue("no recipe in this folder", value=str(folder), todo=f"{error}.") from None
    return recipe_from_json(fields)


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return what recipe.json holds."""
    return {"schema": SCHEMA, **to_json(recipe, {Workload: workload_to_json})}


def recipe_from_json(fields: Any) -> Recipe:
    """Validate what a recipe.json holds. Raises WhichloraError that names the place."""
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise BadValue("not a recipe of this version", todo="Start anew from the plan, in another folder.")
    rest = {key: value for key, value in fields.items() if key != "schema"}
    return from_json(Recipe, rest, "", {Workload: _workload})


def _workload(value: Any, where: str) -> Workload:
    if not isinstance(value, dict):
        raise BadValue(f"{where} must be an object", todo="Start anew from the plan.")
    return workload_from_json(value)


def checked(recipe: Recipe, *, on: str, merge: bool) -> Recipe:
    """Refuse what cannot run before anything is loaded. Raises Unsupported or UnknownName."""
    from ..rehearse.adapters import check

    workload = recipe.workload
    check(workload)
    if on == "cpu" and (
        workload.quantization != "none" or "8bit" in workload.optimizer or "paged" in workload.optimizer
    ):
        what = workload.quantization if workload.quantization != "none" else workload.optimizer
        todo = "Use a card (--on cuda) or the null device (--on null), or pick without it."
        raise Unsupported("bitsandbytes' kernels are not trained with on a CPU here", value=what, todo=todo)
    if merge and workload.method in ("full", "prompt-tuning", "prefix-tuning", "p-tuning"):
        todo = "Leave out --merge."
        raise Unsupported("this method has nothing that merges into the weights", value=workload.method, todo=todo)
    return dataclasses.replace(recipe, workload=workload)
