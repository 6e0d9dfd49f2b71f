"""A workload run by the real libraries: load, then training steps, or prefill and decode, phase by phase.

The same code runs on the null device, on a real card and on the host; what differs is the recorder that it is given,
and the clock: with one, whole steps are timed once memory has been recorded.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from whichlora_estimators.errors import Unsupported
from whichlora_estimators.workload import Workload

from .adapters import adapt, make_optimizer
from .models import build_model
from .values import give_values

#: The first step makes the optimizer's state; from the second on every step is alike.
STEPS = 3
#: What the phase of the timed steps is called, should they run out of memory.
TIMING = "timed steps"
_AUTOCAST = {"bf16-mixed": "bfloat16", "fp16-mixed": "float16"}

Phase = Callable[[str], AbstractContextManager[None]]


class Clock(Protocol):
    """Times work that may still be under way when the host goes on: moments are marked now and compared later."""

    @property
    def warmup(self) -> int:
        """Whole steps, or generations, that run before the timed ones."""

    @property
    def steps(self) -> int:
        """Steps, or generations, that are timed."""

    def mark(self) -> Any:
        """Return this moment of the device's work."""

    def between_s(self, marks: list[Any]) -> list[float]:
        """Wait for all marks and return the seconds between each and the next."""


class Recorder:
    """Keeps what PyTorch's counters show: `counts` by name, `peaks` by phase as (allocated, reserved) bytes.

    `times` holds seconds by name, where a clock was given. `current` is the phase that runs or, after an error, the one
    that it struck in. Subclasses see phases begin and end.
    """

    device = "cuda"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.peaks: dict[str, tuple[int, int]] = {}
        self.times: dict[str, list[float]] = {}
        self.current = ""
        self.loaded_us = 0  # since the epoch; of what comes later the peaks are told

    def mask_is_full(self, full: bool) -> None:
        """Tell the null device, which stores no mask, whether one that is asked about would be all ones."""
        from whichlora.nulldevice import control

        if control.is_null_device():
            control.reset()
            control.set_bool(full)

    def build(self, workload: Workload) -> Any:
        """Return the workload's model on the device; a subclass may load it from a checkpoint."""
        return build_model(workload, self.device)

    def count_process(self) -> None:
        """Hear that the process holds the most that it will hold, or nearly."""

    def count_allocated(self, name: str) -> None:
        """Keep what is allocated now."""
        import torch

        self.counts[name] = torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a phase that comes several times keeps its highest peaks."""
        import torch

        self.current = name
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            allocated, reserved = self.peaks.get(name, (0, 0))
            seen = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.peaks[name] = max(allocated, seen[0]), max(reserved, seen[1])
        self.current = ""
        if name == "load":
            self.loaded_us = time.time_ns() // 1000


def run(workload: Workload, recorder: Recorder, clock: Clock | None = None) -> None:
    """Run a workload that `adapters.check` let through; the recorder then holds what was seen.

    With a clock the weights get random values, since how fast a card computes depends on them, and memory is recorded
    before anything is timed. Raises whatever the libraries raise, `torch.OutOfMemoryError` first of all.
    """
    recorder.mask_is_full(not workload.masked)
    (_generate if workload.phase == "generate" else _train)(workload, recorder, clock)


def _train(workload: Workload, recorder: Recorder, clock: Clock | None) -> None:
    with recorder.phase("load"):
        model = _load(workload, recorder, clock)
        vocabulary = model.get_input_embeddings().num_embeddings
        model = adapt(model, workload)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        recorder.counts["trainable_params"] = sum(parameter.numel() for parameter in trainable)
        optimizer = make_optimizer(model, workload)
        inputs = _inputs(workload, vocabulary, recorder.device)
        recorder.count_allocated("model_bytes")
    # A scale of 1 overflows nothing, so no step is skipped. Bytes and times do not depend on it.
    scaler = _scaler(recorder.device, enabled=workload.precision == "fp16-mixed")

    def step(phase: Phase) -> None:
        _step(model, inputs, optimizer, scaler, workload, phase, recorder.device)

    for _ in range(STEPS):
        step(recorder.phase)
    recorder.count_process()
    if clock:
        _time_steps(step, recorder, clock)


def _scaler(device: str, *, enabled: bool) -> Any:
    import torch

    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device, init_scale=1.0, enabled=enabled)
    return torch.cuda.amp.GradScaler(init_scale=1.0, enabled=enabled)  # before PyTorch 2.3


def _load(workload: Workload, recorder: Recorder, clock: Clock | None) -> Any:
    model = recorder.build(workload)
    recorder.count_allocated("weights_bytes")
    if clock:
        give_values(model, quantized=workload.quantization != "none")
    return model


def _step(
    model: Any, inputs: dict[str, Any], optimizer: Any, scaler: Any, workload: Workload, phase: Phase, device: str
) -> None:
    """Forward and backward once or more, optimizer.

    Output and logits live until backward is over, as in a plain loop, unless the workload says that only the loss does
    (transformers/trainer.py: `compute_loss` returns nothing else).
    """
    import torch

    for _ in range(workload.accumulation):
        with phase("forward"), _autocast(workload, device):
            output = model(**inputs)
        with phase("backward"):
            loss = output.loss
            if not workload.output_kept:
                output = None
            if workload.accumulation > 1:
                loss = loss / workload.accumulation
            scaler.scale(loss).backward()
            del output, loss
    with phase("optimizer"):
        if workload.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def _time_steps(step: Callable[[Phase], None], recorder: Recorder, clock: Clock) -> None:
    """Time whole steps: no counter is reset or read in between, and nothing waits for the device."""
    recorder.current = TIMING
    for _ in range(clock.warmup):
        step(_unseen)
    marks = [clock.mark()]
    for _ in range(clock.steps):
        step(_unseen)
        marks.append(clock.mark())
    recorder.times["step"] = clock.between_s(marks)
    recorder.count_process()
    recorder.current = ""


def _unseen(name: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _autocast(workload: Workload, device: str) -> Any:
    import torch

    dtype = getattr(torch, _AUTOCAST.get(workload.precision, "bfloat16"))
    return torch.autocast(device, dtype=dtype, enabled=workload.precision in _AUTOCAST)


def _inputs(workload: Workload, vocabulary: int, device: str) -> dict[str, Any]:
    """Return a batch of random tokens, its labels, with padding a mask that hides the first sample's last token.

    The gradient of an embedding takes much longer where all tokens are the same.
    """
    import torch

    shape = (workload.batch_size, workload.seq_len)
    inputs = _tokens(shape, vocabulary, device, padded=workload.padded)
    labels = {
        "causal": shape,
        "seq-cls": shape[:1],
        "token-cls": shape,
        "masked-lm": shape,
        "seq2seq": (workload.batch_size, workload.target_len or workload.seq_len),
    }
    inputs["labels"] = torch.zeros(labels[workload.task], dtype=torch.long, device=device)
    return inputs


def _tokens(shape: tuple[int, int], vocabulary: int, device: str, *, padded: bool) -> dict[str, Any]:
    import torch

    inputs = {"input_ids": torch.randint(vocabulary, shape, device=device)}
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -1] = 0
    return inputs


def _generate(workload: Workload, recorder: Recorder, clock: Clock | None) -> None:
    import torch

    with torch.inference_mode():
        with recorder.phase("load"):
            model = _load(workload, recorder, clock).eval()
            shape = (workload.batch_size, workload.prefill_len)
            vocabulary = model.get_input_embeddings().num_embeddings
            inputs = _tokens(shape, vocabulary, recorder.device, padded=workload.masked)
        recorder.counts["trainable_params"] = 0
        infer = _INFERENCES.get(workload.task, _Reading)

        def once(phase: Phase) -> None:
            _generation(infer(model, inputs, workload), workload, phase, recorder.device)

        once(recorder.phase)
        recorder.count_process()
        if clock:
            _time_generations(once, workload.passes, recorder, clock)


def _generation(inference: _Reading, workload: Workload, phase: Phase, device: str) -> None:
    """Run the first pass, then one token at a time, each the likeliest."""
    import torch

    for _ in range(workload.passes):  # a second one while the output of the first is held
        with phase("prefill"), _autocast(workload, device):
            output, ids = inference.begin()
    for _ in range(workload.decoded):
        with phase("decode"), _autocast(workload, device):
            token = output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            output = inference.go_on(token, output.past_key_values)


class _Reading:
    """One pass over whole texts."""

    def __init__(self, model: Any, inputs: dict[str, Any], workload: Workload) -> None:
        self.model, self.inputs, self.workload = model, dict(inputs), workload

    def begin(self) -> tuple[Any, Any]:
        """Return the output of the first pass, and the ids that tokens come behind."""
        return self.model(**self.inputs), self.inputs["input_ids"]

    def go_on(self, token: Any, cache: Any) -> Any:
        """Return the output of a pass over the next token."""
        raise AssertionError("what reads generates nothing")


class _Writing(_Reading):
    """A causal model: a prompt that fills a cache, then what comes behind it."""

    def begin(self) -> tuple[Any, Any]:
        """Read the prompt."""
        ids, cache = self.inputs["input_ids"], _cache(self.model, self.workload)
        return self.model(input_ids=ids, use_cache=True, **cache, **_logits(self.model, self.workload)), ids

    def go_on(self, token: Any, cache: Any) -> Any:
        """Read a token."""
        return self.model(input_ids=token, past_key_values=cache, use_cache=True)


class _Answering(_Reading):
    """An encoder-decoder, as `generate` runs it: the encoder once, the decoder from the token that begins an answer on."""

    def begin(self) -> tuple[Any, Any]:
        """Encode, and decode the first token."""
        import torch

        ids = self.inputs.pop("input_ids")
        self.inputs["encoder_outputs"] = self.model.get_encoder()(input_ids=ids, **self.inputs)
        begin = torch.full((len(ids), 1), self.model.config.decoder_start_token_id or 0, device=ids.device)
        cache = _two_caches(self.model, self.workload)
        return self._scored(self.model(decoder_input_ids=begin, use_cache=True, **cache, **self.inputs)), begin

    def go_on(self, token: Any, cache: Any) -> Any:
        """Decode a token."""
        inputs = {"decoder_input_ids": token, "past_key_values": cache, **self.inputs}
        return self._scored(self.model(use_cache=True, **inputs))

    def _scored(self, output: Any) -> Any:
        """Put an fp32 copy in the place of the logits, all that is kept of an output until the next one is there."""
        import torch

        output.logits = output.logits[:, -1:].to(copy=True, dtype=torch.float32)
        return output


_INFERENCES = {"causal": _Writing, "seq2seq": _Answering}


def _time_generations(generation: Callable[[Phase], None], passes: int, recorder: Recorder, clock: Clock) -> None:
    """Time whole generations, one after the other: each of the first `passes`, and each token that is decoded after it."""
    recorder.current = TIMING
    marks: list[Any] = []

    @contextlib.contextmanager
    def marked(name: str) -> Iterator[None]:
        yield
        marks.append(clock.mark())

    for _ in range(clock.warmup):
        generation(_unseen)
    for _ in range(clock.steps):
        marks[:] = [clock.mark()]
        generation(marked)
        seconds = clock.between_s(marks)
        recorder.times.setdefault("prefill", []).extend(seconds[:passes])
        if seconds[passes:]:
            recorder.times.setdefault("decode_per_token", []).extend(seconds[passes:])
    recorder.count_process()
    recorder.current = ""


def _cache(model: Any, workload: Workload) -> dict[str, Any]:
    """Return the cache of all tokens, made beforehand, where one that grows is not what is wanted.

    From 4.42 to 4.47 models make one that grows only if they are given one, as generate() does.
    """
    import transformers

    if workload.cache == "dynamic":
        release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        grows = release < (4, 48) and getattr(model, "_supports_default_dynamic_cache", bool)()
        return {"past_key_values": transformers.DynamicCache()} if grows else {}
    length = workload.prefill_len + workload.decode_len
    return {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=length)}


def _two_caches(model: Any, workload: Workload) -> dict[str, Any]:
    """Return the caches of a decoder and of what it sees of the encoder, as `generate` makes them beforehand, if it does."""
    import transformers

    if workload.cache == "dynamic":
        return {}
    lengths = workload.decode_len, workload.prefill_len
    config = model.config.get_text_config(decoder=True)
    static = [transformers.StaticCache(config=config, max_cache_len=length) for length in lengths]
    return {"past_key_values": transformers.EncoderDecoderCache(*static)}


def _logits(model: Any, workload: Workload) -> dict[str, int]:
    """Return the argument that keeps the last position's logits only, by both names that it has had."""
    if not workload.last_logits_only:
        return {}
    known = inspect.signature(model.forward).parameters
    for name in ("logits_to_keep", "num_logits_to_keep"):
        if name in known:
            return {name: 1}
    todo = "Set last_logits_only to false (--all-logits): this version computes them all."
    raise Unsupported("this model cannot leave out logits of the prompt", value=type(model).__name__, todo=todo)
