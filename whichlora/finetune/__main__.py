"""A process that fine-tunes by the recipe in a folder; how it is run stands in its one argument, as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError
from whichlora_profiles_db import open_store

from .recipe import read_recipe
from .run import Options, lines, run

#: Exit statuses: a failure, a mistake that the user can mend, and a stop that was asked for (128 + SIGTERM).
STATUS = {"ok": 0, "stopped": 143, "oom": 1, "failed": 1}


def main(given: dict[str, Any]) -> int:
    """Run, say on stdout what came of it, and return the exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that libraries call
    folder = Path(given.pop("folder"))
    db, stored = given.pop("db", None), given.pop("stored", True)
    store = open_store(Path(db) if db else None) if stored else None
    try:
        found = run(read_recipe(folder), folder, Options(store=store, **given), report=_say)
    except WhichloraError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines(found)) + "\n")
    return STATUS[found.outcome]


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
