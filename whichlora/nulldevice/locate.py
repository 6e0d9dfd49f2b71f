"""Find an environment's PyTorch and what of NVIDIA's lies beside it, importing none of it.

Only the standard library: this file is also run by the other environment's Python, to print what it finds as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys

NAMES = ("torch", "nvidia", "triton", "bitsandbytes")


def locate() -> dict[str, list[str]]:
    """Return the folders of each package of `NAMES` that this interpreter would import; no entry for one it lacks."""
    specs = {name: importlib.util.find_spec(name) for name in NAMES}
    found = {name: list(spec.submodule_search_locations or ()) for name, spec in specs.items() if spec}
    return {name: folders for name, folders in found.items() if folders}


if __name__ == "__main__":
    json.dump(locate(), sys.stdout)
