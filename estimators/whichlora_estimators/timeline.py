"""Lay a whole training step, or prefill and decode, end to end on a tape."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from . import ops
from .allocator import AllocatorState, CachingAllocator
from .attention import FLASH_ATTENTION_2
from .deepen import NotAlike, deepen, laid_name
from .errors import Unsupported
from .families import find_family
from .families.base import Context, Model
from .families.caches import Cache
from .layers import Build, Parameter, token_ids
from .methods import find_method
from .methods.prompts import EmbeddedPrompt
from .methods.targets import check_options, save_modules, tells_layers_apart, train_biases
from .methods.tokens import train_tokens
from .optimizers import clip, find_optimizer
from .quantization import find_quantization, prepare_for_training
from .stack import NEWEST_STACK, Stack
from .tape import A100_MULTIPROCESSORS, BF16, FP16, FP32, Dtype, Leaf, Mark, Tape, Tensor
from .workload import Workload

WEIGHT_DTYPE: Mapping[str, Dtype] = {
    "bf16-true": BF16,
    "fp16-true": FP16,
    "bf16-mixed": FP32,
    "fp16-mixed": FP32,
    "fp32": FP32,
}
AUTOCAST: Mapping[str, Dtype] = {"bf16-mixed": BF16, "fp16-mixed": FP16}

#: Decode steps that are laid out one by one; of a longer generation, the first ones and the last one.
DECODE_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of the tape: from a mark to a later one."""

    label: str
    first: Mark
    last: Mark


@dataclass(slots=True, kw_only=True)
class Timeline:
    """What happens in a workload: a setup, then segments in the `order` in which they happen, some more than once.

    The last `repeated` of them are the same as those right before, and free all that they allocate.
    """

    tape: Tape
    parameters: list[Parameter]
    setup: Segment
    order: list[Segment] = field(default_factory=list)
    skipped_decode_steps: int = 0
    repeated: int = 0

    @property
    def trainable_params(self) -> int:
        """Count the elements that train."""
        return sum({id(p.tensor): p.tensor.numel for p in self.parameters if p.trainable}.values())

    def events(self) -> list[int]:
        """Return all events in the order in which they happen."""
        return self._events((self.setup, *self.order))

    def replay(self, allocator: CachingAllocator) -> AllocatorState:
        """Run everything on an allocator and return its counters, peaks from the end of the setup on.

        Raises OutOfMemory where the allocator has a limit.
        """
        sizes, start, setup = self.tape.sizes, 0, self.tape.events[: self.setup.last.event]
        for stop in (*self.tape.emptied, len(setup)):
            allocator.run(sizes, setup[start:stop])
            if stop in self.tape.emptied:
                allocator.empty_cache()
            start = stop
        allocator.reset_peaks()
        with no_collector():
            allocator.run(sizes, self._events(self.order[: len(self.order) - 2 * self.repeated]))
            if self.repeated:
                allocator.run_twice(sizes, self._events(self.order[-self.repeated :]))
        return allocator.state()

    def distinct_events(self) -> list[int]:
        """Return all events but those of the last step where it repeats the one before, with the same bytes live."""
        return self._events((self.setup, *self.order[: len(self.order) - self.repeated]))

    def _events(self, segments: Sequence[Segment]) -> list[int]:
        laid: list[int] = []
        for segment in segments:
            laid += self.tape.events[segment.first.event : segment.last.event]
        return laid


@contextmanager
def no_collector() -> Iterator[None]:
    """Let nothing look for cycles: what dies here dies with its last reference, and looking takes a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Recorder:
    """Cuts a tape into segments."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.start = tape.cut("setup")

    def cut(self, label: str) -> Segment:
        """End the segment that began at the last cut."""
        here = self.tape.cut(label)
        segment = Segment(label=label, first=self.start, last=here)
        self.start = here
        return segment


def lay(
    workload: Workload,
    config: Mapping[str, Any] | None = None,
    *,
    compute_capability: tuple[int, int] = (8, 0),
    multiprocessors: int = A100_MULTIPROCESSORS,
    stack: Stack = NEWEST_STACK,
    whole: bool = False,
) -> Timeline:
    """Lay out a workload; `config` replaces its own (fewer layers, say). Raises UnknownName or Unsupported.

    Of layers that are alike a few are laid and copied for the rest, which makes the same timeline; `whole` lays them all.
    """
    config = workload.config if config is None else config
    tape = Tape(compute_capability, multiprocessors=multiprocessors, stack=stack)
    try:
        with no_collector():
            lay_phase = _lay_generation if workload.phase == "generate" else _lay_training
            return lay_phase(workload, config, tape, whole=whole)
    except NotAlike:
        return lay(
            workload,
            config,
            compute_capability=compute_capability,
            multiprocessors=multiprocessors,
            stack=stack,
            whole=True,
        )


