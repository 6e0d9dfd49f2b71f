"""Lay a whole training step, or prefill and decode, end to end on a tape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import ops
from .errors import Unsupported
from .families import find_family
from .families.base import Cache, Context, Decoder, Model
from .layers import Build, Parameter, token_ids
from .methods import find_method
from .optimizers import find_optimizer
from .quantization import find_quantization, prepare_for_training
from .tape import BF16, FP16, FP32, Dtype, Leaf, Tape, Tensor
from .workload import Workload

WEIGHT_DTYPE: Mapping[str, Dtype] = {
    "bf16-true": BF16,
    "fp16-true": FP16,
    "bf16-mixed": FP32,
    "fp16-mixed": FP32,
    "fp32": FP32,
}
AUTOCAST: Mapping[str, Dtype] = {"bf16-mixed": BF16, "fp16-mixed": FP16}


@dataclass(slots=True, kw_only=True)
class Timeline:
    """The events of a workload: a setup once, then a step that repeats.

    `segments` are (label, first event, behind the last event, first kernel, behind the last kernel) in the order in which
    they happen; one may happen several times.
    """

    tape: Tape
    parameters: list[Parameter]
    setup_events: int
    order: list[tuple[str, int, int]]

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        return sum({id(p.tensor): p.tensor.numel for p in self.parameters if p.trainable}.values())

    def events(self) -> list[int]:
        """Return all events in the order in which they happen."""
        laid = self.tape.events[: self.setup_events]
        for _, start, stop in self.order:
            laid += self.tape.events[start:stop]
        return laid


def build_model(workload: Workload, tape: Tape, config: Mapping[str, Any]) -> Model:
    """Allocate the weights of a model as the workload stores them."""
    recipe = find_family(str(config.get("model_type")))
    if workload.task not in recipe.tasks:
        todo = f"This architecture is predicted for: {', '.join(recipe.tasks)}."
        raise Unsupported(f"task {workload.task!r} of {config.get('model_type')}", value=workload.model, todo=todo)
    dtype = WEIGHT_DTYPE[workload.precision]
    if workload.quantization != "none":
        dtype = BF16 if dtype is FP32 else dtype
    trainable = workload.phase == "train" and find_method(workload.method).trains_base
    build = Build(tape, dtype, trainable, find_quantization(workload.quantization))
    return recipe(config, build)


def lay(workload: Workload, config: Mapping[str, Any] | None = None) -> Timeline:
    """Lay out a workload; `config` replaces the workload's own (fewer layers, say)."""
    config = workload.config if config is None else config
    if workload.phase == "generate":
        return _lay_generation(workload, config)
    return _lay_training(workload, config)


def _lay_training(workload: Workload, config: Mapping[str, Any]) -> Timeline:
    tape = Tape()
    model = build_model(workload, tape, config)
    method = find_method(workload.method)
    if method.trains_base and workload.quantization != "none":
        todo = "Choose an adapter method, or no quantization."
        raise Unsupported("full fine-tuning of quantized weights", value=workload.quantization, todo=todo)
    if workload.quantization != "none" and workload.kbit_preparation:
        prepare_for_training(model.build)
    method.adapt(model, workload)
    inputs = _inputs(workload, tape)
    trained = [p.tensor for p in model.build.parameters if p.trainable]
    context = Context(
        attention=workload.attention,
        padded=workload.padded,
        checkpointing=workload.checkpointing,
        input_grads=workload.checkpointing,
    )
    setup = len(tape.events)
    marks = [setup]
    _forward_backward(model, inputs, context, AUTOCAST.get(workload.precision))
    marks.append(len(tape.events))
    optimizer = find_optimizer(workload.optimizer)
    tape.mark("optimizer")
    with tape.tagged("optimizer state"):
        state = optimizer.start(trained)
    marks.append(len(tape.events))
    with tape.tagged("optimizer workspace"):
        optimizer.step(trained)
    marks.append(len(tape.events))
    for tensor in trained:
        assert isinstance(tensor.node, Leaf)
        tensor.node.grad = None
    marks.append(len(tape.events))
    tape.mark("end")
    step, start, update, clear = zip(marks, marks[1:], strict=False)
    first = [("step", *step), ("optimizer start", *start), ("optimizer", *update), ("clear", *clear)]
    later = [("step", *step), ("optimizer", *update), ("clear", *clear)]
    timeline = Timeline(tape=tape, parameters=model.build.parameters, setup_events=setup, order=[*first, *later, *later])
    tape.events = list(tape.events)  # what dies with this function is no event of the step
    del state
    return timeline


def _inputs(workload: Workload, tape: Tape) -> list[Tensor]:
    with tape.tagged("inputs"):
        shape = (workload.batch_size, workload.seq_len)
        return [token_ids(tape, *shape) for _ in range(3 if workload.padded else 2)]


def _forward_backward(model: Model, inputs: list[Tensor], context: Context, autocast: Dtype | None) -> None:
    assert isinstance(model, Decoder)
    tape = inputs[0].tape
    tape.grad_enabled, tape.autocast = True, autocast
    with tape.tagged("activations"):
        tape.mark("forward")
        loss, logits = model.loss(inputs[0], inputs[1], context)
    tape.autocast = None
    tape.autocast_weights.clear()
    with tape.tagged("gradients"):
        tape.mark("backward")
        tape.backward(loss)
    tape.grad_enabled = False
    del loss, logits


def _lay_generation(workload: Workload, config: Mapping[str, Any]) -> Timeline:
    tape = Tape()
    model = build_model(workload, tape, config)
    assert isinstance(model, Decoder)
    tape.autocast = AUTOCAST.get(workload.precision)
    context = Context(attention=workload.attention, cache=Cache(), training=False)
    ids = token_ids(tape, workload.batch_size, workload.prefill_len)
    setup = len(tape.events)
    with tape.tagged("activations"):
        tape.mark("prefill")
        logits = model.logits(ids, context, last_only=workload.last_logits_only)
        prefill = len(tape.events)
        for index in range(workload.decode_len - 1):
            tape.mark(f"decode {index}")
            token = token_ids(tape, workload.batch_size, 1)
            ids = ops.concat([ids, token], 1)
            logits = model.logits(token, context)
    tape.mark("end")
    stop = len(tape.events)
    order = [("prefill", setup, prefill), ("decode", prefill, stop)]
    timeline = Timeline(tape=tape, parameters=model.build.parameters, setup_events=setup, order=order)
    tape.events = list(tape.events)
    del logits
    return timeline
