"""BERT: learned positions, norms behind the sums, dropout, several heads (transformers/models/bert, 5.23).

A classifier is never quantized here: PEFT trains a copy of it, which it cannot of a quantized one, so loading has to
leave it out (`llm_int8_skip_modules`); Transformers itself does not.

# B batch, T tokens, D width, H heads, E head width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from .. import attention, layers, ops
from ..layers import Build, LayerNorm, token_ids
from ..tape import BOOL, INT64, LOGITS_AND_LOSS, Tensor
from ..workload import Workload
from .base import Config, Context, Model, family
from .classifiers import label_count


class Attention:
    """Projections, attention in both directions, output projection, dropout, norm of the sum."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, self.heads, self.index = c.count("hidden_size"), c.count("num_attention_heads"), index
        self.q = build.linear("attention.self.query", width, width, bias=True)
        self.k = build.linear("attention.self.key", width, width, bias=True)
        self.v = build.linear("attention.self.value", width, width, bias=True)
        with build.inside("attention"):
            self.output = Output(c, build, width)
        self.dropout = c.rate("attention_probs_dropout_prob")

    def __call__(self, x: Tensor, mask: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]; eager attention also returns its probabilities."""
        out, weights = self._attended(x, mask, context)
        return self.output(out, x), weights

    def _attended(self, x: Tensor, mask: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        q = self.q(x).heads(self.heads)
        k = self.k(x).heads(self.heads)
        v = self.v(x).heads(self.heads)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        if context.attention == "sdpa":
            return attention.attend(q, k, v, mask, kind="sdpa", dropout=self.dropout, causal=False)
        return _eager(q, k, v, mask, self.dropout)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
    """Attend by separate operators: under autocast the probabilities stay fp32."""
    weights = ops.scale(attention.compared(q, k))
    if mask is not None:
        weights = ops.add(weights, mask)
    weights = ops.softmax(weights)
    weights = ops.dropout(weights, rate)
    return attention.heads_last(attention.weighted(weights, v)), weights


class Output:
    """norm(dropout(dense(x)) + residual)."""

    def __init__(self, c: Config, build: Build, n_in: int) -> None:
        self.dense = build.linear("output.dense", n_in, c.count("hidden_size"), bias=True)
        self.norm = LayerNorm(build, "output.LayerNorm", c.count("hidden_size"))
        self.dropout = c.rate("hidden_dropout_prob")

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map [B, T, N] and [B, T, D] to [B, T, D]."""
        x = self.dense(x)
        x = ops.dropout(x, self.dropout)
        x = self.norm(ops.add(x, residual))
        return x  # noqa: RET504 - the norm's input dies with its call, the dropout's output here


class Layer:
    """Attention, then the MLP."""

    def __init__(self, c: Config, build: Build, index: int) -> None:
        width, inner = c.count("hidden_size"), c.count("intermediate_size")
        self.attention = Attention(c, build, index)
        self.widen = build.linear("intermediate.dense", width, inner, bias=True)
        self.act = layers.find_activation(c.get("hidden_act"))
        self.output = Output(c, build, inner)

    def __call__(self, x: Tensor, mask: Tensor | None, context: Context) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        attended, weights = self.attention(x, mask, context)
        out = self._fed(attended)
        del weights  # held to the end, as in the real one
        return out

    def _fed(self, x: Tensor) -> Tensor:
        return self.output(self._widened(x), x)

    def _widened(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        return self.act(x)


class Head(ABC):
    """What comes behind the layers for one task."""

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """Map [B, T, D] to logits."""

    @abstractmethod
    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, object]:
        """Return the loss of [B, T, D], and the logits."""


class SentenceHead(Head):
    """A dense layer with tanh on the first token, which LoRA may adapt, and the classifier."""

    def __init__(self, c: Config, build: Build) -> None:
        width = c.count("hidden_size")
        self.pooler = build.linear("bert.pooler.dense", width, width, bias=True)
        self.classifier = build.head("classifier", width, label_count(c), bias=True)
        self.dropout = classifier_dropout(c)

    def scores(self, hidden: Tensor) -> Tensor:
        """Classify samples: [B, C]."""
        return self.classifier(self._dropped(hidden))

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, object]:
        """Classify [B, T, D]: one label a sample."""
        pooled = self._dropped(hidden)  # alive until the loss is there, as in the real one
        logits = self.classifier(pooled)
        return ops.cross_entropy(logits, labels), logits

    def _dropped(self, hidden: Tensor) -> Tensor:
        pooled = self._pooled(hidden)
        return ops.dropout(pooled, self.dropout)

    def _pooled(self, hidden: Tensor) -> Tensor:
        pooled = self.pooler(first_token(hidden))
        return ops.activation_of_result(pooled)


