"""`whichlora finetune`: run the choice of a plan for real, from where it was left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import WhichloraError

from ..apart import module_command
from ..data.spec import DataSpec, data_from_fields
from ..finetune.recipe import Recipe, checked, make_recipe, write_recipe
from ..plan import read_plan
from ..rehearse.rehearsals import need

ON = ("auto", "cuda", "cpu", "null")


@click.command()
@click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of results (default: `finetune` beside PLAN).")
@click.option("--on", type=click.Choice(ON), default="auto", show_default=True, help="auto: cuda if there is a card.")
@click.option("--model-path", type=click.Path(path_type=Path), help="Local checkpoint in place of a download.")
@click.option("--data", "source", help="Another data set than the plan's: a file, an id of the Hub, MODULE:CLASS.")
@click.option("--evaluate", is_flag=True, help="Answer the test split: exact match, Jaccard, perplexity, tokens/s.")
@click.option("--merge", is_flag=True, help="Also write the base model with the adapter merged into it.")
@click.option("--store/--no-store", "stored", default=True, show_default=True, help="Keep a measurement of the run.")
@click.option("--db", type=click.Path(path_type=Path), help="The store (default: $WHICHLORA_DB or the user's).")
@click.option("--offline", is_flag=True, help="Do not ask the Hugging Face Hub.")
def finetune(plan: Path, out: Path | None, source: str | None, model_path: Path | None, **options: Any) -> None:
    """Fine-tune what PLAN (of `whichlora pick`) chose: checkpoints, log, adapter and result go to one folder.

    Interrupted in whatever way, the same command goes on from the last checkpoint. The run's peaks and step times are
    stored as a measurement, out of memory and failures included, and compared with what was predicted.
    """
    from ..finetune.__main__ import main

    found = read_plan(plan)
    recipe = make_recipe(found, data=_data(source), model_path=model_path)
    folder = out or (plan if plan.is_dir() else plan.parent) / "finetune"
    need(("torch", "transformers", "peft", "accelerate"))
    on = _device(options.pop("on"))
    checked(recipe, on=on, merge=options["merge"])
    write_recipe(recipe, folder)
    given = {**options, "db": str(options["db"]) if options["db"] else None, "folder": str(folder), "on": on}
    if on == "null":
        _become_null(recipe, given)
    if on == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one card: what was predicted
    sys.exit(main(given))


def _data(source: str | None) -> DataSpec | None:
    spec = data_from_fields({"source": source}) if source else None
    return None if spec is None else spec.located()


def _device(on: str) -> str:
    """Settle where to run; a look for a card uses no memory of it."""
    import torch

    there = torch.cuda.is_available() and torch.version.cuda is not None
    if on == "cuda" and not there:
        todo = "Use --on cpu for a small model, or --on null to see what it would take."
        raise WhichloraError("PyTorch sees no card", value=on, todo=todo)
    return on if on != "auto" else "cuda" if there else "cpu"


def _become_null(recipe: Recipe, given: dict[str, Any]) -> None:
    """Replace this process by one on the null device: signals of a scheduler then reach it."""
    from ..finetune.run import null_environment

    sys.stdout.flush()
    sys.stderr.flush()
    variables = null_environment(recipe)
    os.execve(sys.executable, module_command("whichlora.finetune", json.dumps(given)), variables)
