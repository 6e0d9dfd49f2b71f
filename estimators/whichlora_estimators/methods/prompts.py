"""What the methods that train virtual tokens share (peft/peft_model.py, PeftModelForCausalLM.forward; read in 0.21).

# B batch, T tokens, P virtual tokens, D width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from .. import ops
from ..errors import Unsupported
from ..families.base import Context, Model, with_input_grad
from ..tape import FP32, INT64, Tensor

#: As many as rehearsals take: PEFT has no default.
VIRTUAL_TOKENS = 20


def check_task(model: Model, method: str, tasks: Sequence[str]) -> None:
    """Refuse tasks that PEFT has no virtual tokens for. Raises Unsupported."""
    if model.build.task not in tasks:
        todo = f"PEFT runs it for {', '.join(tasks)}. Choose a method that adapts linear layers, LoRA say."
        raise Unsupported(f"{method} of this task", value=model.build.task, todo=todo)


def prompt_rows(model: Model) -> int:
    """Return how many rows PEFT's table has: an encoder-decoder's has some for the decoder, which nothing reads."""
    return VIRTUAL_TOKENS * (2 if model.build.task == "seq2seq" else 1)


def longer_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    """Put P ones before each mask [B, T], which makes it fp32."""
    longer = []
    for mask in masks:
        batch, tokens = mask.shape
        ones = mask.tape.new((batch, VIRTUAL_TOKENS), FP32)
        longer.append(mask.tape.new((batch, VIRTUAL_TOKENS + tokens), FP32))
        del ones
    return longer


def token_numbers(model: Model, batch: int) -> Tensor:
    """Bring the numbers of the virtual tokens to the device, [B, P]."""
    return model.build.tape.new((batch, prompt_rows(model)), INT64)


class EmbeddedPrompt(ABC):
    """Virtual tokens whose embeddings stand before those of the input."""

    #: Tasks that PEFT runs it for: labels of tokens get none for the virtual ones, and their loss fails.
    tasks: ClassVar[tuple[str, ...]] = ("causal", "seq-cls", "seq2seq")

    def __init__(self, model: Model, method: str) -> None:
        check_task(model, method, self.tasks)
        self.model = model

    @abstractmethod
    def encoded(self, numbers: Tensor) -> Tensor:
        """Map numbers [1, P] to embeddings [1, P, D]."""

    @contextmanager
    def __call__(self, inputs: Sequence[Tensor], context: Context) -> Iterator[Sequence[Tensor]]:
        """Yield ids, labels and mask that are P tokens longer, the embeddings of both kinds in the context."""
        ids, labels, *masks = inputs
        batch, tokens = ids.shape
        masks = longer_masks(masks)
        embeddings = with_input_grad(self.model.words(ids), context)
        given, held = _longer_labels(labels) if self.model.build.task == "causal" else (labels, None)
        prompts = self._repeated(batch)
        prompts = ops.cast(prompts, embeddings.dtype)
        embeddings = ops.concat([_first_rows(prompts), embeddings], 1)
        context.embeddings = embeddings
        try:
            yield [Tensor(ids.tape, None, (batch, VIRTUAL_TOKENS + tokens), INT64), given, *masks]
        finally:
            context.embeddings = None
        del prompts, held, labels

    def _repeated(self, batch: int) -> Tensor:
        """Encode once and repeat for each sample."""
        numbers = token_numbers(self.model, batch)
        numbers = Tensor(numbers.tape, numbers.storage, (1, prompt_rows(self.model)), INT64)
        once = self.encoded(numbers)
        out = once.tape.new((batch, *once.shape[1:]), once.dtype)
        out.tape.launch(once.bytes + out.bytes)
        out.tape.record(out, (once,), (), lambda g: (g,))  # summed where gradients are checked
        return out


def _longer_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put labels that are ignored before those of each sample; returns these, too."""
    tape, (batch, tokens) = labels.tape, labels.shape
    ignored = tape.new((batch, VIRTUAL_TOKENS), INT64)
    return tape.new((batch, VIRTUAL_TOKENS + tokens), INT64), ignored


def _first_rows(x: Tensor) -> Tensor:
    """View the encoder's rows of [B, 2 P, D]; backward puts their gradient among zeros."""
    shape = x.shape
    if shape[1] == VIRTUAL_TOKENS:
        return x
    view = Tensor(x.tape, x.storage, (shape[0], VIRTUAL_TOKENS, shape[2]), x.dtype)
    view.tape.record(view, (x,), (), lambda g: (ops.fitted(g, shape),))
    return view
