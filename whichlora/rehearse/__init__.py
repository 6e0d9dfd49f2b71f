"""Rehearsals: the real training step, or generation, on a GPU that is not there. docs/rehearse.md tells of them."""

from __future__ import annotations

from .cards import UNLIMITED, find_card
from .records import Rehearsal, answer
from .rehearsals import CHECKPOINT, CONFIG, Rehearser, rehearse
from .script import ScriptRun, rehearse_script, smallest_card
from .stacks import OtherStack, make_stack

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "UNLIMITED",
    "OtherStack",
    "Rehearsal",
    "Rehearser",
    "ScriptRun",
    "answer",
    "find_card",
    "make_stack",
    "rehearse",
    "rehearse_script",
    "smallest_card",
]
