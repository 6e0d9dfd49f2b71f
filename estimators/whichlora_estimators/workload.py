"""Everything that decides memory and time: model shape, method, setup. One record, and its JSON form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadValue, UnknownName

PHASES = ("train", "generate")
TASKS = ("causal", "seq-cls", "token-cls", "masked-lm", "seq2seq")
PRECISIONS = ("bf16-true", "fp16-true", "bf16-mixed", "fp16-mixed", "fp32")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
BIASES = ("none", "all", "lora_only")
CACHES = ("dynamic", "static")
#: Tasks whose inference goes on token by token; that of the others is one pass.
GENERATED = ("causal", "seq2seq")

_CHOICES = {
    "phase": PHASES,
    "task": TASKS,
    "precision": PRECISIONS,
    "attention": ATTENTIONS,
    "bias": BIASES,
    "cache": CACHES,
}
_COUNTS = (
    "rank",
    "batch_size",
    "seq_len",
    "target_len",
    "prefill_len",
    "decode_len",
    "accumulation",
    "num_virtual_tokens",
    "encoder_hidden_size",
)
_OPTIONAL = ("target_len", "encoder_hidden_size")
_FLAGS = (
    "checkpointing",
    "reentrant",
    "padded",
    "last_logits_only",
    "kbit_preparation",
    "double_quantization",
    "output_kept",
    "previous_kept",
    "prefix_projection",
    "lora_bias",
    "ensure_weight_tying",
)
_IGNORED = ("truth",)
#: Fields that null leaves as they are.
_EMPTY_IF_NULL: tuple[str, ...] = (
    "quantization",
    "modules_to_save",
    "rank_pattern",
    "exclude_modules",
    "layers_to_transform",
)
_EMPTY_IF_NULL += ("layer_replication", "target_parameters")
#: Settings of PEFT's configurations that are no fields here, and what to do about them.
_OF_PEFT = {
    "r": "Give it as rank.",
    "target_modules": "Give them as targets.",
    "lora_alpha": "Leave it out: it scales numbers and changes neither memory nor time.",
    "alpha_pattern": "Leave it out: it scales numbers and changes neither memory nor time.",
    "lora_dropout": "Give it as dropout.",
    "use_rslora": 'Give method "rslora"; beside DoRA leave it out: it changes neither memory nor time.',
    "use_dora": 'Give method "dora".',
    "layers_pattern": "Give targets as one regular expression for whole names.",
    "trainable_token_indices": "Give their number as trainable_tokens, or an object of modules and numbers.",
    "encoder_num_layers": "Leave it out: the MLP that encodes virtual tokens has three layers always.",
    "encoder_dropout": "Leave it out: the MLP that encodes virtual tokens has none.",
    "encoder_reparameterization_type": "Leave it out for an MLP; an LSTM is not modelled: rehearse a script.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step or one generation.

    `seq_len` tokens a sample when training; `prefill_len` prompt tokens (or an encoder's) and `decode_len` new ones when
    generating; what generates nothing, a classifier say, reads `prefill_len` tokens in one pass then.
    `padded` says that some of the batch is padding, so that a mask is passed. `targets` are the ends of layers' names, or
    one regular expression for whole names; `target_parameters` are ends of parameters' names that LoRA adapts whatever
    holds them (`targets` may be empty then); `rank_pattern` gives layers whose names it matches a rank of their own.
    `exclude_modules` are ends of names that are no targets all the same, or one regular expression for whole names,
    `layers_to_transform` the numbers of the only layers that have any (empty: all). `layer_replication` makes the model anew
    of ranges of its layers, each the first and the one behind the last, on shared weights. `trainable_tokens` counts the
    tokens whose embeddings train, or maps names of embeddings and heads to such counts, where equal ones mean the same tokens;
    `ensure_weight_tying` keeps adapters and copies of what shares embeddings shared.
    `num_virtual_tokens` are trained by prompt tuning, prefix tuning and p-tuning, `encoder_hidden_size` is the inner width of
    the MLP that p-tuning and, with `prefix_projection`, prefix tuning put behind them (None: as wide as what goes in).
    `modules_to_save` are modules that train whole beside the adapters, `bias` says which biases train,
    `lora_bias` gives every B of LoRA one of its own; `accumulation`
    counts the forward and backward passes before the optimizer steps, and `clip_grad_norm` is the largest norm of
    gradients (None: they are not clipped). `output_kept` says that the model's output, logits above all, lives until
    backward is over, as in a plain loop; HF Trainer keeps the loss alone. `previous_kept` says that, of inference which is one
    pass, the output of the pass before is held while the next one runs, as in a loop that binds it.

    `model` and `id` are names only. A field that has no meaning where it stands changes nothing: those of the other phase,
    those of adapters in full fine-tuning, `rank`, `dropout` and `num_virtual_tokens` of methods without,
    `double_quantization` without 4 bits, `kbit_preparation` without a quantization, `reentrant` without checkpointing,
    `target_len` without a decoder of its own, `decode_len` and `cache` of what generates nothing, `previous_kept` of what
    decodes, `last_logits_only` of other than causal models, `padded` when those generate.
    Raises BadValue or UnknownName.
    """

    model: str
    config: Mapping[str, Any] = field(repr=False)
    id: str = ""
    task: str = "causal"
    phase: str = "train"
    method: str = "lora"
    rank: int = 16
    targets: str | tuple[str, ...] | None = "all-linear"
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    trainable_tokens: int | Mapping[str, int] = 0
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    bias: str = "none"
    lora_bias: bool = False
    num_virtual_tokens: int = 20
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    dropout: float = 0.0
    precision: str = "bf16-true"
    quantization: str = "none"
    double_quantization: bool = True
    kbit_preparation: bool = True
    checkpointing: bool = False
    reentrant: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    accumulation: int = 1
    clip_grad_norm: float | None = None
    output_kept: bool = True
    batch_size: int = 1
    seq_len: int = 1024
    target_len: int | None = None
    padded: bool = False
    prefill_len: int = 1024
    decode_len: int = 1
    cache: str = "dynamic"
    last_logits_only: bool = True
    previous_kept: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UnknownName(name, str(getattr(self, name)), allowed, todo=f"Allowed: {', '.join(allowed)}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                _check_count(name, value)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise BadValue(f"{name} must be true or false", value=getattr(self, name), todo="Give a boolean.")
        _check_dropout(self.dropout)
        _check_names("target_parameters", self.target_parameters)
        if self.targets != () or not self.target_parameters:
            _check_targets(self.targets)
        _check_names("modules_to_save", self.modules_to_save)
        if isinstance(self.exclude_modules, str):
            _check_pattern(self.exclude_modules)
        else:
            _check_names("exclude_modules", self.exclude_modules)
        _check_layers(self.layers_to_transform)
        _check_ranges(self.layer_replication)
        _check_tokens(self.trainable_tokens)
        _check_rank_pattern(self.rank_pattern)
        _check_norm(self.clip_grad_norm)

    @property
    def decoded(self) -> int:
        """Count the tokens that are decoded one by one, behind the one that the first pass gives."""
        return self.decode_len - 1 if self.task in GENERATED else 0

    @property
    def passes(self) -> int:
        """Count the passes that show all that inference holds, before tokens are decoded one by one."""
        return 2 if self.previous_kept and not self.decoded and self.task != "seq2seq" else 1

    @property
    def masked(self) -> bool:
        """Say whether a mask is passed, of which some is padding; generation by causal models does without."""
        return self.padded and (self.phase == "train" or self.task != "causal")

    def with_(self, **changes: Any) -> Workload:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def workload_from_json(fields: Mapping[str, Any]) -> Workload:
    """Read one line of a workload file; unknown keys are errors, absent ones take their defaults.

    A null `quantization` means none; `config` holds the fields of config.json.
    """
    known = {f.name for f in dataclasses.fields(Workload)}
    given = {key: value for key, value in fields.items() if key not in _IGNORED}
    for key in given:
        if key not in known and key in _OF_PEFT:
            raise BadValue("a setting of PEFT that is no field of a workload", value=key, todo=_OF_PEFT[key])
        if key not in known:
            raise UnknownName("workload field", key, known, todo=f"Fields: {', '.join(sorted(known))}.")
    for key in ("model", "config"):
        if key not in given:
            raise BadValue(f"workload without {key!r}", value=fields.get("id"), todo=f"Add {key!r} to the line.")
    if not isinstance(given["config"], Mapping):
        raise BadValue("config must be an object", value=given["config"], todo="Give the fields of config.json.")
    for key in _EMPTY_IF_NULL:
        if key in given and given[key] is None:
            del given[key]
    given |= {key: _as_tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Workload(**given)


def _as_tuple(value: object) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _check_dropout(rate: object) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise BadValue("dropout must be at least 0 and below 1", value=rate, todo="Typical values: 0, 0.05, 0.1.")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadValue(f"{name} must be a positive whole number", value=value, todo="Give 1 or more.")


def _check_norm(norm: object) -> None:
    if norm is not None and (isinstance(norm, bool) or not isinstance(norm, int | float) or not norm > 0):
        raise BadValue("clip_grad_norm must be above 0, or nothing", value=norm, todo="Typical: 0.3, 1.0.")


def _check_targets(targets: object) -> None:
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str) and not re.fullmatch(r"\w*", targets):
        _check_pattern(targets)
    elif not targets or isinstance(targets, str):  # one word as a pattern would have to be a whole name
        todo = 'Give "all-linear", a list of module names, a regular expression, or nothing for the default of PEFT.'
        raise BadValue("targets name no layers", value=targets, todo=todo)
    else:
        _check_names("targets", targets)


def _check_names(name: str, names: object) -> None:
    if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
        raise BadValue(f"{name} must be names of modules", value=names, todo='Give a list, such as ["lm_head"].')


def _check_layers(numbers: object) -> None:
    if not isinstance(numbers, tuple) or not all(type(each) is int and each >= 0 for each in numbers):
        todo = "Give a list of whole numbers from 0 on, such as [0, 1]."
        raise BadValue("layers_to_transform must be numbers of layers", value=numbers, todo=todo)


def _check_ranges(ranges: object) -> None:
    pairs = ranges if isinstance(ranges, tuple) else (None,)
    for pair in pairs:
        counts = isinstance(pair, tuple) and len(pair) == 2 and all(type(each) is int for each in pair)
        if not counts or not 0 <= pair[0] < pair[1]:
            todo = "Give pairs of a first layer and the one behind the last, such as [[0, 4], [2, 5]]."
            raise BadValue("layer_replication must be ranges of layers", value=ranges, todo=todo)


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, Mapping):
        for name, count in tokens.items():
            _check_names("trainable_tokens", (name,))
            _check_count(f"trainable_tokens[{name!r}]", count)
    elif tokens != 0 or isinstance(tokens, bool):
        _check_count("trainable_tokens", tokens)


def _check_rank_pattern(pattern: object) -> None:
    if not isinstance(pattern, Mapping):
        todo = 'Give names and ranks, such as {"q_proj": 8}.'
        raise BadValue("rank_pattern must map names to ranks", value=pattern, todo=todo)
    for key, rank in pattern.items():
        _check_pattern(key)
        _check_count(f"rank_pattern[{key!r}]", rank)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        todo = f"{error}. A pattern is matched with whole names, such as model.layers.0.self_attn.q_proj."
        raise BadValue("not a regular expression", value=pattern, todo=todo) from None
