"""What of a real checkpoint is at hand: its configuration, its tokenizer and other small files, and perhaps its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue
from whichlora_estimators.models import load_model

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_TOKENIZERS: tuple[str, ...] = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json")
_TOKENIZERS += ("added_tokens.json", "chat_template*", "processor_config.json", "preprocessor_config.json")
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the parts of a checkpoint without weights come from; `files` are copied beside the weights, by name."""

    config: Mapping[str, Any] = field(repr=False)
    config_source: str
    files: Mapping[str, Path]
    has_weights: bool = False

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is among the files."""
        return any(name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece")) for name in self.files)


def find_sources(name_or_path: str, *, offline: bool = False) -> Sources:
    """Find a model's configuration, and what lies beside it: in its folder, or in the Hub's cache.

    A Hub name whose configuration is not in the cache gets that of our registry or, unless `offline`, of the Hub; its
    tokenizer is not downloaded. Raises what `whichlora_estimators.models.load_model` raises.
    """
    folder = _local_folder(name_or_path) or cached_snapshot(name_or_path)
    shape = load_model(name_or_path if folder is None else str(folder), offline=offline)
    files = _small_files(folder) if folder and folder.is_dir() else {}
    source = str(folder) if folder else shape.source
    config = shape.config
    if folder is not None:
        config = _whole_config(folder, shape.config)
    return Sources(
        config=config,
        config_source=source,
        files=files,
        has_weights=bool(folder and folder.is_dir() and _has_weights(folder)),
    )


def cached_snapshot(name: str) -> Path | None:
    """Return the folder in the Hub's cache that holds a model's config.json, if any does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name that a model of the Hub can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _local_folder(name: str) -> Path | None:
    """Return the folder or config.json that a path names."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    return path if path.suffix == ".json" and path.is_file() else None


def _whole_config(folder: Path, text_model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration as it stands; of a multimodal one the text model's, which is what is trained."""
    path = folder / "config.json" if folder.is_dir() else folder
    whole: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(whole, dict):
        raise BadValue("not the configuration of a model", value=str(path), todo="Give a config.json.")
    return whole if whole.get("model_type") == text_model.get("model_type") else text_model


def _has_weights(folder: Path) -> bool:
    return any(path.exists() for pattern in _WEIGHTS for path in folder.glob(pattern))


def _small_files(folder: Path) -> dict[str, Path]:
    found = {path.name: path for pattern in _TOKENIZERS for path in folder.glob(pattern) if path.is_file()}
    generation = folder / _GENERATION
    return found | ({_GENERATION: generation} if generation.is_file() else {})
