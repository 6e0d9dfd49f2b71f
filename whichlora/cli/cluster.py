"""The options that spread a sweep over a cluster, for the commands that take a file of workloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
            help="An option for Slurm's jobs, such as partition=gpu; each gres=gpu:TYPE:1 gets an array of its own.",
        ),
        click.option("--array-size", type=int, default=ARRAY_SIZE, show_default=True, help="Tasks of the job array."),
        click.option(
            "--cluster", type=click.Choice(CLUSTERS), help="Spread --workloads over a job array (slurm) or processes."
        ),
    ):
        command = option(command)
    return command


def sweeps(command: list[str], asked: list[Workload], options: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run a command of ours over workloads on the cluster that the options name; return its answers in order.

    Each `gres` among the options gets a job array of its own over all of the workloads, side by side, and a list here.
    """
    store, clusters = open_store(options["db"]), _clusters(options)
    if len(clusters) == 1:
        return [list(sweep(command, asked, store, clusters[0], on_progress=_tell))]
    with ThreadPoolExecutor(max_workers=len(clusters)) as pool:
        return list(pool.map(lambda one: list(sweep(command, asked, store, one, on_progress=_tell)), clusters))


def _tell(done: int, tasks: int, what: str) -> None:
    click.echo(f"[{done}/{tasks} tasks] {what}", err=True)


def _clusters(options: dict[str, Any]) -> list[Cluster]:
    pairs = [given.partition("=") for given in options["cluster_options"]]
    if bad := [name for name, sign, _ in pairs if not sign]:
        raise BadValue("a cluster option without its value", value=bad[0], todo="Write NAME=VALUE.")
    settings = {name.removeprefix("slurm_").replace("-", "_"): value for name, _, value in pairs}
    cards = [value for name, _, value in pairs if name == "gres"]
    each = [settings | {"gres": card} for card in dict.fromkeys(cards)] or [settings]
    return [Cluster(kind=options["cluster"], array_size=options["array_size"], options=one) for one in each]


def echo_sweeps(
    lines: list[Workload | dict[str, Any]],
    found: list[list[dict[str, Any]]],
    *,
    as_json: bool,
    line: Callable[[Any], str],
) -> None:
    """Print an answer for each line of the file, once for each array: the cluster's, or what was wrong with the line."""
    for answers in map(iter, found):
        for given in lines:
            shown = next(answers) if isinstance(given, Workload) else given
            click.echo(json.dumps(shown) if as_json else line(shown))
