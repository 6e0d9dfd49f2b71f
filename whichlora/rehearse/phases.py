"""Inside a rehearsed script: which peaks came in which phase of it, told by what it calls.

Only the standard library: this file is loaded by its path in environments that do not have the rest of this package.

Peaks are those of the time between two marks. Marks are the first call of a module, begin and end of backward, of an
optimizer's step and of `generate`, and the change between `eval()` and `train()`; which phase the time between two marks
was is known at its end: before backward comes forward, before the optimizer's step what belongs to it (clipping).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

LOADING, FORWARD, BACKWARD, OPTIMIZER = "loading", "forward", "backward", "optimizer"
EVALUATION, GENERATION, BETWEEN = "evaluation", "generation", "between steps"
ALLOCATED, RESERVED = "allocated_bytes.all.peak", "reserved_bytes.all.peak"
RAISED_IN = "_whichlora_phase"  # an attribute of errors
_RESETS = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")


class Phases:
    """The peaks of each phase so far, and what PyTorch's counters would say without our looking at them."""

    def __init__(self) -> None:
        self.peaks: dict[str, list[int]] = {}  # phase to allocated and reserved bytes
        self._since_mark = [0, 0]  # what a reset by the script itself would lose
        self._since_reset = [0, 0]  # what our own resets would hide from the script
        self._stats: Callable[..., Any] | None = None
        self._reset: Callable[..., Any] | None = None
        self._inside: list[str] = []
        self._loaded = self._trained = self._evaluating = False

    def mark(self, phase: str) -> None:
        """Say what the time since the last mark was."""
        if self._stats is None or self._reset is None or not sys.modules["torch"].cuda.is_initialized():
            return
        seen = self._read()
        told = self.peaks.setdefault(phase, [0, 0])
        self.peaks[phase] = [max(each) for each in zip(told, seen, self._since_mark)]  # noqa: B905
        self._since_reset = [max(each) for each in zip(self._since_reset, seen)]  # noqa: B905
        self._since_mark = [0, 0]
        self._reset()

    def now(self, problem: BaseException | None = None) -> str:
        """Return the phase that the time since the last mark belongs to, should the script end here, by an error or not."""
        if problem is not None and hasattr(problem, RAISED_IN):
            return str(getattr(problem, RAISED_IN))
        if self._inside:
            return self._inside[-1]
        if not self._loaded:
            return LOADING
        if self._evaluating:
            return EVALUATION
        return BETWEEN if self._trained and problem is None else FORWARD

    def begin(self, phase: str) -> None:
        """Enter backward, an optimizer's step or generation."""
        if phase == OPTIMIZER and self._inside[-1:] == [OPTIMIZER]:
            self.end()  # the last step raised an error, which somebody caught
        self._trained = self._trained or phase == BACKWARD
        if not self._inside:
            before = {BACKWARD: FORWARD, OPTIMIZER: OPTIMIZER}.get(phase)
            self.mark(before if before and self._loaded else self.now())
            self._loaded = True
        self._inside.append(phase)

    def end(self) -> None:
        """Leave it."""
        if self._inside:
            phase = self._inside.pop()
            if not self._inside:
                self.mark(phase)

    def watch_memory(self, memory: ModuleType) -> None:
        """Read torch.cuda.memory's counters; the script shall read what it would read without us."""
        stats, self._reset = memory.memory_stats, memory.reset_peak_memory_stats
        self._stats = stats

        @functools.wraps(stats)
        def with_kept_peaks(*args: Any, **kwargs: Any) -> Any:
            found = stats(*args, **kwargs)
            for name, kept in zip((ALLOCATED, RESERVED), self._since_reset):  # noqa: B905
                if name in found:
                    found[name] = max(found[name], kept)
            return found

        vars(memory)["memory_stats"] = with_kept_peaks
        for name in _RESETS:
            if hasattr(memory, name):
                setattr(memory, name, self._with_reset(getattr(memory, name)))

    def watch_modules(self, module: ModuleType) -> None:
        """Learn of the first call of a module with weights on the card, and of `train()` and `eval()`."""
        handles: list[Any] = []

        def first_call(called: Any, *args: Any) -> None:
            if any(parameter.is_cuda for parameter in called.parameters()):
                handles.pop().remove()
                if not self._loaded:
                    self.mark(LOADING)
                    self._loaded = True

        handles.append(module.register_module_forward_pre_hook(first_call))
        train = module.Module.train

        @functools.wraps(train)
        def watched(model: Any, mode: bool = True) -> Any:
            if self._loaded and not self._inside and mode is self._evaluating:
                self.mark(self.now())
                self._evaluating = not mode
            return train(model, mode)

        module.Module.train = watched

    def watch_backward(self, autograd: ModuleType) -> None:
        """Learn when backward begins and ends."""
        vars(autograd)["backward"] = self._around(BACKWARD, vars(autograd)["backward"])

    def watch_optimizers(self, optimizer: ModuleType) -> None:
        """Learn when any optimizer's step begins and ends."""
        optimizer.register_optimizer_step_pre_hook(lambda *args: self.begin(OPTIMIZER))
        optimizer.register_optimizer_step_post_hook(lambda *args: self.end())

    def watch_generation(self, utils: ModuleType) -> None:
        """Learn when Transformers' `generate` begins and ends."""
        utils.GenerationMixin.generate = self._around(GENERATION, utils.GenerationMixin.generate)

    def patches(self) -> dict[str, Callable[[ModuleType], None]]:
        """Return what is to be patched, by module."""
        return {
            "torch.cuda.memory": self.watch_memory,
            "torch.nn.modules.module": self.watch_modules,
            "torch.autograd": self.watch_backward,
            "torch.optim.optimizer": self.watch_optimizers,
            "transformers.generation.utils": self.watch_generation,
        }

    def _read(self) -> list[int]:
        assert self._stats
        found = self._stats()
        return [found.get(name, 0) for name in (ALLOCATED, RESERVED)]

    def _with_reset(self, reset: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reset)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            self._since_mark = [max(each) for each in zip(self._since_mark, self._read())]  # noqa: B905
            self._since_reset = [0, 0]
            return reset(*args, **kwargs)

        return keeping

    def _around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark begin and end of a function; an error keeps where it was raised."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.begin(phase)
            try:
                return function(*args, **kwargs)
            except BaseException as problem:
                if not hasattr(problem, RAISED_IN):
                    setattr(problem, RAISED_IN, phase)
                raise
            finally:
                self.end()

        return watched
