"""Which layers a workload adapts, with which rank, and what trains whole beside them, as PEFT reads its own settings.

States check_target_module_exists and _mark_only_adapters_as_trainable (peft/tuners/tuners_utils.py), get_pattern_key and
_set_trainable (peft/utils/other.py); read in 0.21.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from ..errors import BadValue, Unsupported
from ..families.base import Model
from ..layers import Build, Embedding, Linear, Parameter, Stack
from ..tape import Leaf
from ..workload import Workload
from .base import Method
from .prompts import EmbeddedPrompt
from .tying import tied_saves

#: What PEFT saves whole of every model that classifies.
CLASSIFIERS = ("classifier", "score")
#: Which methods have settings that LoRA has not.
_OWNERS = {"encoder_hidden_size": ": p-tuning, prefix-tuning", "prefix_projection": ": prefix-tuning"}
_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def adapted_linears(
    model: Model,
    workload: Workload,
    *,
    default: tuple[str, ...] | None = None,
    embeds: bool = False,
    needed: bool = True,
) -> list[Linear]:
    """Return the layers that the workload's targets name; output heads only where they are named.

    `default` is what PEFT adapts where none are named, if that differs from LoRA's; `embeds` says that the method has
    adapters of embeddings, which are found by `adapted_embeddings`. Raises BadValue where nothing is meant though some is
    `needed` (names that no module has are passed over as long as something else is adapted, as PEFT does), and where a
    module is meant that the method has no adapter for.
    """
    targets = _meant(model, workload, default)
    build = model.build
    layers = build.linears if targets == "all-linear" else [*build.linears, *build.heads]
    found = [layer for layer in layers if is_adapted(layer.name, targets, workload)]
    others = [] if targets == "all-linear" else _other_modules(model, targets, workload, embeds=embeds)
    if others:
        kinds = "linear layers and embeddings" if embeds else "linear layers"
        raise BadValue(f"{workload.method} adapts {kinds} only", value=others[0], todo="Name others as targets.")
    if needed and not found and not (embeds and adapted_embeddings(model, workload)):
        known = sorted({layer.name.rpartition(".")[2] for layer in layers})
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        todo = f"Linear layers of this model: {', '.join(known)}."
        raise BadValue("the model has no linear layer with this target name", value=shown, todo=todo)
    return found


def adapted_embeddings(model: Model, workload: Workload) -> list[Embedding]:
    """Return the tables of embeddings that the workload's targets name."""
    if workload.targets == ():
        return []
    targets = _meant(model, workload, None)
    if targets == "all-linear":
        return []
    return [table for table in model.build.embeddings if is_adapted(table.name, targets, workload)]


def is_adapted(name: str, targets: str | tuple[str, ...], workload: Workload) -> bool:
    """Say whether a module is meant and neither saved whole nor left out."""
    if not is_target(name, targets) or _is_part(name, saved_modules(workload)):
        return False
    excluded = workload.exclude_modules
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else is_target(name, excluded)):
        return False
    return _in_layers(name, targets, workload.layers_to_transform)


def _in_layers(name: str, targets: str | tuple[str, ...], numbers: tuple[int, ...]) -> bool:
    """Say whether a module is in one of the numbered layers, if any are numbered, or named in full."""
    if not numbers or isinstance(targets, str) or name in targets:
        return True
    found = _LAYER_NUMBER.match(name)
    return found is not None and int(found[1]) in numbers


def _meant(model: Model, workload: Workload, default: tuple[str, ...] | None) -> str | tuple[str, ...]:
    targets = workload.targets
    if targets is None:
        targets = model.default_targets if default is None else default
        if not targets:
            todo = 'Name the layers to adapt, or give "all-linear".'
            raise BadValue("PEFT has no default target modules for this model", value=workload.model, todo=todo)
    return targets


def _other_modules(model: Model, targets: str | tuple[str, ...], workload: Workload, *, embeds: bool) -> list[str]:
    """Return modules that are meant and no linear layers: those around layers, norms, embeddings where not adapted."""
    build = model.build
    known = {layer.name for layer in (*build.linears, *build.heads)} | {stack.name for stack in build.stacks}
    if embeds:
        known |= {table.name for table in build.embeddings}
    modules = dict.fromkeys(
        path
        for parameter in build.parameters
        for path in itertools.accumulate(parameter.name.split(".")[:-1], lambda path, part: f"{path}.{part}")
    )
    return [name for name in modules if name not in known and is_adapted(name, targets, workload)]


