"""Classification on top of a decoder: one label a sample, read at its last token, or one a token.

States transformers/modeling_layers.py (GenericForSequenceClassification, GenericForTokenClassification) and
loss/loss_utils.py, 5.23; older architectures have the same under other names.

# B batch, T tokens, D width, C labels
"""

from __future__ import annotations

from typing import ClassVar

from .. import ops
from ..layers import Build
from ..tape import BOOL, FP32, INT32, INT64, LOGITS_AND_LOSS, Tensor
from .base import Config


def label_count(c: Config) -> int:
    """Return how many labels there are: those that the config names, or their number."""
    named = c.get("id2label")
    return len(named) if named else int(c.get("num_labels") or 2)


class SequenceClassifier:
    """Scores of every token, of which the last token's count."""

    #: Whether the scores have a bias.
    bias: ClassVar[bool] = False

    def __init__(self, c: Config, build: Build, width: int, name: str, dropout: float) -> None:
        self.head = build.head(name, width, label_count(c), bias=self.bias)
        self.dropout = dropout

    def scores(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Map [B, T, D] to logits [B, C]."""
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            return _at_last_token(ids, self.head(hidden))

    def loss(self, ids: Tensor, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of [B, T, D] and the logits [B, C]."""
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            logits = self.head(hidden)
            pooled = _at_last_token(ids, logits)
            loss = ops.cross_entropy(pooled, labels)
            del logits  # held to here, as in the real one
            return loss, pooled


def _at_last_token(ids: Tensor, logits: Tensor) -> Tensor:
    """Pick the row of each sample's last token that is no padding; backward puts its gradient among zeros.

    Where there are embeddings in the place of ids it is the last row.
    """
    new, batch = ids.tape.new, ids.shape[0]
    last, held = _last_tokens(ids) if ids.storage is not None else (new((batch,), INT64), [])
    pooled, shape = new((batch, logits.shape[-1]), logits.dtype), logits.shape
    logits.tape.record(pooled, (logits,), (last,), lambda g, last: (g.tape.new(shape, g.dtype),))
    del held
    return pooled


def _last_tokens(ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Find the places of the last tokens, [B]; returns what the real one holds beside them, too."""
    new, (batch, tokens) = ids.tape.new, ids.shape
    flags = new(ids.shape, BOOL)
    unpadded = new(ids.shape, INT32)
    del flags
    numbers = new((tokens,), INT32)
    counted = new(ids.shape, INT32)
    last = new((batch,), INT64)
    del counted
    return last, [numbers, unpadded]


class TokenClassifier(SequenceClassifier):
    """Dropout and scores of every token, the loss in fp32."""

    bias = True

    def scores(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Map [B, T, D] to logits [B, T, C]."""
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            return self.head(hidden)

    def loss(self, ids: Tensor, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of [B, T, D] and the logits [B, T, C]."""
        hidden = ops.dropout(hidden, self.dropout)
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            logits = self.head(hidden)
            rows = ops.cast(logits.view(labels.numel, logits.shape[-1]), FP32)
            return ops.cross_entropy(rows, labels), logits


CLASSIFIERS = {"seq-cls": SequenceClassifier, "token-cls": TokenClassifier}
