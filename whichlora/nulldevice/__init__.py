"""A GPU that is not there: CUDA without a card, so that a real training step runs and its memory is counted.

`environment(gpu)` gives the environment variables for a process that shall find `gpu`; inside that process
`whichlora.nulldevice.control` reads and steers the device. docs/nulldevice.md says what it can and cannot do.
"""

from __future__ import annotations

from .compiler import build
from .environ import environment

__all__ = ["build", "environment"]
