"""What a tuned model answers on a test split: exact match, Jaccard similarity, perplexity, tokens generated a second."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from ..data.formats import Sample
from ..data.tokens import encode

_ARTICLES = {"a", "an", "the"}
#: Tokens that an answer may have beyond the expected one's.
_SLACK_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Means over a test split; None for what was not computed (on the null device all but counts)."""

    samples: int
    exact_match: float | None = None
    jaccard: float | None = None
    perplexity: float | None = None
    tokens_per_s: float | None = None


def words(text: str) -> list[str]:
    """Return the words of an answer, without case, punctuation and articles, as SQuAD's metric compares them."""
    found = re.findall(r"\w+", text.casefold())
    return [word for word in found if word not in _ARTICLES]


def is_exact(answer: str, expected: str) -> bool:
    """Say whether two answers are the same words in the same order."""
    return words(answer) == words(expected)


def jaccard(answer: str, expected: str) -> float:
    """Return the share of words that two answers have in common, of those that either has; 1 where both are empty."""
    ours, theirs = set(words(answer)), set(words(expected))
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def perplexity(mean_loss: float) -> float:
    """Return e to the mean loss of a token, no more than a float holds."""
    return exp(min(mean_loss, 700.0))


def evaluate(model: Any, tokenizer: Any, samples: Sequence[Sample], *, seq_len: int, computes: bool) -> Scores:
    """Let the model answer each prompt, the likeliest token each time, and compare with the completion.

    Samples without a prompt have nothing to answer: of them only the perplexity is told.
    """
    import torch

    model.eval()
    model.config.use_cache = True
    losses, matches, similarities, tokens, seconds = [], [], [], 0, 0.0
    with torch.inference_mode():
        for sample in samples:
            losses.append(_loss(model, tokenizer, sample, seq_len))
            if not sample.prompt:
                continue
            answer, count, took_s = _answer(model, tokenizer, sample, seq_len)
            expected = _plain(tokenizer, sample.completion)
            tokens, seconds = tokens + count, seconds + took_s
            matches.append(is_exact(answer, expected))
            similarities.append(jaccard(answer, expected))
    if not computes:
        return Scores(samples=len(samples))
    known = [loss for loss in losses if loss[1]]
    learnt = sum(count for _, count in known)
    return Scores(
        samples=len(samples),
        exact_match=sum(matches) / len(matches) if matches else None,
        jaccard=sum(similarities) / len(similarities) if similarities else None,
        perplexity=perplexity(sum(loss * count for loss, count in known) / learnt) if learnt else None,
        tokens_per_s=tokens / seconds if seconds else None,
    )


def _loss(model: Any, tokenizer: Any, sample: Sample, seq_len: int) -> tuple[float, int]:
    """Return the mean loss of the completion's tokens, and how many there are."""
    import torch

    found = encode(sample, tokenizer)
    ids, labels = found.ids[:seq_len], found.labels(completion_only=True)[:seq_len]
    count = sum(label >= 0 for label in labels[1:])
    if not count:
        return 0.0, 0
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    output = model(**{name: value.to(model.device) for name, value in inputs.items()})
    return float(output.loss), count


def _answer(model: Any, tokenizer: Any, sample: Sample, seq_len: int) -> tuple[str, int, float]:
    """Return the generated answer, its tokens and the seconds that they took."""
    import torch

    found = encode(sample, tokenizer)
    room = len(found.ids) - found.prompt_tokens + _SLACK_TOKENS
    prompt = torch.tensor([found.ids[: found.prompt_tokens][-seq_len:]]).to(model.device)
    began_s = time.perf_counter()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=room,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = output[0, prompt.shape[1] :]
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    took_s = time.perf_counter() - began_s
    return tokenizer.decode(new, skip_special_tokens=True), len(new), took_s


def _plain(tokenizer: Any, text: str) -> str:
    """Return a text without the special tokens that its format wrote."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))
