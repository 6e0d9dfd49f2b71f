"""From estimates to predictions: how far to trust a number, and the verdict that follows."""

from .prediction import Interval, Prediction, Verdict, judge, predict

__all__ = ["Interval", "Prediction", "Verdict", "judge", "predict"]