def is_target(name: str, targets: str | Iterable[str]) -> bool:
    """Say whether a module is meant: by the end of its name, or by one pattern for all of it."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def tells_layers_apart(workload: Workload) -> bool:
    """Say whether adapters may differ from layer to layer: by a pattern, or by names that tell more than the last part."""
    targets = workload.targets
    excluded = workload.exclude_modules
    if isinstance(excluded, str) or (isinstance(targets, str) and targets != "all-linear"):
        return True
    named = (*workload.rank_pattern, *workload.modules_to_save, *excluded)
    if any(part.isdigit() for name in workload.target_parameters for part in name.split(".")):
        return True
    names = (*(targets if isinstance(targets, tuple) else ()), *named)
    if workload.layers_to_transform or workload.layer_replication:
        return True
    return any("." in name for name in names)


def rank_of(
    layer: Linear | Embedding | Stack, workload: Workload, *, name: str | None = None, default: int | None = None
) -> int:
    """Return a layer's rank: that of the first pattern that matches the end of its name, else that of all layers."""
    patterns: Mapping[str, int] = workload.rank_pattern
    name, default = name or layer.name, default or workload.rank
    return next((rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def saved_modules(workload: Workload) -> tuple[str, ...]:
    """Return the modules that train whole: those named, and the classifier of a classification."""
    return (*workload.modules_to_save, *(CLASSIFIERS if workload.task in ("seq-cls", "token-cls") else ()))


def _is_part(name: str, modules: Sequence[str]) -> bool:
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def check_options(method: Method, workload: Workload) -> None:
    """Refuse settings of adapters that PEFT's configuration of the method does not have. Raises Unsupported."""
    refused = {
        "bias": workload.bias != "none" and not method.has_bias,
        "rank_pattern": bool(workload.rank_pattern) and not method.has_rank_pattern,
        "exclude_modules": bool(workload.exclude_modules) and not method.has_exclusions,
        "layers_to_transform": bool(workload.layers_to_transform) and not method.has_layers,
        "trainable_tokens": bool(workload.trainable_tokens) and not method.has_tokens,
        "modules_to_save": bool(workload.modules_to_save) and method.trains_base,
        "lora_bias": workload.lora_bias and not method.has_adapter_bias,
        "layer_replication": bool(workload.layer_replication) and not method.has_replication,
        "target_parameters": bool(workload.target_parameters) and not method.has_parameters,
        "ensure_weight_tying": workload.ensure_weight_tying and not method.has_tying,
        "encoder_hidden_size": workload.encoder_hidden_size is not None and not method.has_encoder,
        "prefix_projection": workload.prefix_projection and not method.has_projection,
    }
    if workload.task == "token-cls" and workload.targets == "all-linear" and method.has_bias:
        todo = "Name the layers to adapt: PEFT counts the classifier, which it saves whole, among all linear ones."
        raise Unsupported("all linear layers of a token classification", value=workload.targets, todo=todo)
    if workload.layers_to_transform and isinstance(workload.targets, str):
        todo = "Name the targets in a list, or let one regular expression say which layers."
        raise Unsupported("layers_to_transform beside a pattern of targets", value=workload.targets, todo=todo)
    for name in [name for name, meant in refused.items() if meant]:
        todo = f"Leave {name} out, or choose a method that has it{_OWNERS.get(name, ', LoRA say')}."
        raise Unsupported(f"{name} of {method.name}", value=getattr(workload, name), todo=todo)


def refuse_bias(tables: Sequence[Embedding]) -> None:
    """Refuse `lora_bias` of embeddings, which PEFT lacks. Raises Unsupported."""
    for table in tables:
        todo = "Leave lora_bias out, or name linear layers alone as targets."
        raise Unsupported("PEFT has no lora_bias of embeddings", value=table.name, todo=todo)


def train_biases(build: Build, kind: str) -> None:
    """Let biases train: none, all that the model has, or those of adapted layers."""
    if kind == "none":
        return
    adapted = [layer for layer in (*build.linears, *build.heads) if layer.adapter is not None]
    of_adapted = {id(layer.bias) for layer in adapted if layer.bias is not None}
    for parameter in build.parameters:
        tensor = parameter.tensor
        if parameter.name.endswith(".bias") and (kind == "all" or id(tensor) in of_adapted):
            tensor.node = Leaf()


def save_modules(model: Model, workload: Workload) -> None:
    """Replace what PEFT saves whole by copies that train; the originals stay where they are.

    Raises BadValue where a name that the workload gives means nothing.
    """
    build, names, tie = model.build, saved_modules(workload), tied_saves(model, workload)
    if tie is not None:
        names = (*(name for name in names if not _is_part(tie.heads[0].name, [name])), tie.source.name)
    for name in workload.modules_to_save:
        if not any(_saves(parameter.name, [name]) for parameter in build.parameters) and not _tied_head(model, [name]):
            modules = sorted({parameter.name.rpartition(".")[0] for parameter in build.parameters})
            raise BadValue("the model has no module to save of this name", value=name, todo=f"Known: {modules[-3:]} …")
    if not names:
        return
    saved = [parameter for parameter in build.parameters if _saves(parameter.name, names)]
    head = _tied_head(model, names)
    unused = getattr(model, "embed", None) if isinstance(model.prompt, EmbeddedPrompt) else None
    with build.tape.tagged("adapters"):
        if head is not None:
            assert head.weight is not None
            copied = build.tape.new(head.weight.shape, head.weight.dtype)
            copied.node, head.weight = Leaf(), copied
            build.add(f"{head.name}.weight", copied)
        for parameter in saved:
            if parameter.tensor is unused:  # prompts look tokens up in the original: the copy never gets a gradient
                parameter.tensor = build.tape.new(unused.shape, unused.dtype)
                parameter.tensor.node = Leaf()
                build.originals.append(unused)
            else:
                _copy(build, parameter, followers=() if tie is None else tie.heads)


def _saves(parameter: str, modules: Iterable[str]) -> bool:
    """Say whether a parameter is of a module, or of one inside of it, whose name ends so."""
    owners = parameter.split(".")[:-1]
    paths = (".".join(owners[: count + 1]) for count in range(len(owners)))
    return any(path.endswith(module) for path in paths for module in modules)


def _tied_head(model: Model, names: Iterable[str]) -> Linear | None:
    """Return the head that is saved though its weight is the embedding's."""
    own = {parameter.name for parameter in model.build.parameters}
    for head in model.build.heads:
        if f"{head.name}.weight" not in own and _saves(f"{head.name}.weight", names):
            return head
    return None


def _copy(build: Build, parameter: Parameter, *, followers: Sequence[Linear]) -> None:
    """Train a copy; a head that shares the original goes on with that, unless it is to follow."""
    tensor = parameter.tensor
    original = tensor.detach()
    for head in build.heads:
        if head.weight is tensor and f"{head.name}.weight" != parameter.name and head not in followers:
            head.weight = original
    build.originals.append(original)
    tensor.storage, tensor.node = build.tape.new(tensor.shape, tensor.dtype).storage, Leaf()
