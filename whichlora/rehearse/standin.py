"""Makes the checkpoint that stands in for one of the Hub, in a cache of the Hub's layout. Run by a rehearsed script.

usage: python -m whichlora.rehearse.standin ORG/MODEL FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import WhichloraError

from ..checkpoints import Sources, find_sources
from ..phantom import write_phantom

MADE = "stand-ins"  # the folder of what was made, one JSON file each
_DTYPES = ("bfloat16", "float16", "float32")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_standin(name: str, hub: Path, *, offline: bool = False) -> dict[str, Any]:
    """Write a phantom of a model to a cache of the Hub's layout, and return what stands for what.

    The tokenizer is the cached one or, where there is none, one that is made up: of the right size, with about four
    characters a token. Raises what `find_sources` and `write_phantom` raise.
    """
    sources = find_sources(name, offline=offline)
    dtype = str(sources.config.get("dtype") or sources.config.get("torch_dtype") or "").removeprefix("torch.")
    told = {
        "model": name,
        "config": sources.config_source,
        "tokenizer": "cached" if sources.has_tokenizer else "made up",
        "dtype": dtype if dtype in _DTYPES else _DTYPES[0],
    }
    commit = hashlib.sha1(json.dumps(told).encode(), usedforsecurity=False).hexdigest()
    repository = hub / f"models--{name.replace('/', '--')}"
    with tempfile.TemporaryDirectory(dir=hub) as folder:
        files = {**sources.files, **({} if sources.has_tokenizer else made_up_tokenizer(sources, Path(folder)))}
        write_phantom(sources.config, repository / "snapshots" / commit, dtype=told["dtype"], files=files)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    return told


def made_up_tokenizer(sources: Sources, folder: Path) -> dict[str, Path]:
    """Write a tokenizer that knows no words: as many tokens as the model, every four characters the unknown one."""
    size = int(sources.config.get("vocab_size") or 32000)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    for word, key in (("<s>", "bos_token_id"), ("</s>", "eos_token_id")):
        words |= {word: token} if (token := _token(sources.config, key, size)) is not None else {}
    if len(set(words.values())) < len(words):  # bos and eos are one token, or unk's: put these two elsewhere
        free = [token for token in range(size) if token not in (words["<s>"], words["</s>"])]
        words |= {"<unk>": free[0], "<mask>": free[1]}
        if words["<s>"] == words["</s>"]:
            del words["<s>"]
    taken = set(words.values())
    vocabulary = words | {f"<{token}>": token for token in range(size) if token not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(vocabulary, words)), encoding="utf-8")
    begin = "<s>" if "<s>" in words else "</s>"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "cls_token": begin,
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": int(sources.config.get("max_position_embeddings") or 10**9),
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")}


def _token(config: Mapping[str, Any], key: str, size: int) -> int | None:
    """Return the id that a config gives a special token, the first where it gives several."""
    value = config.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < size else None


def _tokenizer(vocabulary: Mapping[str, int], special: Mapping[str, int]) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": word, **plain} for word, token in special.items()],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]{1,4}"},
            "behavior": "Isolated",
            "invert": False,
        },
        "model": {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": "<unk>"},
    }


def main() -> None:
    """Make one stand-in and write down what was made, or why not."""
    name, hub = sys.argv[1], Path(sys.argv[2])
    try:
        told = make_standin(name, hub, offline=os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "true", "True"))
    except WhichloraError as error:
        told = {"model": name, "error": str(error)}
    made = hub / MADE
    made.mkdir(exist_ok=True)
    (made / f"{name.replace('/', '--')}.json").write_text(json.dumps(told), encoding="utf-8")
    sys.exit(1 if "error" in told else 0)


if __name__ == "__main__":
    main()
