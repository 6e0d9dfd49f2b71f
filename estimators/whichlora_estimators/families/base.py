"""What every recipe shares: reading a config, the walk through the layers, logits and loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .. import attention, ops
from ..errors import BadValue
from ..layers import Build, Embedding, Linear, rotary_tables, token_ids
from ..stack import LABELS_SHIFTED
from ..tape import FP32, INT64, Leaf, Tensor
from ..workload import Workload
from .caches import Cache, StaticCache, TupleCache

if TYPE_CHECKING:
    from .classifiers import SequenceClassifier

FAMILIES: dict[str, type[Model]] = {}
M = TypeVar("M", bound="type[Model]")


def family(*model_types: str) -> Callable[[M], M]:
    """Register a recipe for Hugging Face `model_type`s; registering one twice is an error that names the first."""

    def register(recipe: M) -> M:
        for model_type in model_types:
            first = FAMILIES.setdefault(model_type, recipe)
            assert first is recipe, f"{model_type} is registered already, by {first.__name__}"
        return recipe

    return register


@dataclass(slots=True, kw_only=True)
class Context:
    """What a forward pass is asked for, beside its inputs."""

    attention: str
    padded: bool = False
    checkpointing: bool = False
    input_grads: bool = False
    training: bool = True
    cache: Cache | None = None
    #: Keys and values that a decoder makes once of what an encoder says, and that which it says.
    crossed: Cache | None = None
    states: Tensor | None = None
    #: What stands in the place of the tokens' embeddings.
    embeddings: Tensor | None = None

    @property
    def is_prefill(self) -> bool:
        """Say whether a cache made beforehand has seen nothing yet."""
        return self.cache is not None and self.cache.fixed and not self.cache.length

    def keys(self, tokens: int, window: int | None = None) -> int:
        """Return how many keys new tokens are compared with, in all layers or in those with a window."""
        return tokens if self.cache is None else self.cache.keys(tokens, window)


@dataclass(slots=True, kw_only=True)
class Positions:
    """What layers share within a pass: rotary tables and the mask."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None


#: One layer; some return their attention probabilities too, which then live until the next layer returns.
Block = Callable[[Tensor, Positions, Context], "Tensor | tuple[Tensor, Tensor | None]"]


class Config:
    """A config.json with the defaults of its Transformers class; a wrong or missing value is an error naming the key."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = {**defaults, **{key: value for key, value in given.items() if value is not None}}
        self._nulls = {key for key, value in given.items() if value is None}

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` where neither the config nor its class names one."""
        return self._values.get(key, default)

    def optional(self, key: str) -> Any:
        """Return a value of a key for which null means "none of it": None if the config says so, else as `get`."""
        return None if key in self._nulls else self._values.get(key)

    def default(self, key: str, value: Any) -> None:
        """Set a value that the config leaves open."""
        self._values.setdefault(key, value)

    def force(self, key: str, value: Any) -> None:
        """Set a value that the class leaves no choice in."""
        self._values[key] = value

    def count(self, key: str) -> int:
        """Return a positive whole number."""
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadValue(
                f"config key {key!r} must be a positive whole number", value=value, todo="Correct config.json."
            )
        return value

    def rate(self, key: str) -> float:
        """Return a dropout probability."""
        return float(self._values.get(key) or 0.0)

    def flag(self, key: str) -> bool:
        """Return a switch."""
        return bool(self._values.get(key))


