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
from ..layers import Build, Linear
from ..tape import FP32, INT64, Tensor
from ..workload import Workload
from .base import trained


def check_task(model: Model, method: str, tasks: Sequence[str]) -> None:
    """Refuse tasks that PEFT has no virtual tokens for. Raises Unsupported."""
    if model.build.task not in tasks:
        todo = f"PEFT runs it for {', '.join(tasks)}. Choose a method that adapts linear layers, LoRA say."
        raise Unsupported(f"{method} of this task", value=model.build.task, todo=todo)


def encoder_layer(build: Build, name: str, n_in: int, n_out: int) -> Linear:
    """Make a layer of what encodes virtual tokens, in fp32."""
    name = f"prompt_encoder.{name}"
    weight = trained(build, f"{name}.weight", n_out, n_in, dtype=FP32)
    return Linear(name, weight, trained(build, f"{name}.bias", n_out, dtype=FP32))


def longer_masks(masks: Sequence[Tensor], virtual: int) -> list[Tensor]:
    """Put P ones before each mask [B, T], which makes it fp32."""
    longer = []
    for mask in masks:
        batch, tokens = mask.shape
        ones = mask.tape.new((batch, virtual), FP32)
        longer.append(mask.tape.new((batch, virtual + tokens), FP32))
        del ones
    return longer


class EmbeddedPrompt(ABC):
    """Virtual tokens whose embeddings stand before those of the input."""

    #: Tasks that PEFT runs it for: labels of tokens get none for the virtual ones, and their loss fails.
    tasks: ClassVar[tuple[str, ...]] = ("causal", "seq-cls", "seq2seq")

    def __init__(self, model: Model, workload: Workload) -> None:
        check_task(model, workload.method, self.tasks)
        self.model, self.virtual = model, workload.num_virtual_tokens
        width, config = model.embed.shape[-1], model.config
        if width != (config.get("hidden_size") or config.get("n_embd") or config.get("d_model")):
            todo = (
                "Choose a method that adapts linear layers, LoRA say: PEFT makes virtual tokens as wide as the layers."
            )
            raise Unsupported(f"{workload.method} where embeddings are of another width", value=width, todo=todo)
        saved = any(model.words.name.endswith(name) for name in workload.modules_to_save)
        #: Whether looked-up rows are asked for a gradient: the hook is on the copy that PEFT saves, where it came first.
        self.rows_ask = not saved or (workload.kbit_preparation and workload.quantization != "none")
        #: Rows of PEFT's table: an encoder-decoder's has some for the decoder, which nothing reads.
        self.rows = self.virtual * (2 if model.build.task == "seq2seq" else 1)

    @abstractmethod
    def encoded(self, numbers: Tensor) -> Tensor:
        """Map numbers [1, P] to embeddings [1, P, D]."""

    @contextmanager
    def __call__(self, inputs: Sequence[Tensor], context: Context) -> Iterator[Sequence[Tensor]]:
        """Yield ids, labels and mask that are P tokens longer, the embeddings of both kinds in the context."""
        ids, labels, *masks = inputs
        batch, tokens = ids.shape
        masks = longer_masks(masks, self.virtual)
        embeddings = self.model.words(ids)
        embeddings = with_input_grad(embeddings, context) if self.rows_ask else embeddings
        given, held = _longer_labels(labels, self.virtual) if self.model.build.task == "causal" else (labels, None)
        prompts = self._repeated(batch)
        prompts = ops.cast(prompts, embeddings.dtype)
        embeddings = ops.concat([_first_rows(prompts, self.virtual), embeddings], 1)
        context.embeddings = embeddings
        try:
            yield [Tensor(ids.tape, None, (batch, self.virtual + tokens), INT64), given, *masks]
        finally:
            context.embeddings = None
        del prompts, held, labels

    def _repeated(self, batch: int) -> Tensor:
        """Encode once and repeat for each sample."""
        numbers = self.model.build.tape.new((batch, self.rows), INT64)  # brought to the device
        numbers = Tensor(numbers.tape, numbers.storage, (1, self.rows), INT64)
        once = self.encoded(numbers)
        out = once.tape.new((batch, *once.shape[1:]), once.dtype)
        out.tape.launch(once.bytes + out.bytes)
        out.tape.record(out, (once,), (), lambda g: (g,))  # summed where gradients are checked
        return out


def _longer_labels(labels: Tensor, virtual: int) -> tuple[Tensor, Tensor]:
    """Put labels that are ignored before those of each sample; returns these, too."""
    tape, (batch, tokens) = labels.tape, labels.shape
    ignored = tape.new((batch, virtual), INT64)
    return tape.new((batch, virtual + tokens), INT64), ignored


def _first_rows(x: Tensor, virtual: int) -> Tensor:
    """View the encoder's rows of [B, 2 P, D]; backward puts their gradient among zeros."""
    shape = x.shape
    if shape[1] == virtual:
        return x
    view = Tensor(x.tape, x.storage, (shape[0], virtual, shape[2]), x.dtype)
    view.tape.record(view, (x,), (), lambda g: (ops.fitted(g, shape),))
    return view
