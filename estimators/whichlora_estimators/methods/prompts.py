"""What the methods that train virtual tokens share (peft/peft_model.py, PeftModelForCausalLM.forward; read in 0.21).

# B batch, T tokens, P virtual tokens, D width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import ops
from ..errors import Unsupported
from ..families.base import Context, Decoder, Model, with_input_grad
from ..tape import FP32, INT64, Tensor

#: As many as rehearsals take: PEFT has no default.
VIRTUAL_TOKENS = 20


def decoder_of(model: Model, method: str) -> Decoder:
    """Return the model as one that virtual tokens are predicted for; Unsupported otherwise."""
    if not isinstance(model, Decoder) or model.build.task != "causal":
        todo = "Choose a method that adapts linear layers, LoRA say."
        raise Unsupported(f"{method} of models other than causal decoders", value=type(model).__name__, todo=todo)
    return model


def longer_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    """Put P ones before each mask [B, T], which makes it fp32."""
    longer = []
    for mask in masks:
        batch, tokens = mask.shape
        ones = mask.tape.new((batch, VIRTUAL_TOKENS), FP32)
        longer.append(mask.tape.new((batch, VIRTUAL_TOKENS + tokens), FP32))
        del ones
    return longer


def token_numbers(model: Decoder, batch: int) -> Tensor:
    """Bring the numbers of the virtual tokens to the device, [B, P]."""
    return model.build.tape.new((batch, VIRTUAL_TOKENS), INT64)


class EmbeddedPrompt(ABC):
    """Virtual tokens whose embeddings stand before those of the input."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @abstractmethod
    def encoded(self, numbers: Tensor) -> Tensor:
        """Map numbers [1, P] to embeddings [1, P, D]."""

    @contextmanager
    def __call__(self, inputs: Sequence[Tensor], context: Context) -> Iterator[Sequence[Tensor]]:
        """Yield ids, labels and mask that are P tokens longer, the embeddings of both kinds in the context."""
        ids, labels, *masks = inputs
        tape, (batch, tokens) = ids.tape, ids.shape
        masks = longer_masks(masks)
        embeddings = with_input_grad(self.model.embedded(ids, context), context)
        ignored, longer = tape.new((batch, VIRTUAL_TOKENS), INT64), tape.new((batch, VIRTUAL_TOKENS + tokens), INT64)
        prompts = self._repeated(batch)
        prompts = ops.cast(prompts, embeddings.dtype)
        embeddings = ops.concat([prompts, embeddings], 1)
        context.embeddings = embeddings
        try:
            yield [Tensor(tape, None, longer.shape, INT64), longer, *masks]
        finally:
            context.embeddings = None
        del prompts, ignored, labels

    def _repeated(self, batch: int) -> Tensor:
        """Encode once and repeat for each sample."""
        numbers = token_numbers(self.model, batch)
        numbers = Tensor(numbers.tape, numbers.storage, (1, VIRTUAL_TOKENS), INT64)
        once = self.encoded(numbers)
        out = once.tape.new((batch, *once.shape[1:]), once.dtype)
        out.tape.launch(once.bytes + out.bytes)
        out.tape.record(out, (once,), (), lambda g: (g,))  # summed where gradients are checked
        return out
