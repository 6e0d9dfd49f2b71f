"""Commands that run a module of ours, or pip, in a process of its own, whatever lies in the folder where the user is."""

from __future__ import annotations

import sys

# What `python -m` would do, which looks in the current folder first: for the module, and for all that it imports.
_RUN = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; del sys.argv[0]; "
    "import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """Return the command that runs a module with an interpreter, this one by default."""
    return [python or sys.executable, "-c", _RUN, module, *arguments]
