"""Rehearsals: the real training step, or generation, on a GPU that is not there. docs/rehearse.md tells of them."""

from __future__ import annotations

from .cards import UNLIMITED, find_card
from .records import Rehearsal, answer
from .rehearsals import rehearse
from .script import ScriptRun, rehearse_script

__all__ = ["UNLIMITED", "Rehearsal", "ScriptRun", "answer", "find_card", "rehearse", "rehearse_script"]
