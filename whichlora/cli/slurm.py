"""`whichlora slurm`: job scripts for every GPU type of a cluster, and their submission."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.units import format_seconds

from ..pickconfig import PickConfig, config_from_fields, read_fields
from .tables import table


@click.command()
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.yaml")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("jobs"), show_default=True, help="Folder for jobs."
)
@click.option("--type", "only", multiple=True, help="A GPU type of the cluster (default: all that it has); repeatable.")
@click.option("--gpu-type", "gpu_types", multiple=True, metavar="THEIRS=OURS", help="Which card a type is; repeatable.")
@click.option("--account", help="Account to charge.")
@click.option("--partition", help="Partition (default: those that have the type).")
@click.option("--qos", help="Quality of service.")
@click.option("--memory", help="Host memory of a job, as for sbatch --mem (default: by the largest model).")
@click.option("--cpus", type=click.IntRange(min=1), help="Processors of a job.")
@click.option("--time-margin", type=click.FloatRange(min=1), help="Times the predicted time is asked for.")
@click.option("--module", "modules", multiple=True, help="Module to load first; repeatable.")
@click.option("--setup", multiple=True, help="Shell line to run after the modules; repeatable.")
@click.option("--on", type=click.Choice(("auto", "null")), default="auto", show_default=True, help="null: a trial.")
@click.option("--db", type=click.Path(path_type=Path), help="The store that jobs write to (default: the user's).")
@click.option("--offline", is_flag=True, help="Neither this command nor the jobs ask the Hugging Face Hub.")
@click.option("--submit", "submits", is_flag=True, help="Submit the jobs too.")
def slurm(config: Path, out: Path, only: tuple[str, ...], submits: bool, **options: Any) -> None:
    """Write jobs for every GPU type that `sinfo` tells of: measure inference, measure fine-tuning, tune the choice.

    Each type gets a chain of jobs in which one starts when the one before it has ended well. A job that is killed or
    runs out of time goes on where it was. No GPU is needed here. Options go before the section `slurm` of the config.
    """
    from ..slurm.chains import Settings, submit, write_chains
    from ..slurm.cluster import find_types

    fields = read_fields(config)
    parsed = _with_options(config_from_fields(fields | {"gpu": _any_card(fields)}, folder=config.parent), options)
    types = find_types(parsed.cluster, only=only)
    settings = Settings(folder=out, **{name: options[name] for name in ("db", "on", "offline")})
    chains = write_chains(parsed, fields, types, settings, report=lambda text: click.echo(text, err=True))
    rows = [(chain.gpu_type.name, chain.gpu_type.gpu.slug, *_chosen(chain.choice)) for chain in chains]
    click.echo(table(("type", "gpu", "predicted choice", "batch", "time"), rows, right=(3, 4)))
    click.echo(f"wrote {out}: submit.sh and {sum(len(chain.scripts) for chain in chains)} jobs", err=True)
    if submits:
        for path, job in submit(chains).items():
            click.echo(f"{job} {path.parent.name}/{path.name}")


def _any_card(fields: dict[str, Any]) -> Any:
    """Stand in for the card, which a cluster's config need not name: each type of the cluster takes its place."""
    return fields.get("gpu") or "a100-sxm-80gb"


def _chosen(choice: Any) -> tuple[str, str, str]:
    if choice is None:
        return "none", "-", "-"
    time = "-" if choice.time_s is None else format_seconds(choice.time_s)
    return f"{choice.model} {choice.method} r{choice.workload.rank}", str(choice.workload.batch_size), time


def _with_options(config: PickConfig, options: dict[str, Any]) -> PickConfig:
    names = ("account", "partition", "qos", "memory", "cpus", "time_margin", "modules", "setup")
    given = {name: options[name] for name in names if options[name]}
    pairs = [text.partition("=") for text in options["gpu_types"]]
    for theirs, equals, ours in pairs:
        if not (theirs and equals and ours):
            raise BadValue("not a GPU type", value=theirs, todo="Write THEIRS=OURS, such as a100=a100-sxm-40gb.")
    types = dict(config.cluster.gpu_types) | {theirs: ours for theirs, _, ours in pairs}
    return replace(config, cluster=replace(config.cluster, gpu_types=types, **given))