class Model(ABC):
    """A recipe: parameters in the order in which the real module makes them, and its forward pass."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    #: What PEFT's own LoRA default adapts for this family (peft/utils/constants.py, 0.21).
    default_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")
    tasks: ClassVar[tuple[str, ...]] = ("causal",)
    #: Whether all of its attention can be that of the flash-attn library.
    flash: ClassVar[bool] = False
    #: Names by which PEFT's LoRA knows weights that are no linear layer's, and those weights.
    stack_names: ClassVar[Mapping[str, str]] = {}
    #: The config key that counts the layers, where a family spells it in its own way.
    layers_key: ClassVar[str] = "num_hidden_layers"
    #: Other spellings of config keys that the Transformers class accepts, and what they stand for.
    aliases: ClassVar[Mapping[str, str]] = {}
    #: What a method puts around a training pass: it takes inputs and context, and yields the model's inputs.
    prompt: Callable[[Sequence[Tensor], Context], AbstractContextManager[Sequence[Tensor]]] | None = None
    #: What looks tokens up, and its table.
    words: Embedding
    embed: Tensor

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        self.build, self.model_type = build, str(config.get("model_type"))
        self.config = self.read(config)
        self.make(self.config, build)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json as this family spells it."""
        return Config({cls.aliases.get(key, key): value for key, value in config.items()}, cls.defaults)

    @classmethod
    def layer_kinds(cls, c: Config) -> list[object]:
        """Return what tells layers apart: equal for layers of one structure."""
        return [None] * c.count(cls.layers_key)

    @classmethod
    def period(cls, c: Config) -> int:
        """Return after how many layers their structure repeats (2 where every other layer slides its window)."""
        kinds = cls.layer_kinds(c)
        return next(step for step in range(1, len(kinds) + 1) if kinds[step:] == kinds[:-step])

    @classmethod
    def longest(cls, c: Config) -> int | None:
        """Return how many tokens a text may have where every position has a row of a table; None: no table limits it."""
        return None

    @abstractmethod
    def make(self, c: Config, build: Build) -> None:
        """Allocate the parameters."""

    def looked_up(self, ids: Tensor, context: Context) -> Tensor:
        """Look the tokens up, asking for a gradient where checkpointing of frozen weights needs one."""
        if context.embeddings is not None:
            return context.embeddings
        return with_input_grad(self.words(ids), context)

    @abstractmethod
    def make_inputs(self, workload: Workload) -> list[Tensor]:
        """Allocate the inputs of a training step: ids, labels, and a mask where some of the batch is padding."""

    @abstractmethod
    def step_loss(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, object]:
        """Run the forward pass of a training step: the loss, and what the model's output keeps alive beside it."""

    def make_caches(self, workload: Workload, context: Context) -> None:
        """Give inference the caches that it fills: none unless a family has some."""

    @abstractmethod
    def prefill(self, ids: Tensor, context: Context, *, last_only: bool) -> tuple[Tensor, Tensor]:
        """Run the first pass of inference over ids [B, T]: logits, and the ids that the next tokens come behind."""

    def decode(self, token: Tensor, context: Context) -> Tensor:
        """Return the logits of one more token, [B, 1]."""
        raise AssertionError(f"{self.model_type} generates nothing")


