"""From estimates to predictions: corrected by what was measured, with how far to trust them, and a verdict."""

from whichlora_estimators.roofline import TimeSpan

from .correction import Correction
from .current import current_correction
from .prediction import (
    CURRENT,
    Choice,
    Interval,
    Prediction,
    Verdict,
    corrected_times,
    expected_times,
    judge,
    predict,
)

__all__ = [
    "CURRENT",
    "Choice",
    "Correction",
    "Interval",
    "Prediction",
    "TimeSpan",
    "Verdict",
    "corrected_times",
    "current_correction",
    "expected_times",
    "judge",
    "predict",
]
