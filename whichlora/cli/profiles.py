"""`whichlora profiles`: what was measured, by whom and where. Each of its commands is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

#: Where each command of the group lives: module of this package, and the command's name in it.
COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("listing", "list_profiles"),
    "show": ("listing", "show"),
    "stats": ("listing", "stats"),
    "export": ("packs", "export"),
    "import": ("packs", "import_"),
    "check": ("packs", "check"),
    "push": ("packs", "push_"),
    "pull": ("packs", "pull_"),
    "sync": ("packs", "sync"),
    "merge": ("packs", "merge"),
}


class _Profiles(click.Group):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"whichlora.cli.{module}"), name)
        return command


@click.group(cls=_Profiles)
def profiles() -> None:
    """Look into the store of measurements, and exchange them with others."""
