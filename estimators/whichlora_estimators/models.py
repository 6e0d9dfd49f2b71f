"""Model shapes: what a config.json says, from a file, from the bundled registry or from the Hugging Face Hub."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from .errors import BadValue, UnknownName, Unsupported, WhichloraError, nearest

_DATA = Path(__file__).parent / "data" / "models.json"

# Multimodal model types whose text model may be trained on its own: the text model's type and class.
# Source: what transformers 5.23's AutoModelForCausalLM made of saved checkpoints of each type.
_TEXT_MODEL_OF = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "llama4": ("llama4_text", "Llama4ForCausalLM"),
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
}
# Of these, the ones that it loads with their vision tower all the same.
_LOADED_WITH_TOWER = frozenset({"gemma3"})
_TOWER_CAVEAT = "text model only: Transformers also loads the vision tower, which is not counted"
# Keys whose presence says that a model has more inside than one text model.
_TOWER_KEYS = ("text_config", "vision_config", "audio_config", "llm_config", "language_config", "thinker_config")

# Keys that must be whole and positive, by the spellings of Transformers' configuration classes.
_SIZES = {"vocab_size"}
_SIZES |= {"hidden_size", "num_hidden_layers", "num_attention_heads"}
_SIZES |= {"n_embd", "n_embed", "n_layer", "n_head"}
_SIZES |= {"d_model", "num_layers", "num_heads"}
_SIZES |= {"dim", "n_layers", "n_heads"}
# As above, but null means "as the family does by default".
_SIZES_OR_NULL = {"intermediate_size", "head_dim", "num_key_value_heads", "num_kv_heads", "sliding_window"}
_SIZES_OR_NULL |= {"max_position_embeddings", "n_positions", "type_vocab_size", "word_embed_proj_dim"}
_SIZES_OR_NULL |= {"ffn_dim", "ffn_hidden_size", "hidden_dim", "n_inner"}
_SIZES_OR_NULL |= {"d_ff", "d_kv", "num_decoder_layers", "relative_attention_num_buckets"}
_SIZES_OR_NULL |= {"moe_intermediate_size", "num_experts_per_tok", "shared_expert_intermediate_size"}
_SHARES = {"partial_rotary_factor", "rotary_pct"}
_PROBABILITIES = ("dropout", "pdrop", "dropout_prob", "dropout_rate")  # how the names of such keys end
_WIDTH_OF_HEADS = {"num_attention_heads": "hidden_size", "n_head": "n_embd", "n_heads": "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's numbers: `config` holds the keys of its config.json as given, without the family's defaults.

    `family` is Transformers' model_type. `parameters` counts the weights of a loaded checkpoint in the class that
    `config["architectures"]` names, shared ones once; None where nobody counted. `source` says where all this is from.
    `gated` means that the Hub asks to accept a licence before it hands out the weights; `caveat`, where not empty, says
    what of the checkpoint the shape leaves out.
    """

    name: str
    family: str
    config: Mapping[str, Any] = field(hash=False)
    parameters: int | None
    source: str
    gated: bool = False
    caveat: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Registry:
    """The bundled models: `entry_of` maps every id to its entry, the other two lower-case spellings to ids."""

    entries: dict[str, dict[str, Any]]
    entry_of: dict[str, str]
    by_name: dict[str, str]
    by_tail: dict[str, list[str]]


def load_model(name_or_path: str, *, offline: bool = False) -> ModelShape:
    """Find a model: a config.json or a folder with one, else the bundled registry, else config.json on the Hub.

    The registry ignores case and also takes the part after the slash where that names one shape. Raises UnknownName,
    BadValue (a malformed config), Unsupported (a model with more than one text model inside) or WhichloraError (the
    Hub is needed and cannot be asked). `offline` or HF_HUB_OFFLINE=1 keeps to what was downloaded before.
    """
    path = _local_config(name_or_path)
    if path is not None:
        return _shape(_read_json(path), name=name_or_path, source=f"file {path}")
    found = _from_registry(name_or_path)
    if found is not None:
        return found
    if "/" not in name_or_path:
        raise _unknown(name_or_path, "A model of the Hub is written org/name, a local one as a path to its folder.")
    path = _download_config(name_or_path, offline=offline)
    return _shape(_read_json(path), name=name_or_path, source=f"config.json on the Hub, commit {path.parent.name[:12]}")


