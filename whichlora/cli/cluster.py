"""The options that spread a sweep over a cluster, for the commands that take a file of workloads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.workload import Workload
from whichlora_profiles_db import open_store

from ..cluster import ARRAY_SIZE, CLUSTERS, Cluster, sweep

_Command = TypeVar("_Command", bound=Callable[..., Any])


def cluster_options(command: _Command) -> _Command:
    """Add --cluster, --array-size and --cluster-option."""
    for option in (
        click.option(
            "--cluster-option",
            "cluster_options",
            multiple=True,
            metavar="NAME=VALUE",
            help="An option for Slurm's jobs, such as partition=gpu or gres=gpu:a100:1; repeatable.",
        ),
        click.option("--array-size", type=int, default=ARRAY_SIZE, show_default=True, help="Tasks of the job array."),
        click.option(
            "--cluster", type=click.Choice(CLUSTERS), help="Spread --workloads over a job array (slurm) or processes."
        ),
    ):
        command = option(command)
    return command


def swept(command: list[str], asked: list[Workload], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a command of ours over workloads on the cluster that the options name; yield its answers in order."""

    def tell(done: int, tasks: int, what: str) -> None:
        click.echo(f"[{done}/{tasks} tasks] {what}", err=True)

    pairs = [given.partition("=") for given in options["cluster_options"]]
    if bad := [name for name, sign, _ in pairs if not sign]:
        raise BadValue("a cluster option without its value", value=bad[0], todo="Write NAME=VALUE.")
    settings = {name.removeprefix("slurm_").replace("-", "_"): value for name, _, value in pairs}
    cluster = Cluster(kind=options["cluster"], array_size=options["array_size"], options=settings)
    return sweep(command, asked, open_store(options["db"]), cluster, on_progress=tell)


def echo_sweep(
    lines: list[Workload | dict[str, Any]],
    answers: Iterator[dict[str, Any]],
    *,
    as_json: bool,
    line: Callable[[Any], str],
) -> None:
    """Print an answer for each line of the file: the cluster's, or what was wrong with the line."""
    for given in lines:
        shown = next(answers) if isinstance(given, Workload) else given
        click.echo(json.dumps(shown) if as_json else line(shown))
    for _ in answers:  # lets the sweep tidy up
        pass
