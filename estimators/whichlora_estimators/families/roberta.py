"""RoBERTa: BERT with positions counted from the ids and a classifier of two layers (transformers/models/roberta)."""

from __future__ import annotations

from typing import ClassVar

from .. import ops
from ..layers import Build, plain_linear
from ..tape import BOOL, INT32, INT64, Tensor
from .base import Config, family
from .bert import Bert, Encoder, Head, WordHead, classifier_dropout, first_token
from .classifiers import label_count


class RobertaSentenceHead(Head):
    """Dropout, a dense layer with tanh, dropout and a projection, on the first token; PEFT trains a copy of it all."""

    def __init__(self, c: Config, build: Build) -> None:
        width = c.count("hidden_size")
        self.dense = plain_linear(build, "classifier.dense", width, width, bias=True)
        self.out = plain_linear(build, "classifier.out_proj", width, label_count(c), bias=True)
        self.dropout = classifier_dropout(c)

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classify [B, T, D]: one label a sample."""
        logits = self.scores(hidden)
        return ops.cross_entropy(logits, labels), logits

    def scores(self, hidden: Tensor) -> Tensor:
        """Classify samples: [B, C]."""
        x = first_token(hidden)
        x = ops.dropout(x, self.dropout)
        x = self.dense(x)
        x = ops.activation_of_result(x)
        x = ops.dropout(x, self.dropout)
        return self.out(x)


class RobertaWordHead(WordHead):
    """BERT's under other names."""

    names = ("lm_head", "dense", "layer_norm")


@family("roberta")
class Roberta(Encoder):
    """The recipe."""

    defaults: ClassVar = {**Bert.defaults, "vocab_size": 50265}
    trunk = "roberta"
    word_head = RobertaWordHead
    spare_positions = 2  # that of padding, and one before it

    def sentence_head(self, c: Config, build: Build) -> Head:
        """Make the head that classifies sentences."""
        return RobertaSentenceHead(c, build)

    def position_numbers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Count the positions of each sample, [B, T], from its ids; without ids all samples have the same, [1, T]."""
        tape = ids.tape
        if ids.storage is None:
            numbers = tape.new((1, ids.shape[1]), INT64)
            return Tensor(tape, numbers.storage, ids.shape, INT64), tape.new(ids.shape, INT64)
        counted = tape.new(ids.shape, INT32)
        unpadded = tape.new(ids.shape, BOOL)
        del unpadded
        numbers = tape.new(ids.shape, INT64)
        del counted
        return numbers, tape.new(ids.shape, INT64)


@family("xlm-roberta")
class XlmRoberta(Roberta):
    """RoBERTa over many languages."""

    defaults: ClassVar = Bert.defaults
    head_first = True