def bundled_model(name: str) -> ModelShape:
    """Find a model in the bundled registry alone: no file and no Hub is asked. Raises UnknownName, or BadValue."""
    found = _from_registry(name)
    if found is None:
        raise _unknown(name, "Only bundled models are known here.")
    return found


def shape_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Check a config.json's keys and make a shape of them; of a multimodal config, take its text model if it has one.

    Raises BadValue for a key that cannot be, Unsupported for a checkpoint that is already quantised or whose text model
    Transformers does not load on its own.
    """
    return _shape(config, name=name, source="a config given by the caller")


def all_models() -> tuple[ModelShape, ...]:
    """Return every shape of the registry once, under its main name, smallest first."""
    return _sorted_shapes(_registry().entries)


def search_models(text: str) -> tuple[ModelShape, ...]:
    """Return the registry's models, aliases too, whose name or family holds every word of `text`, smallest first."""
    words = text.casefold().split()
    registry = _registry()
    return _sorted_shapes(
        name
        for name, entry in registry.entry_of.items()
        if all(word in f"{name} {registry.entries[entry]['config']['model_type']}".casefold() for word in words)
    )


def default_models() -> tuple[str, ...]:
    """Return the models to choose from where the user names none, smallest first."""
    marked = (name for name, entry in _registry().entries.items() if entry.get("default"))
    return tuple(shape.name for shape in _sorted_shapes(marked))


# ---------------------------------------------------------------------------------------------------------- registry


@lru_cache(maxsize=1)
def _registry() -> _Registry:
    entries: dict[str, dict[str, Any]] = json.loads(_DATA.read_text(encoding="utf-8"))
    entry_of: dict[str, str] = {}
    by_name: dict[str, str] = {}
    by_tail: dict[str, list[str]] = {}
    for main, entry in entries.items():
        for name in (main, *entry["aliases"]):
            assert name.casefold() not in by_name, name
            entry_of[name] = main
            by_name[name.casefold()] = name
            by_tail.setdefault(_tail(name).casefold(), []).append(name)
    return _Registry(entries=entries, entry_of=entry_of, by_name=by_name, by_tail=by_tail)


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def _from_registry(name: str) -> ModelShape | None:
    registry = _registry()
    exact = registry.by_name.get(name.casefold())
    if exact is not None:
        return _registry_shape(exact)
    candidates = registry.by_tail.get(name.casefold(), [])
    if len({registry.entry_of[candidate] for candidate in candidates}) > 1:
        raise BadValue("several models have this name", value=name, todo=f"Write one of: {', '.join(candidates)}.")
    return _registry_shape(candidates[0]) if candidates else None


def _registry_shape(name: str) -> ModelShape:
    """Make the shape of a registered id; an alias keeps its name, so that a later download fetches what was meant."""
    main = _registry().entry_of[name]
    entry = _registry().entries[main]
    same_owner = name.partition("/")[0] == main.partition("/")[0]
    return ModelShape(
        name=name,
        family=entry["config"]["model_type"],
        config=copy.deepcopy(entry["config"]),
        parameters=entry["parameters"],
        source=entry["source"] if name == main else f"same shape as {main}: {entry['source']}",
        gated=bool(entry.get("gated")) and same_owner,
        caveat=entry.get("caveat", ""),
    )


def _sorted_shapes(names: Iterable[str]) -> tuple[ModelShape, ...]:
    return tuple(sorted(map(_registry_shape, names), key=lambda shape: (shape.parameters, shape.name)))