def build_model(workload: Workload, tape: Tape, config: Mapping[str, Any]) -> Model:
    """Allocate the weights of a model as the workload stores them."""
    recipe = find_family(str(config.get("model_type")))
    if workload.task not in recipe.tasks:
        todo = f"This architecture is predicted for: {', '.join(recipe.tasks)}."
        raise Unsupported(f"task {workload.task!r} of {config.get('model_type')}", value=workload.model, todo=todo)
    if workload.attention == FLASH_ATTENTION_2 and not recipe.flash:
        todo = "Choose sdpa or eager."
        raise Unsupported(f"flash_attention_2 of {config.get('model_type')}", value=workload.model, todo=todo)
    dtype = WEIGHT_DTYPE[workload.precision]
    if workload.quantization != "none":  # the weights beside those that are quantized are loaded in 16 bit
        dtype = AUTOCAST.get(workload.precision, dtype)
    trainable = workload.phase == "train" and find_method(workload.method).trains_base
    build = Build(
        tape,
        dtype,
        trainable,
        find_quantization(workload.quantization, double=workload.double_quantization),
        workload.task,
        loaded=workload.phase == "generate",
    )
    model = recipe(config, build)
    build.settle()
    tape.flash_repeats = tape.stack.repeats_for_flash(model.model_type)
    return model


def count_parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters of a model, shared ones once. Raises UnknownName for an architecture without a recipe."""
    return _count(_bare_model(config))


def count_active_parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters that a token meets: all of them but those of experts that it is not sent to."""
    model = _bare_model(config)
    return _count(model) - sum(stack.idle_elements for stack in model.build.stacks)


def _bare_model(config: Mapping[str, Any]) -> Model:
    recipe = find_family(str(config.get("model_type")))
    return recipe(config, Build(Tape(), BF16, trainable=False, task=recipe.tasks[0]))


def _count(model: Model) -> int:
    return sum({id(p.tensor): p.tensor.numel for p in model.build.parameters}.values())


def _lay_training(workload: Workload, config: Mapping[str, Any], tape: Tape, *, whole: bool) -> Timeline:
    recorder = _Recorder(tape)
    model = _trainable_model(workload, tape, config)
    tape.period = 0 if whole else _period(model, workload)
    with tape.tagged("inputs"):
        inputs = model.make_inputs(workload)
    timeline = Timeline(tape=tape, parameters=model.build.parameters, setup=recorder.cut("setup"))
    first = _forward_backward(model, inputs, workload, recorder)
    later = _forward_backward(model, inputs, workload, recorder, again=True) if workload.accumulation > 1 else []
    trained = _reached(timeline.parameters, tape)
    optimizer = find_optimizer(workload.optimizer, workload.method)
    clipping = []
    if workload.clip_grad_norm is not None:
        clip(trained)
        clipping = [recorder.cut("clipping")]
    with tape.tagged("optimizer state"):
        state = optimizer.start(trained)
    start = [recorder.cut("optimizer state")]
    with tape.tagged("optimizer workspace"):
        optimizer.step(trained)
    update = [recorder.cut("optimizer step")]
    for tensor in trained:
        assert isinstance(tensor.node, Leaf)
        tensor.node.grad = None
    clear = [recorder.cut("zero grad")]
    tape.events = list(tape.events)  # what dies with this function is no event of the step
    _put_in_layers(timeline, first, later, clipping, start, update, clear)
    step = [*first, *(workload.accumulation - 1) * later, *clipping]
    repeated = {id(segment): _again(tape, segment) for segment in step}
    again = [repeated[id(segment)] for segment in step]
    later_step = [
        *again,
        *update,
        *clear,
    ]  # twice: the first step made the optimizer's state, the third finds all settled
    timeline.order, timeline.repeated = [*step, *start, *update, *clear, *later_step, *later_step], len(later_step)
    del state
    return timeline


def _period(model: Model, workload: Workload) -> int:
    """Return after how many layers a model repeats itself; 0 where something tells layers apart before they run.

    Prefix tuning does: every layer's part of the cache is made at the start.
    """
    prefixed = model.prompt is not None and not isinstance(model.prompt, EmbeddedPrompt)
    return 0 if prefixed or tells_layers_apart(workload) else model.period(model.config)


def _reached(parameters: Sequence[Parameter], tape: Tape) -> list[Tensor]:
    """Return what trains and got a gradient: in a layer that was not laid, what gets one in the first that it is like."""
    leaves = [(parameter.name, parameter.tensor, parameter.tensor.node) for parameter in parameters]
    trained = [(name, tensor, node) for name, tensor, node in leaves if isinstance(node, Leaf)]
    if not tape.left_out:
        return [tensor for _, tensor, node in trained if node.grad is not None]
    reached = {name for name, _, node in trained if node.grad is not None}
    return [tensor for name, tensor, _ in trained if name in reached or laid_name(tape, name) in reached]


def _put_in_layers(timeline: Timeline, *parts: list[Segment]) -> None:
    """Replace segments by those of the deep tape, if any layers were left out."""
    tape = timeline.tape
    if not tape.left_out:
        return
    segments = [timeline.setup, *chain(*parts)]
    moved = deepen(tape, [segment.first for segment in segments])

    def deep(segment: Segment) -> Segment:
        return Segment(label=segment.label, first=moved[id(segment.first)], last=moved[id(segment.last)])

    timeline.setup = deep(timeline.setup)
    for part in parts:
        part[:] = map(deep, part)