def first_token(hidden: Tensor) -> Tensor:
    """View the first token's row of each sample, [B, D]; backward fills a gradient of all tokens."""
    first = Tensor(hidden.tape, hidden.storage, (hidden.shape[0], hidden.shape[2]), hidden.dtype)
    hidden.tape.record(first, (hidden,), (), lambda g: (g.tape.new(hidden_shape, g.dtype),))
    hidden_shape = hidden.shape
    return first


class TokenHead(Head):
    """Dropout and a classifier for every token (BertForTokenClassification)."""

    def __init__(self, c: Config, build: Build) -> None:
        self.classifier = build.head("classifier", c.count("hidden_size"), label_count(c), bias=True)
        self.dropout = classifier_dropout(c)

    def scores(self, hidden: Tensor) -> Tensor:
        """Classify tokens: [B, T, C]."""
        return self.classifier(ops.dropout(hidden, self.dropout))

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, object]:
        """Classify [B, T, D]: one label a token."""
        hidden = ops.dropout(hidden, self.dropout)
        logits = self.classifier(hidden)
        rows = logits.view(labels.numel, logits.shape[-1])
        return ops.cross_entropy(rows, labels), logits


class WordHead(Head):
    """A dense layer, activation, norm, and the decoder, whose weight is the embedding's."""

    #: Names of modules: what holds the head, in it the dense layer and the norm.
    names: ClassVar[tuple[str, str, str]] = ("cls.predictions", "transform.dense", "transform.LayerNorm")

    def __init__(self, c: Config, build: Build, embedding: Tensor | None) -> None:
        width, vocab = c.count("hidden_size"), c.count("vocab_size")
        module, dense, norm = self.names
        tied = embedding if c.flag("tie_word_embeddings") else None
        with build.inside(module):
            self.transform = build.linear(dense, width, width, bias=True)
            self.act = layers.find_activation(c.get("hidden_act"))
            self.norm = LayerNorm(build, norm, width)
            self.decoder = build.head("decoder", width, vocab, bias=True, tied=tied)
            if tied is None:
                build.parameter("bias", vocab)  # which nothing uses
            else:
                build.parameters[-1].name = f"{build.prefix}bias"  # of the head and of the decoder in it

    def scores(self, hidden: Tensor) -> Tensor:
        """Predict words: [B, T, V]."""
        x = self._transformed(hidden)
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            return self.decoder(x)

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, object]:
        """Predict the words of [B, T, D], in the dtype of the model."""
        logits = self.scores(hidden)
        with hidden.tape.tagged(LOGITS_AND_LOSS):
            rows = logits.view(labels.numel, logits.shape[-1])
            return ops.cross_entropy(rows, labels), logits

    def _transformed(self, x: Tensor) -> Tensor:
        x = self.transform(x)
        x = self.act(x)
        return self.norm(x)


def classifier_dropout(c: Config) -> float:
    """Return the dropout of the head: that of the layers unless it has one of its own."""
    return c.rate("hidden_dropout_prob" if c.get("classifier_dropout") is None else "classifier_dropout")