def _known_like(name: str) -> Iterable[str]:
    """Return the names to suggest from: whole ids, or their last parts where the user wrote no organisation."""
    names = _registry().entry_of
    return names if "/" in name else dict.fromkeys(map(_tail, names))


def _unknown(name: str, todo: str) -> UnknownName:
    return UnknownName("model", name, _known_like(name), todo=todo)


def _known_hint(name: str) -> str:
    found = nearest(name, _known_like(name))
    return f"Models known without a download include {', '.join(found or default_models()[:3])}."


# ------------------------------------------------------------------------------------------------- files and the Hub


def _local_config(name: str) -> Path | None:
    """Return the config file that `name` is or holds; None where it reads like a model's name rather than a path."""
    if not name.strip():
        raise BadValue("a model needs a name", value=name, todo="Write org/name, or a path to a config.json.")
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    for candidate in (path / "config.json", path):
        if candidate.suffix == ".json" and _is_file(candidate):
            return candidate
    if name.startswith((".", "/", "~", "\\")) or name.endswith(".json") or name.count("/") > 1 or "\\" in name:
        raise BadValue(
            "no model config at this path", value=name, todo="Give a config.json or a folder that holds one."
        )
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte, for the file system: then it is no file
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadValue(
            f"cannot read a model config ({error.strerror})", value=str(path), todo="Check the path."
        ) from error
    except ValueError as error:
        raise BadValue(f"not JSON ({error})", value=str(path), todo="Give the config.json of a model.") from error


def _download_config(name: str, *, offline: bool) -> Path:
    """Find a repository's config.json in the Hub's cache, or fetch it there, or say what prevents that.

    What is cached is taken as it is: without a network, the client would try for half a minute to look for a newer one.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(name, "config.json", local_files_only=offline))
    except errors.HFValidationError as error:
        raise _unknown(name, "Nor can a model of the Hub be called so.") from error
    except errors.GatedRepoError as error:
        _refuse_gated(name, error)
    except errors.RepositoryNotFoundError as error:
        raise _unknown(
            name, "The Hub has none of this name that you may see; for a private one, set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        _refuse_unreachable(name, offline, error)
    except errors.EntryNotFoundError as error:
        todo = f"Name the model that it belongs to, or give a config.json. {_known_hint(name)}"
        raise WhichloraError("no config.json in this repository of the Hub", value=name, todo=todo) from error
    except (errors.HfHubHTTPError, OSError) as error:
        todo = f"Try again later, or give a config.json. {_known_hint(name)}"
        raise WhichloraError(f"the Hub did not answer ({type(error).__name__})", value=name, todo=todo) from error


def _refuse_gated(name: str, error: Exception) -> NoReturn:
    todo = (
        f"Accept its licence on https://huggingface.co/{name}, then log in with `hf auth login` (formerly "
        f"`huggingface-cli login`) or set HF_TOKEN. {_known_hint(name)}"
    )
    raise WhichloraError("a gated model of the Hub", value=name, todo=todo) from error


def _refuse_unreachable(name: str, offline: bool, error: Exception) -> NoReturn:
    if offline:
        what, todo = "not in the registry nor downloaded before, and offline", "Go online once, or give a config.json."
    else:
        why = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
        what, todo = f"not in the registry, and asking the Hub failed{why}", "Check the network, or give a config.json."
    raise WhichloraError(what, value=name, todo=f"{todo} {_known_hint(name)}") from error


# ------------------------------------------------------------------------------------------------- reading one config


def _shape(config: Any, *, name: str, source: str) -> ModelShape:
    if not isinstance(config, Mapping):
        todo = "A model's config.json holds an object with model_type and sizes."
        raise BadValue(f"the config of {name} is not an object", value=type(config).__name__, todo=todo)
    _family(config, name)
    _refuse_quantized(config, name)
    caveat = _TOWER_CAVEAT if config["model_type"] in _LOADED_WITH_TOWER else ""
    config = _text_model(config, name)
    for key, value in config.items():
        _check_number(key, value, name)
    _check_heads(config, name)
    _check_counts(config, name)
    return ModelShape(
        name=name,
        family=_family(config, name),
        config=copy.deepcopy(dict(config)),
        parameters=None,
        source=source,
        caveat=caveat,
    )


def _family(config: Mapping[str, Any], name: str) -> str:
    family = config.get("model_type")
    if isinstance(family, str) and family:
        return family
    todo = "It names the family, as Transformers does: llama, qwen2, gemma2, t5 ..."
    raise _bad("model_type", family, name, todo)


def _refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    quantization = config.get("quantization_config")
    if not quantization:
        return
    how = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
    todo = "Name the model that it was made from and choose a quantization (nf4, int8) for the workload instead."
    raise Unsupported(f"{name} is a checkpoint that is already quantised", value=how, todo=todo)


def _text_model(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the config to model: the text model's of a multimodal config whose checkpoint loads as text alone."""
    towers = [key for key in _TOWER_KEYS if config.get(key)]
    if not towers:
        return config
    family, text = config["model_type"], config.get("text_config")
    if family not in _TEXT_MODEL_OF or not isinstance(text, Mapping):
        todo = "Its text model is not trained on its own: name a text-only model, or give the config.json of one."
        raise Unsupported(f"{name} is multimodal (it has {', '.join(towers)})", value=family, todo=todo)
    text_family, architecture = _TEXT_MODEL_OF[family]
    return {**text, "model_type": text_family, "architectures": [architecture]}


