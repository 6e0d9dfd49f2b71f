"""`whichlora phantom`: a checkpoint without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from whichlora_estimators.units import format_bytes, parse_bytes

from ..api import SCHEMA
from ..checkpoints import Sources, find_sources
from ..rehearse.rehearsals import need


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16, float16 or float32.")
@click.option("--shard-size", default="5GB", show_default=True, help="The most bytes of one file.")
@click.option("--offline", is_flag=True, help="Do not ask the Hub for a configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def phantom(model: str, folder: Path, dtype: str, shard_size: str, offline: bool, as_json: bool) -> None:
    """Write a checkpoint of MODEL without weights to DIR, a new or empty folder.

    MODEL is a name that `whichlora models` lists, any name of the Hub, or a config.json or its folder. Every tensor has its
    name, dtype, shape and shard, in sparse files that take hardly any room: from_pretrained loads it, and reads zeros.
    Tokenizer and generation config are copied where they are at hand: beside the config.json, or in the Hub's cache.
    """
    from ..phantom import write_phantom

    need(("torch", "transformers"))
    sources = find_sources(model, offline=offline)
    report = write_phantom(
        sources.config, folder, dtype=dtype, shard_bytes=int(parse_bytes(shard_size)), files=sources.files
    )
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "model": model, **_facts(report, sources)}, indent=1))
        return
    click.echo(f"{report.folder}: {report.parameters:,} parameters in {report.tensors:,} tensors")
    click.echo(
        f"{len(report.shards)} files of {format_bytes(report.weights_bytes)}, {format_bytes(report.disk_bytes)} on disk"
    )
    click.echo(f"configuration: {sources.config_source}")
    click.echo(f"tokenizer: {'copied' if sources.has_tokenizer else 'not at hand, left out'}")


def _facts(report: Any, sources: Sources) -> dict[str, Any]:
    names = ("shards", "tensors", "parameters", "weights_bytes", "disk_bytes")
    facts = {name: getattr(report, name) for name in names}
    return {
        "folder": str(report.folder),
        **facts,
        "config_source": sources.config_source,
        "tokenizer": sources.has_tokenizer,
        "files": sorted(sources.files),
    }
