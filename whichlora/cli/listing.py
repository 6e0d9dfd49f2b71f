"""`whichlora profiles list|show|stats`: what the store and the published pack hold."""

from __future__ import annotations

import click


@click.command("list")
def list_profiles() -> None:
    """List measurements, the latest first."""


@click.command()
def show() -> None:
    """Show one measurement in full."""


@click.command()
def stats() -> None:
    """Count measurements by card and evidence."""
