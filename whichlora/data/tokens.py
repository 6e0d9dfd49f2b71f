"""Tokenizers and tokens: where a tokenizer's files are, samples to token ids, and the estimate where there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError

from .formats import Sample

#: The files that make a tokenizer, by the names that Transformers gives them.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "config.json",
)
_NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss's ignore_index


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A sample's token ids; the first `prompt_tokens` of them are read and not learnt."""

    ids: tuple[int, ...]
    prompt_tokens: int

    def labels(self, *, completion_only: bool) -> list[int]:
        """Return what is to be predicted at each place, nothing for the prompt if only the completion is learnt."""
        hidden = self.prompt_tokens if completion_only else 0
        return [IGNORED_LABEL] * hidden + list(self.ids[hidden:])


def find_tokenizer(name: str, *, offline: bool = False) -> Path | None:
    """Return the folder with a tokenizer's files: a local one, or the Hub's cache, filled if allowed; None if there is none."""
    folder = Path(name).expanduser()
    folder = folder.parent if folder.is_file() else folder
    if folder.is_dir():
        return folder if any((folder / file).is_file() for file in _NEEDED) else None
    return _from_hub(name, offline=offline)


def _from_hub(name: str, *, offline: bool) -> Path | None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    local = offline or constants.HF_HUB_OFFLINE
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=local))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if any((folder / file).is_file() for file in _NEEDED) else None


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from its files; without a token for padding it pads with the one that ends a sequence."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        todo = 'Install it: pip install "whichlora[gpu]".'
        raise WhichloraError(
            "tokenizing needs a library that is not installed", value="transformers", todo=todo
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        todo = f"Name another tokenizer. {str(error)[:200]}"
        raise WhichloraError("cannot load the tokenizer", value=str(folder), todo=todo) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def files_hash(folder: Path) -> str:
    """Return a hash of a tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted(FILES):
        if (folder / file).is_file():
            digest.update(file.encode() + b"\0" + (folder / file).read_bytes())
    return digest.hexdigest()


def encode(sample: Sample, tokenizer: Any) -> Encoded:
    """Tokenize prompt and completion as one text, ended by the tokenizer's end of sequence.

    A token that holds the end of the prompt and the beginning of the completion counts as completion.
    """
    special = not sample.whole
    if tokenizer.is_fast:
        found = tokenizer(sample.text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        end = len(sample.prompt)
        learnt = (place for place, (start, stop) in enumerate(offsets) if stop > end and stop > start)
        prompt_tokens = next(learnt, len(ids)) if end else 0
    else:
        before = list(tokenizer(sample.prompt, add_special_tokens=special)["input_ids"]) if sample.prompt else []
        after = tokenizer(sample.completion, add_special_tokens=special and not before)["input_ids"]
        ids, prompt_tokens = [*before, *after], len(before)
    end_id = tokenizer.eos_token_id
    if special and end_id is not None and (not ids or ids[-1] != end_id):
        ids.append(end_id)
    return Encoded(ids=tuple(ids), prompt_tokens=min(prompt_tokens, len(ids)))


# --- without a tokenizer ---


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterRatio:
    """Characters a token: the median over texts, and the range that nine in ten of them keep."""

    median: float
    low: float
    high: float

    @property
    def error(self) -> tuple[float, float]:
        """By what share a count of tokens may be too high (negative) or too low."""
        return self.median / self.high - 1, self.median / self.low - 1

    def tokens(self, text: str) -> int:
        """Estimate a text's tokens, the one that begins and the one that ends it included."""
        return max(1, round(len(text) / self.median)) + 2


def character_ratio(config: Mapping[str, Any]) -> CharacterRatio:
    """Return the ratio for a model's vocabulary (data/characters.json says on what it was measured)."""
    table = _table()
    large = int(config.get("vocab_size") or 0) >= table["large_vocabulary_from"]
    return CharacterRatio(**table["large" if large else "small"])


@cache
def _table() -> Any:
    text = resources.files(__package__).joinpath("characters.json").read_text(encoding="utf-8")
    return json.loads(text)