class Encoder(Model):
    """Embeddings with a norm and dropout, layers, a head."""

    tasks = ("seq-cls", "token-cls", "masked-lm")
    default_targets = ("query", "value")
    trunk: ClassVar[str] = "bert"
    word_head: ClassVar[type[WordHead]] = WordHead
    #: Whether the head is made before all else.
    head_first: ClassVar[bool] = False
    #: Rows of the table of positions that no token has.
    spare_positions: ClassVar[int] = 0

    @classmethod
    def longest(cls, c: Config) -> int:
        """Return the rows of the table of positions, less those that no token has."""
        return c.count("max_position_embeddings") - cls.spare_positions

    def make(self, c: Config, build: Build) -> None:
        """Allocate embeddings, layers and the head of the task; one that shares the table of words comes behind that."""
        tied = build.task == "masked-lm" and c.flag("tie_word_embeddings")
        if self.head_first and not tied:
            self.head = self._make_head(c, build, None)
        with build.inside(f"{self.trunk}.embeddings"):
            self._make_embeddings(c, build)
        self.blocks = [self._layer(c, build, index) for index in range(c.count(self.layers_key))]
        if tied or not self.head_first:
            self.head = self._make_head(c, build, self.embed)

    def _make_head(self, c: Config, build: Build, embedding: Tensor | None) -> Head:
        make_head: dict[str, Callable[[], Head]] = {
            "seq-cls": partial(self.sentence_head, c, build),
            "token-cls": partial(TokenHead, c, build),
            "masked-lm": partial(self.word_head, c, build, embedding),
        }
        return make_head[build.task]()

    def _make_embeddings(self, c: Config, build: Build) -> None:
        width = c.count("hidden_size")
        self.words = build.embedding("word_embeddings", c.count("vocab_size"), width)
        self.embed = self.words.weight
        self.places = build.embedding("position_embeddings", c.count("max_position_embeddings"), width)
        self.types = build.embedding("token_type_embeddings", c.count("type_vocab_size"), width)
        self.norm, self.dropout = LayerNorm(build, "LayerNorm", width), c.rate("hidden_dropout_prob")
        for _ in ("position_ids", "token_type_ids"):
            build.buffer(1, c.count("max_position_embeddings"), dtype=INT64)

    def _layer(self, c: Config, build: Build, index: int) -> Layer:
        with build.inside(f"{self.trunk}.encoder.layer.{index}"):
            return Layer(c, build, index)

    def sentence_head(self, c: Config, build: Build) -> Head:
        """Make the head that classifies sentences."""
        return SentenceHead(c, build)

    def make_inputs(self, workload: Workload) -> list[Tensor]:
        """Allocate ids [B, T], labels [B] or [B, T], and a mask."""
        tape, shape = self.build.tape, (workload.batch_size, workload.seq_len)
        ids = [token_ids(tape, *shape) for _ in range(2 if workload.padded else 1)]
        labels = token_ids(tape, *(shape[:1] if workload.task == "seq-cls" else shape))
        return [ids[0], labels, *ids[1:]]

    def step_loss(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, object]:
        """Return the loss of the task, and the logits."""
        hidden = self.encoded(inputs[0], context)
        hidden.tape.mark("loss")
        return self.head.loss(hidden, inputs[1])

    def prefill(self, ids: Tensor, context: Context, *, last_only: bool) -> tuple[Tensor, Tensor]:
        """Map ids [B, T] to the logits of the task."""
        hidden = self.encoded(ids, context)
        return self.head.scores(hidden), ids

    def encoded(self, ids: Tensor, context: Context) -> Tensor:
        """Map ids [B, T] to hidden states [B, T, D]."""
        tape = ids.tape
        embedded = x = self.summed(ids, context)
        mask = self._mask(x, ids, context)
        for block in tape.layers(self.blocks):
            run = partial(block, x, mask, context)
            x = tape.checkpoint(run) if context.checkpointing else run()
            del run
        del embedded  # held until the model returns
        return x

    def summed(self, ids: Tensor, context: Context) -> Tensor:
        """Sum the embeddings of words, types and positions, normalise, drop out."""
        numbers, of_type = self.position_numbers(ids)
        words = self.looked_up(ids, context)
        types = self.types(of_type)
        x = ops.add(words, types)
        positions = self.places(numbers)
        x = ops.add(x, positions)
        x = self.norm(x)
        x = ops.dropout(x, self.dropout)
        del words, types, positions
        return x

    def position_numbers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of positions, [1, T] of a buffer, and the types of tokens."""
        batch, tokens = ids.shape
        gathered = ids.tape.new((1, tokens), INT64)
        types = Tensor(ids.tape, gathered.storage, (batch, tokens), INT64)
        return Tensor(ids.tape, self.build.buffers[0].storage, (1, tokens), INT64), types

    def _mask(self, x: Tensor, ids: Tensor, context: Context) -> Tensor | None:
        """Make the mask of padding, none where nothing is padded: bool for sdpa, float for eager."""
        if not context.padded:
            return None
        batch, tokens = ids.shape
        allowed = x.tape.new((batch, 1, tokens, context.keys(tokens)), BOOL)
        x.tape.launch(allowed.bytes)
        return allowed if context.attention == "sdpa" else ops.cast(allowed, x.dtype)


@family("bert")
class Bert(Encoder):
    """The recipe."""

    defaults: ClassVar = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "num_labels": 2,
        "tie_word_embeddings": True,
    }
