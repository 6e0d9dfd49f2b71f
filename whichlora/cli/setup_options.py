"""Options that say how a model is trained or generates beyond the usual: what else trains, how often a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from whichlora_estimators.errors import BadValue
from whichlora_estimators.workload import BIASES, TASKS

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--task", type=click.Choice(TASKS), help="Default: causal, or all that the model is for."),
    click.option("--target-pattern", help="Regular expression for whole names of layers, in place of --targets."),
    click.option(
        "--target-parameters",
        default="",
        help='Parameters that LoRA adapts itself: experts.gate_up_proj,experts.down_proj; alone with --targets "".',
    ),
    click.option(
        "--rank-pattern", multiple=True, metavar="NAME=RANK", help="Layers with a rank of their own; repeat for more."
    ),
    click.option(
        "--modules-to-save", default="", help="Modules that train whole, commas between: lm_head,embed_tokens."
    ),
    click.option("--exclude-modules", default="", help="Modules that are no targets all the same: lm_head,o_proj."),
    click.option("--exclude-pattern", help="Regular expression for whole names, in place of --exclude-modules."),
    click.option("--layers", default="", metavar="N,N…", help="Numbers of the only layers that are adapted: 0,1,2."),
    click.option(
        "--layer-replication",
        default="",
        metavar="N:N,N:N…",
        help="Make the model anew of ranges of its layers, on shared weights: 0:4,2:5 of 5 makes 7.",
    ),
    click.option(
        "--trainable-tokens",
        default="",
        metavar="N|NAME=N…",
        help="New tokens whose embeddings train: 3, or of which modules: embed_tokens=3,lm_head=3.",
    ),
    click.option("--ensure-weight-tying", is_flag=True, help="What shares embeddings is adapted, or saved, as one."),
    click.option("--bias", type=click.Choice(BIASES), default="none", show_default=True, help="Biases that train."),
    click.option("--lora-bias", is_flag=True, help="Each B of LoRA has a bias that trains."),
    click.option(
        "--virtual-tokens",
        type=int,
        default=20,
        show_default=True,
        help="Tokens that prompt-tuning, prefix-tuning and p-tuning train.",
    ),
    click.option(
        "--encoder-hidden-size", type=int, help="Inner width of what encodes virtual tokens (default: as wide as they)."
    ),
    click.option("--prefix-projection", is_flag=True, help="Of prefix-tuning: an MLP makes the keys and values."),
    click.option("--reentrant", is_flag=True, help="Checkpointing as before PyTorch's newer way (use_reentrant=True)."),
    click.option(
        "--kbit-preparation/--no-kbit-preparation",
        default=True,
        show_default=True,
        help="Of quantized weights: prepare_model_for_kbit_training, which makes the others fp32.",
    ),
    click.option(
        "--accumulation", type=int, default=1, show_default=True, help="Passes before each step of the optimizer."
    ),
    click.option("--clip-grad-norm", type=float, help="Clip gradients to this norm."),
    click.option(
        "--trainer",
        is_flag=True,
        help="Only the loss lives on after forward, as in HF Trainer, not the model's output.",
    ),
    click.option("--static-cache", is_flag=True, help="Make room for all tokens beforehand, for --generate."),
    click.option(
        "--previous-kept",
        is_flag=True,
        help="Of one pass (--generate): the output of the one before is held, as in a loop that binds it.",
    ),
)

#: The names of what these options give.
SETUP_NAMES = {"task", "target_pattern", "rank_pattern", "modules_to_save", "bias", "reentrant", "kbit_preparation"}
SETUP_NAMES |= {
    "target_parameters",
    "exclude_modules",
    "exclude_pattern",
    "layers",
    "layer_replication",
    "ensure_weight_tying",
    "trainable_tokens",
    "lora_bias",
    "virtual_tokens",
    "encoder_hidden_size",
    "prefix_projection",
    "accumulation",
    "clip_grad_norm",
    "trainer",
    "static_cache",
    "previous_kept",
}
#: Options that are fields of the same name.
_AS_GIVEN: tuple[str, ...] = ("bias", "lora_bias", "ensure_weight_tying", "encoder_hidden_size", "prefix_projection")
_AS_GIVEN += ("reentrant", "kbit_preparation", "accumulation", "clip_grad_norm")


def setup_options(command: F) -> F:
    """Add the options of this module to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def training_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a workload that these options ask for. Raises BadValue."""
    fields = {} if options["task"] is None else {"task": options["task"]}
    fields |= {name: options[name] for name in _AS_GIVEN}
    fields["output_kept"] = not options["trainer"]
    fields["modules_to_save"] = _names(options["modules_to_save"])
    fields["target_parameters"] = _names(options["target_parameters"])
    fields["exclude_modules"] = options["exclude_pattern"] or _names(options["exclude_modules"])
    fields["layers_to_transform"] = _numbers(options["layers"])
    fields["layer_replication"] = tuple(map(_range, _names(options["layer_replication"])))
    fields["trainable_tokens"] = _tokens(options["trainable_tokens"])
    fields["num_virtual_tokens"] = options["virtual_tokens"]
    fields["rank_pattern"] = dict(_ranked(text) for text in options["rank_pattern"])
    if options["target_pattern"]:
        fields["targets"] = options["target_pattern"]
    return fields


def generation_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a generation that these options ask for."""
    fields = {} if options["task"] is None else {"task": options["task"]}
    fields |= {name: options[name] for name in ("padded", "previous_kept")}
    return {**fields, "cache": "static" if options["static_cache"] else "dynamic"}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise BadValue("--layers needs numbers of layers", value=text, todo="Example: --layers 0,1,2.") from None


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not first.isdigit() or not last.isdigit():
        todo = "Give each first layer and the one behind the last: --layer-replication 0:4,2:5."
        raise BadValue("--layer-replication needs ranges of layers", value=text, todo=todo)
    return int(first), int(last)


def _tokens(text: str) -> int | dict[str, int]:
    if text.isdigit() or not text:
        return int(text or 0)
    counts = [part.rpartition("=") for part in _names(text)]
    if not all(name and count.isdigit() for name, _, count in counts):
        todo = "Examples: --trainable-tokens 3, --trainable-tokens embed_tokens=3,lm_head=3."
        raise BadValue("--trainable-tokens needs a number, or names and numbers", value=text, todo=todo)
    return {name: int(count) for name, _, count in counts}


def _ranked(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    if not name or not rank.isdigit():
        raise BadValue("--rank-pattern needs a name and a rank", value=text, todo="Example: --rank-pattern q_proj=8.")
    return name, int(rank)