def _again(tape: Tape, segment: Segment) -> Segment:
    """Lay a segment once more behind everything, without what happens only the first time."""
    first, last = segment.first, segment.last
    events = tape.events[first.event : last.event]
    if tape.once.isdisjoint(events):
        return segment
    places = [place for place, event in enumerate(events, first.event) if event in tape.once]
    shift = len(tape.events) - first.event

    def moved(mark: Mark) -> Mark:
        event = mark.event + shift - sum(place < mark.event for place in places)
        return replace(mark, event=event)

    for place in reversed(places):
        del events[place - first.event]
    tape.events += events
    tape.marks += [moved(mark) for mark in tape.marks if first.event <= mark.event < last.event]
    return Segment(label=segment.label, first=moved(first), last=moved(last))


def _trainable_model(workload: Workload, tape: Tape, config: Mapping[str, Any]) -> Model:
    method = find_method(workload.method)
    if method.trains_base and workload.quantization != "none":
        todo = "Choose an adapter method, or no quantization."
        raise Unsupported("full fine-tuning of quantized weights", value=workload.quantization, todo=todo)
    model = build_model(workload, tape, config)
    if workload.quantization != "none" and workload.kbit_preparation:
        prepare_for_training(model.build)
    check_options(method, workload)
    model.build.saving = None if method.trains_base else partial(save_modules, model, workload)
    method.adapt(model, workload)
    if not method.trains_base:
        train_biases(model.build, workload.bias)
        model.build.save()
        train_tokens(model, workload)
    return model


def _forward_backward(
    model: Model, inputs: list[Tensor], workload: Workload, recorder: _Recorder, *, again: bool = False
) -> list[Segment]:
    """Lay a pass and its backward; `again` says that gradients of an earlier one are there."""
    tape = recorder.tape
    context = Context(
        attention=workload.attention,
        padded=workload.padded,
        checkpointing=workload.checkpointing,
        input_grads=workload.checkpointing,
    )
    tape.grad_enabled, tape.autocast = True, AUTOCAST.get(workload.precision)
    tape.drops, tape.reentrant = True, workload.reentrant
    with tape.tagged("activations"):
        tape.mark("forward")
        with nullcontext(inputs) if model.prompt is None else model.prompt(inputs, context) as given:
            loss, output = model.step_loss(given, context)
        del given
        for penalized in model.build.penalties:
            loss = penalized(loss)
    tape.autocast = None
    tape.autocast_weights.clear()
    forward = recorder.cut("forward")
    if not workload.output_kept:
        output = context.cache = None  # an output holds the cache of a prefix
    if workload.accumulation > 1:
        loss = ops.scale(loss)
    tape.backward(loss, again=again)
    tape.cut("end of backward")
    tape.grad_enabled = False
    del loss, output, context
    return [forward, recorder.cut("backward")]


def _lay_generation(workload: Workload, config: Mapping[str, Any], tape: Tape, *, whole: bool) -> Timeline:
    recorder = _Recorder(tape)
    model = build_model(workload, tape, config)
    tape.period = 0 if whole else model.period(model.config)
    tape.autocast = AUTOCAST.get(workload.precision)
    context = _inference(model, workload)
    ids = token_ids(tape, workload.batch_size, workload.prefill_len)
    held = [] if workload.task == "causal" else [ids]  # a causal prompt goes over into longer ids
    held += [token_ids(tape, *ids.shape)] if workload.masked else []
    timeline = Timeline(tape=tape, parameters=model.build.parameters, setup=recorder.cut("setup"))
    with tape.tagged("activations"):
        tape.mark("prefill")
        logits, ids = model.prefill(ids, context, last_only=workload.last_logits_only)
        timeline.order.append(recorder.cut("prefill"))
        if workload.passes > 1:
            kept = [logits] if workload.task == "token-cls" else [logits, context]  # such an output holds no cache
            context = _inference(model, workload)
            tape.mark("prefill")
            logits, ids = model.prefill(ids, context, last_only=workload.last_logits_only)
            timeline.order.append(recorder.cut("prefill again"))
            del kept
        timeline.skipped_decode_steps = max(0, workload.decoded - DECODE_STEPS)
        for index in range(min(workload.decoded, DECODE_STEPS)):
            tape.mark("decode")
            if index == DECODE_STEPS - 1 and timeline.skipped_decode_steps:
                _skip(context.cache, timeline.skipped_decode_steps)
                timeline.order.append(recorder.cut("growth"))
            token = token_ids(tape, workload.batch_size, 1)
            ids = ops.concat([ids, token], 1)
            logits = model.decode(token, context)
            if context.cache is not None:
                context.cache.end_step()
            timeline.order.append(recorder.cut(f"decode {index}"))
    tape.events = list(tape.events)
    _put_in_layers(timeline, timeline.order)
    del logits, held
    return timeline


def _inference(model: Model, workload: Workload) -> Context:
    context = Context(attention=workload.attention, padded=workload.masked, training=False)
    model.make_caches(workload, context)
    return context


def _skip(cache: Cache | None, tokens: int) -> None:
    assert cache is not None
    cache.skip(tokens)
