"""How a sample is written for a model: its prompt and its completion, in the format that the model was tuned on.

Formats leave out the token that begins a sequence: tokenizers add it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whichlora_estimators.errors import BadValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text to train on: `prompt` is read, `completion` is learnt (all of it is, where there is no prompt).

    `whole` says that the text brings its special tokens along, the first and the last one too.
    """

    prompt: str
    completion: str
    whole: bool = False

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What is said: messages by `user`, `assistant` and perhaps `system`; the last one is the completion."""

    messages: tuple[tuple[str, str], ...]


Write = Callable[[Turns], Sample]


def _gemma(turns: Turns) -> Sample:
    """Write Gemma's turns. Source: ai.google.dev/gemma/docs/core/prompt-structure (roles user and model, no system)."""
    said = _system_into_user(turns)
    names = {"user": "user", "assistant": "model"}
    prompt = "".join(f"<start_of_turn>{names[role]}\n{text}<end_of_turn>\n" for role, text in said[:-1])
    return Sample(prompt=f"{prompt}<start_of_turn>model\n", completion=f"{said[-1][1]}<end_of_turn>")


def _llama2(turns: Turns) -> Sample:
    """Write Llama 2's [INST] turns; a system text stands in <<SYS>>. Source: llama.com/docs, Llama 2 prompt format."""
    system, said = _without_system(turns)
    opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    prompt = ""
    for place, (role, text) in enumerate(said[:-1]):
        first = opening if place == 0 else ""
        prompt += f"[INST] {first}{text} [/INST]" if role == "user" else f" {text} </s><s>"
    return Sample(prompt=prompt, completion=f" {said[-1][1]}")


def _llama3(turns: Turns) -> Sample:
    """Write Llama 3's turns. Source: llama.com/docs, Llama 3 prompt formats."""

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    *before, (_, answer) = turns.messages
    prompt = "".join(f"{header(role)}{text}<|eot_id|>" for role, text in before)
    return Sample(prompt=prompt + header("assistant"), completion=f"{answer}<|eot_id|>")


def _mistral(turns: Turns) -> Sample:
    """Write Mistral's [INST] turns; a system text goes before the first. Source: docs.mistral.ai, chat templates (v1)."""
    said = _system_into_user(turns)
    prompt = "".join(f"[INST] {text} [/INST]" if role == "user" else f" {text}</s>" for role, text in said[:-1])
    return Sample(prompt=prompt, completion=f" {said[-1][1]}")


def _plain(turns: Turns) -> Sample:
    """Write what was said as it is, without marks: a prompt, then its completion."""
    *before, (_, answer) = turns.messages
    prompt = "".join(f"{text.rstrip()}\n" for _, text in before)
    return Sample(prompt=prompt, completion=answer)


#: Formats that need no tokenizer. `auto`, `model`, `chat` and `text` are resolved where the model is known.
WRITERS: dict[str, Write] = {
    "plain": _plain,
    "gemma": _gemma,
    "llama2": _llama2,
    "llama3": _llama3,
    "mistral": _mistral,
}
FORMATS = ("auto", "text", "chat", "model", *WRITERS)

#: Vocabularies from this size on are Llama 3's (128,256 tokens), below it Llama 2's (32,000).
_LLAMA3_VOCABULARY = 100_000


def format_of(config: Mapping[str, Any]) -> str:
    """Return the format that a model's family was tuned on, by its config; `plain` where we know none."""
    family = str(config.get("model_type", ""))
    if family.startswith("gemma"):
        return "gemma"
    if family in ("mistral", "mixtral", "ministral"):
        return "mistral"
    if family == "llama":
        return "llama3" if int(config.get("vocab_size") or 0) >= _LLAMA3_VOCABULARY else "llama2"
    return "plain"


def write_chat(turns: Turns, tokenizer: Any) -> Sample:
    """Write turns by the tokenizer's own chat template. Raises BadValue where it has none or where it refuses them."""
    if not getattr(tokenizer, "chat_template", None):
        todo = "Choose a format (gemma, llama2, llama3, mistral, plain), or the tokenizer of an instruct model."
        raise BadValue("the tokenizer has no chat template", value=_name(tokenizer), todo=todo)
    messages = [{"role": role, "content": text} for role, text in turns.messages]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise BadValue("the chat template refuses this row", value=str(error)[:200], todo="Check its roles.") from error
    if not whole.startswith(prompt):  # a template that marks the last answer differently: learn all of it
        return Sample(prompt="", completion=whole, whole=True)
    return Sample(prompt=prompt, completion=whole[len(prompt) :], whole=True)


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__


def _without_system(turns: Turns) -> tuple[str, Sequence[tuple[str, str]]]:
    system = "\n\n".join(text for role, text in turns.messages if role == "system")
    return system, [(role, text) for role, text in turns.messages if role != "system"]


def _system_into_user(turns: Turns) -> list[tuple[str, str]]:
    """Put a system text before the first user's, for families that have no such role."""
    system, said = _without_system(turns)
    if not system:
        return list(said)
    (role, text), *rest = said
    return [(role, f"{system}\n\n{text}"), *rest]