def _bad(key: str, value: object, name: str, todo: str) -> BadValue:
    return BadValue(f"{key} in the config of {name}", value=value, todo=todo)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(key: str, value: Any, name: str) -> None:
    if key in _SIZES or (key in _SIZES_OR_NULL and value is not None):
        if isinstance(value, list):
            todo = "Name a model whose layers are alike."
            raise Unsupported(f"{key} in the config of {name} differs from layer to layer", todo=todo)
        if not _is_whole(value) or value < 1:
            raise _bad(key, value, name, "It must be a positive whole number.")
    elif value is not None and key in _SHARES:
        if not _is_number(value) or not 0 < value <= 1:
            raise _bad(key, value, name, "It must be a number above 0 and up to 1.")
    elif value is not None and key.endswith(_PROBABILITIES) and (not _is_number(value) or not 0 <= value < 1):
        raise _bad(key, value, name, "It must be a number from 0 to below 1.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_heads(config: Mapping[str, Any], name: str) -> None:
    """Refuse heads that do not divide what they share: the width (where no head size is given) and the query heads."""
    for heads_key, width_key in _WIDTH_OF_HEADS.items():
        heads, width = config.get(heads_key), config.get(width_key)
        if heads and width and not config.get("head_dim") and width % heads:
            raise _bad(heads_key, heads, name, f"It must divide {width_key} ({width}) where no head_dim is given.")
    heads = config.get("num_attention_heads")
    for key in ("num_key_value_heads", "num_kv_heads"):
        if heads and config.get(key) and heads % config[key]:
            raise _bad(key, config[key], name, f"It must divide num_attention_heads ({heads}).")


def _check_counts(config: Mapping[str, Any], name: str) -> None:
    """Refuse more active experts than there are, and a list of layer types that is not one per layer."""
    active, layers, types = (config.get(key) for key in ("num_experts_per_tok", "num_hidden_layers", "layer_types"))
    for key in ("num_experts", "num_local_experts"):
        experts = config.get(key)
        if experts is None:
            continue
        if not _is_whole(experts) or experts < 0:
            raise _bad(key, experts, name, "It must be a whole number, 0 for none.")
        if experts and active and active > experts:
            raise _bad("num_experts_per_tok", active, name, f"It must be at most {key} ({experts}).")
    if isinstance(types, list) and layers and len(types) != layers:
        raise _bad("layer_types", f"{len(types)} entries", name, f"One per layer is needed: {layers}.")