class Decoder(Model):
    """A causal language model: embedding, blocks, final norm, head. Families say what a block is."""

    #: The config key of the width, where a family spells it in its own way.
    width_key: ClassVar[str] = "hidden_size"
    #: Names of modules: what holds all but the head, in it the tokens' embeddings and the list of layers.
    trunk: ClassVar[str] = "model"
    tokens: ClassVar[str] = "embed_tokens"
    layers: ClassVar[str] = "layers"
    head_name: ClassVar[str] = "lm_head"
    #: The name of what classifies tokens, and its dropout where the config has none of its own nor one of the layers.
    token_head: ClassVar[str] = "score"
    token_dropout: ClassVar[float] = 0.1
    tasks: ClassVar[tuple[str, ...]] = ("causal", "seq-cls", "token-cls")
    flash = True

    head: Linear
    classifier: SequenceClassifier | None = None

    def make(self, c: Config, build: Build) -> None:
        """Allocate embedding, blocks, final norm and head."""
        self.width, self.vocab = c.count(self.width_key), c.count("vocab_size")
        with build.inside(self.trunk):
            self.words = self.make_tokens(build)
            self.embed = self.words.weight
            self.make_embeddings(c, build)
            self.blocks = [self._named_block(c, build, index) for index in range(c.count(self.layers_key))]
            self.make_final(c, build)
        if build.task == "causal":
            self.make_head(c, build)
        else:
            self._make_classifier(c, build)

    def _make_classifier(self, c: Config, build: Build) -> None:
        from .classifiers import CLASSIFIERS

        rates = (c.get("classifier_dropout"), c.get("hidden_dropout"), self.token_dropout)
        name = self.token_head if build.task == "token-cls" else "score"
        dropout = next(rate for rate in rates if rate is not None)
        self.classifier = CLASSIFIERS[build.task](c, build, self.embed.shape[-1], name, dropout)

    def _named_block(self, c: Config, build: Build, index: int) -> Block:
        with build.inside(f"{self.layers}.{index}"):
            return self.block(c, build, index)

    def make_tokens(self, build: Build) -> Embedding:
        """Allocate the tokens' embeddings; families scale them."""
        return build.embedding(self.tokens, self.vocab, self.width)

    def make_embeddings(self, c: Config, build: Build) -> None:
        """Allocate embeddings beside those of the tokens (learned positions): none unless a family says so."""

    @abstractmethod
    def block(self, c: Config, build: Build, index: int) -> Block:
        """Make one layer."""

    @abstractmethod
    def make_final(self, c: Config, build: Build) -> None:
        """Allocate the final norm (and rotary buffers)."""

    def make_head(self, c: Config, build: Build) -> None:
        """Make the output head, sharing the embedding's weight where the config ties them."""
        tied = self.embed if c.flag("tie_word_embeddings") else None
        self.head = build.head(self.head_name, self.embed.shape[-1], self.vocab, tied=tied)

    @abstractmethod
    def final(self, x: Tensor) -> Tensor:
        """Apply the final norm."""

    def enter(self, ids: Tensor, context: Context, kept: list[Tensor]) -> tuple[Tensor, Positions]:
        """Return the input of the first block and what blocks share; families add learned positions, a norm, dropout.

        What local variables of the real forward pass hold until it returns goes into `kept`.
        """
        inputs = self.looked_up(ids, context)
        kept.append(inputs)
        return inputs, self.positions(inputs, ids, context)

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make what layers share: here a mask and rotary tables of the head's width."""
        return Positions(mask=self.mask(x, ids, context))

    def mask(self, x: Tensor, ids: Tensor, context: Context) -> Tensor | None:
        """Make the causal mask over cached and new tokens; a single new token needs none."""
        batch, tokens = ids.shape
        fixed = context.cache is not None and context.cache.fixed
        packed = context.cache is None and not context.padded and attention.searches_packed(x, batch, tokens)
        if context.attention == "sdpa" and tokens == 1 and not context.padded and not fixed:
            return None
        keys, kind = context.keys(tokens), context.attention
        return attention.causal_mask(
            x,
            batch=batch,
            queries=tokens,
            keys=keys,
            padded=context.padded,
            kind=kind,
            needed=packed or (fixed and tokens == 1),
            first=context.is_prefill,
        )

    def backbone(self, ids: Tensor, context: Context) -> Tensor:
        """Run embedding, blocks (checkpointed if asked) and final norm."""
        tape = ids.tape
        kept: list[Tensor] = []
        x, shared = self.enter(ids, context, kept)
        for block in tape.layers(self.blocks):
            run = partial(block, x, shared, context)
            outputs = tape.checkpoint(run) if context.checkpointing else run()
            x = outputs[0] if isinstance(outputs, tuple) else outputs  # `outputs` lives until the next ones, as really
            del run
        tape.mark("final")
        return self.final(x)

    def logits(self, ids: Tensor, context: Context, *, last_only: bool = False) -> Tensor:
        """Map ids [B, T] to logits [B, T, V], or [B, 1, V]."""
        hidden = self.backbone(ids, context)
        stack = ids.tape.stack
        if last_only and stack.keeps_last_logits(self.model_type):
            hidden = Tensor(hidden.tape, hidden.storage, (hidden.shape[0], 1, hidden.shape[2]), hidden.dtype)
        logits = self.scored(hidden)
        if not stack.upcasts_logits(self.model_type, training=False):
            return logits
        with ids.tape.tagged("logits and loss"):
            return ops.cast(logits, FP32)

    def make_caches(self, workload: Workload, context: Context) -> None:
        """Make one of keys and values, as models do unless their config says otherwise; a classifier returns it, too."""
        tuples = self.build.tape.stack.keeps_tuple_cache(self.model_type)
        if self.classifier is None and workload.cache == "static":
            context.cache = StaticCache(workload.prefill_len + workload.decode_len)
        elif self.classifier is None or self.config.get("use_cache", True):
            context.cache = TupleCache() if tuples else Cache()

    def prefill(self, ids: Tensor, context: Context, *, last_only: bool) -> tuple[Tensor, Tensor]:
        """Map ids [B, T] to logits [B, T, V] or [B, 1, V], or to a classifier's."""
        if self.classifier is None:
            return self.logits(ids, context, last_only=last_only), ids
        hidden = self.backbone(ids, context)
        return self.classifier.scores(ids, hidden), ids

    def decode(self, token: Tensor, context: Context) -> Tensor:
        """Map the next token [B, 1] to logits [B, 1, V]."""
        return self.logits(token, context)

    def scored(self, hidden: Tensor) -> Tensor:
        """Apply the head, counted as logits."""
        with hidden.tape.tagged("logits and loss"):
            return self.scores(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """Apply the head; families cap or scale its logits."""
        return self.head(hidden)

    def make_inputs(self, workload: Workload) -> list[Tensor]:
        """Allocate ids, labels and a mask, [B, T] each."""
        shape = (workload.batch_size, workload.seq_len)
        ids = [token_ids(self.build.tape, *shape) for _ in range(2 if workload.padded else 1)]
        labels = token_ids(self.build.tape, *(shape[:1] if workload.task == "seq-cls" else shape))
        return [ids[0], labels, *ids[1:]]

    def step_loss(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, object]:
        """Return the loss of the next tokens, or of labels, and the logits."""
        if self.classifier is None:
            return self.loss(inputs[0], inputs[1], context)
        hidden = self.backbone(inputs[0], context)
        hidden.tape.mark("loss")
        return self.classifier.loss(inputs[0], hidden, inputs[1])

    def loss(self, ids: Tensor, labels: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return loss and logits: fp32 logits, labels shifted by one (transformers/loss/loss_utils.py, ForCausalLMLoss)."""
        tape = ids.tape
        hidden = self.backbone(ids, context)
        tape.mark("loss")
        logits = self.scored(hidden)
        with tape.tagged("logits and loss"):
            if tape.stack.upcasts_logits(self.model_type, training=True):
                logits = ops.cast(logits, FP32)
            converts = tape.stack.shares_loss(self.model_type)
            loss = _causal_loss(logits, labels, converts=converts)
        del hidden  # alive until here, as it is in the real one
        return loss, logits


def with_input_grad(inputs: Tensor, context: Context) -> Tensor:
    """Ask for a gradient of token embeddings where checkpointing of frozen weights needs one."""
    if context.input_grads and inputs.node is None and inputs.tape.grad_enabled:
        inputs.node = InputLeaf(inputs.detach())
    return inputs


class InputLeaf(Leaf):
    """Where the gradient of token embeddings accumulates: it holds on to them as long as the graph lives."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def _causal_loss(logits: Tensor, labels: Tensor, *, converts: bool = True) -> Tensor:
    upcast = ops.cast(logits, FP32) if converts else logits
    if not logits.tape.stack.does(LABELS_SHIFTED):
        return _shifted_loss(upcast)
    padded = labels.tape.new((labels.shape[0], labels.shape[1] + 1), INT64)
    shifted = labels.tape.new(labels.shape, INT64)
    rows = upcast.view(labels.numel, logits.shape[-1])
    loss = ops.cross_entropy(rows, shifted)
    del padded
    return loss


def _shifted_loss(logits: Tensor) -> Tensor:
    """Return the loss of all logits but those of the last position: a copy of them, unless it is one sample."""
    batch, tokens, width = shape = logits.shape
    tape, rows = logits.tape, (batch, tokens - 1, width)
    used = tape.new(rows, logits.dtype) if batch > 1 else Tensor(tape, logits.storage, rows, logits.dtype)
    tape.record(used, (logits,), (), lambda g: (ops.fitted(g, shape),))
    labels = tape.new(rows[:2], INT64)
    return ops.cross_entropy(used.view(batch * (tokens - 1), width), labels)


class RotaryDecoder(Decoder):
    """A decoder whose queries and keys are rotated by tables that all layers share."""

    def rotary_width(self, c: Config) -> int:
        """Return how many columns of a head are rotated."""
        return head_width(c)

    def make_rotary(self, c: Config, build: Build) -> None:
        """Allocate the inverse frequencies and their original copy."""
        self.rotated = self.rotary_width(c)
        self.frequencies = build.buffer(self.rotated // 2), build.buffer(self.rotated // 2)
        if build.tape.stack.keeps_rotary_tables(self.model_type):
            for _ in range(2 * len(self.blocks)):
                build.buffer(int(c.get("max_position_embeddings", 2048)), self.rotated, dtype=build.dtype)

    def positions(self, x: Tensor, ids: Tensor, context: Context) -> Positions:
        """Make the mask, then cos and sin."""
        ids_of_positions = x.tape.new((1, ids.shape[1]), INT64)
        mask = self.mask(x, ids, context)
        cos, sin = rotary_tables(x, ids.shape[1], self.rotated)
        del ids_of_positions
        return Positions(cos=cos, sin=sin, mask=mask)


def head_width(c: Config) -> int:
    """Return the width of an attention head, named or the even share of the hidden size."""
    return int(c.get("head_dim") or c.count("hidden_size") // c.count("num_attention_heads"))
