"""Verifications: the step that is rehearsed, run for real, its memory and its time. docs/verify.md tells of them."""

from __future__ import annotations

from .place import ON, Place, find_place
from .plans import Checked, PlanVerification, verify_plan
from .records import Compared, Verification, answer
from .verifications import STEPS, WARMUP, Options, verify

__all__ = [
    "ON",
    "STEPS",
    "WARMUP",
    "Checked",
    "Compared",
    "Options",
    "Place",
    "PlanVerification",
    "Verification",
    "answer",
    "find_place",
    "verify",
    "verify_plan",
]
