"""The command line: each command parses, calls the library, prints. stdout is data, stderr is talk."""

from __future__ import annotations

import errno
import io
import sys
from importlib import import_module
from typing import Any

import click

from whichlora_estimators.errors import WhichloraError

#: Where each command lives; a module is imported when its command is asked for.
COMMANDS = {
    "estimate": "estimate",
    "rehearse": "rehearse",
    "phantom": "phantom",
    "verify": "verify",
    "pick": "pick",
    "data": "data",
    "finetune": "finetune",
    "slurm": "slurm",
    "calibrate": "calibrate",
    "profiles": "profiles",
    "serve": "serve",
    "models": "known",
    "gpus": "known",
}


class _Failed(click.ClickException):
    """An error that the user can mend."""

    exit_code = 2


class _Group(click.Group):
    """Imports commands when they are called, and turns the one family of errors, and the system's, into exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{COMMANDS[cmd_name]}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and say what is wrong, its value and what to do where something is."""
        _print_anything()
        try:
            return super().invoke(ctx)
        except WhichloraError as error:
            raise _Failed(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read us has had enough: click ends quietly
                raise
            todo = (
                f"{error.strerror or type(error).__name__}: check the path, your rights there and the room on the disk."
            )
            raise _Failed(str(WhichloraError("cannot read or write", value=error.filename, todo=todo))) from None


def _print_anything() -> None:
    """Print ? for what the terminal's encoding lacks, rather than to stop there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="whichlora")
def main() -> None:
    """Which base model, LoRA variant and batch size fit a GPU and finish in time."""
