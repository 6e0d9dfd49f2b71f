"""`whichlora models` and `whichlora gpus`: what is known."""

from __future__ import annotations

import json

import click

from whichlora_estimators.families import all_families
from whichlora_estimators.gpus import search_gpus
from whichlora_estimators.models import search_models
from whichlora_estimators.units import format_bytes

from .tables import table


@click.command()
@click.argument("text", default="")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def models(text: str, as_json: bool) -> None:
    """List bundled models whose name holds TEXT (all without it).

    Any other Hugging Face id, a local folder or a config.json can be given to the other commands too.
    """
    found = search_models(text)
    families = all_families()
    if as_json:
        rows = [{"name": m.name, "family": m.family, "parameters": m.parameters, "source": m.source} for m in found]
        click.echo(json.dumps({"schema": 1, "models": rows}, indent=1))
        return
    lines = [
        (m.name, m.family, f"{m.parameters:,}" if m.parameters else "?", "yes" if m.family in families else "no")
        for m in found
    ]
    click.echo(table(("model", "architecture", "parameters", "predicted"), lines, right=(2,)))
    click.echo(f"{len(found)} models", err=True)


@click.command()
@click.argument("text", default="")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def gpus(text: str, as_json: bool) -> None:
    """List GPUs whose name, architecture or segment holds TEXT (all without it)."""
    found = search_gpus(text)
    if as_json:
        rows = [
            {
                "slug": g.slug,
                "name": g.name,
                "architecture": g.architecture,
                "compute_capability": "{}.{}".format(*g.compute_capability),
                "sm_count": g.sm_count,
                "total_bytes": g.total_bytes,
                "hbm_bytes_per_s": g.hbm_bytes_per_s,
                "bf16_flops_per_s": g.matmul_flops_per_s.bf16,
                "fp16_flops_per_s": g.matmul_flops_per_s.fp16,
                "tf32_flops_per_s": g.matmul_flops_per_s.tf32,
                "fp32_flops_per_s": g.matmul_flops_per_s.fp32,
                "source": g.source,
            }
            for g in found
        ]
        click.echo(json.dumps({"schema": 1, "gpus": rows}, indent=1))
        return
    lines = [
        (
            g.slug,
            g.architecture,
            "{}.{}".format(*g.compute_capability),
            format_bytes(g.total_bytes),
            f"{g.hbm_bytes_per_s / 1e9:.0f} GB/s",
            f"{(g.matmul_flops_per_s.bf16 or 0) / 1e12:.0f}" if g.has_bf16 else "-",
            f"{g.matmul_flops_per_s.fp16 / 1e12:.0f}" if g.matmul_flops_per_s.fp16 else "-",
        )
        for g in found
    ]
    headers = ("gpu", "architecture", "cc", "memory", "bandwidth", "bf16 TFLOP/s", "fp16 TFLOP/s")
    click.echo(table(headers, lines, right=(3, 4, 5, 6)))
    click.echo(f"{len(found)} GPUs", err=True)
