"""Data sets: where rows come from, how they become text and tokens, and how long these are. docs/data.md tells of them."""

from __future__ import annotations

from .base import BaseDataset, Row
from .formats import FORMATS, Sample
from .lengths import Lengths, advise_seq_len
from .measure import measure_lengths
from .rows import Subsets
from .samples import load_samples
from .spec import DataSpec, data_from_fields

__all__ = [
    "FORMATS",
    "BaseDataset",
    "DataSpec",
    "Lengths",
    "Row",
    "Sample",
    "Subsets",
    "advise_seq_len",
    "data_from_fields",
    "load_samples",
    "measure_lengths",
]
