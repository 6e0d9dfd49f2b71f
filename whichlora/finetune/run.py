"""Run a recipe in this process, from where it was left, and keep what it showed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_estimators.files import write_whole
from whichlora_estimators.gpus import Gpu, context_bytes
from whichlora_profiles_db import Environment, Store

from ..data.samples import load_samples
from ..data.tokens import character_ratio
from ..records import to_json
from .evaluate import Scores, evaluate
from .examples import Example, make_subsets
from .loading import adapted, find_and_load_tokenizer, load_model, make_optimizer, merge
from .outcome import Outcome, compare, losses, make_measurement, measured_workload
from .recipe import Recipe, checked
from .trainer import make_trainer, steps_of
from .watch import Seen, Stop, last_checkpoint, make_callback

ON = ("auto", "cuda", "cpu", "null")
RESULT = "result.json"
CHECKPOINTS, ADAPTER, MODEL, MERGED, LOG = "checkpoints", "adapter", "model", "merged", "log.jsonl"
#: Samples of the test split that are answered at most.
MOST_ANSWERS = 500
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recipe is run: where, and what comes after the training."""

    on: str
    evaluate: bool = False
    merge: bool = False
    offline: bool = False
    store: Store | None = None


class _Run:
    """One attempt: what it loads, what it sees, and what it leaves in its folder."""

    def __init__(self, recipe: Recipe, folder: Path, options: Options, report: Report) -> None:
        self.recipe, self.folder, self.options, self.report = recipe, folder, options, report
        self.seen = Seen(cuda=options.on != "cpu", file=folder / LOG, computes=options.on != "null")
        self.counts: dict[str, int] = {}
        self.total_steps = 0
        self.steps = 0
        self.train_s: float | None = None
        self.scores: Scores | None = None
        self.saved: dict[str, Any] = {}

    def go(self) -> str:
        """Load, train, save, evaluate; return "ok" or "stopped"."""
        recipe, options = self.recipe, self.options
        tokenizer = find_and_load_tokenizer(recipe, on=options.on, offline=options.offline)
        samples = load_samples(recipe.data, config=recipe.workload.config, tokenizer=tokenizer, offline=options.offline)
        ratio = character_ratio(recipe.workload.config)
        examples = make_subsets(samples, recipe.data, tokenizer, ratio, recipe.workload.seq_len)
        _, self.total_steps = steps_of(recipe, len(examples[0]))
        self.report(f"{len(examples[0])} examples to train on, {self.total_steps} steps")
        model = self._load()
        stopped = self._train(model, tokenizer, examples)
        if stopped:
            return "stopped"
        if options.on != "null":  # nothing was computed there
            self._save(model, tokenizer)
        self.seen.cut("evaluate")
        if options.evaluate and tokenizer is None:
            self.report("no evaluation: there is no tokenizer")
        elif options.evaluate:
            self.scores = self._evaluate(model, tokenizer, samples)
            self.seen.cut("")
        return "ok"

    def _load(self) -> Any:
        import torch

        model = load_model(self.recipe, on=self.options.on, offline=self.options.offline)
        self._count("weights_bytes")
        torch.manual_seed(self.recipe.training.seed)
        model = adapted(model, self.recipe, total_steps=self.total_steps)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.counts["trainable_params"] = trainable
        self.report(f"{trainable:,} parameters to train")
        self._count("model_bytes")
        return model

    def _count(self, name: str) -> None:
        if self.seen.cuda:
            import torch

            self.counts[name] = torch.cuda.memory_allocated()

    def _train(self, model: Any, tokenizer: Any, examples: tuple[list[Example], list[Example]]) -> bool:
        """Train from the last checkpoint on; say whether it was asked to stop before its end."""
        recipe = self.recipe
        folder = self.folder / CHECKPOINTS
        resumed = last_checkpoint(folder)
        if resumed is not None:
            self.report(f"resuming from {resumed.name}")
        with Stop() as stop:
            watch = make_callback(self.seen, stop, adalora=recipe.workload.method == "adalora", report=self.report)
            trainer = make_trainer(
                recipe,
                model,
                make_optimizer(model, recipe),
                examples,
                folder=folder,
                on=self.options.on,
                pad_id=0 if tokenizer is None else tokenizer.pad_token_id,
                seen=self.seen,
                callback=watch,
            )
            began_s = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            self.train_s = time.perf_counter() - began_s
            self.steps = trainer.state.global_step
            evaluated = self.seen.eval_losses and self.seen.eval_losses[-1][0] == self.steps
            if examples[1] and not stop.asked and not evaluated:
                trainer.evaluate()
        return stop.asked and self.steps < self.total_steps

    def _save(self, model: Any, tokenizer: Any) -> None:
        name = MODEL if self.recipe.workload.method == "full" else ADAPTER
        model.save_pretrained(self.folder / name)
        tokenizer.save_pretrained(self.folder / name)
        self.saved["adapter"] = str(self.folder / name)
        self.report(f"saved {self.folder / name}")

    def _evaluate(self, model: Any, tokenizer: Any, samples: Any) -> Scores:
        subset = samples.test or samples.validation
        if not subset:
            todo = "Set dataset.test or dataset.test_share in the config."
            raise BadValue("there are no rows to evaluate on", todo=todo)
        self.report(
            f"answering {min(len(subset), MOST_ANSWERS)} rows of the {'test' if samples.test else 'validation'} split"
        )
        computes = self.options.on != "null"
        chosen = subset[:MOST_ANSWERS]
        return evaluate(model, tokenizer, chosen, seq_len=self.recipe.workload.seq_len, computes=computes)


def run(recipe: Recipe, folder: Path, options: Options, *, report: Report = lambda _: None) -> Outcome:
    """Fine-tune by a recipe; results, checkpoints and the log go to `folder`, and a measurement to the store.

    A run that was interrupted goes on from its last checkpoint; one that is done already is not done again. Running out
    of memory, failing and being asked to stop are outcomes too; what the user can mend raises WhichloraError.
    """
    if (done := _done(folder)) is not None and not options.evaluate and not options.merge:
        report(f"done already: {folder / RESULT}")
        return done
    recipe = checked(recipe, on=options.on, merge=options.merge)
    folder.mkdir(parents=True, exist_ok=True)
    process = _prepare(recipe, options)
    attempt = _Run(recipe, folder, options, report)
    outcome, error = "ok", ""
    import torch

    try:
        outcome = attempt.go()
    except torch.OutOfMemoryError as problem:
        outcome, error = "oom", str(problem)
    except (WhichloraError, KeyboardInterrupt):
        raise
    except Exception as problem:  # whatever a library raises is an outcome, and is kept
        outcome, error = "failed", f"{type(problem).__name__}: {problem}"[:2000]
        report(error)
    attempt.seen.cut("")
    attempt.counts |= _process_bytes(process, options.on)
    found = _summed_up(attempt, outcome, error)
    if done is not None and outcome == "ok" and not attempt.seen.steps:  # only what comes after the training is new
        found = dataclasses.replace(done, scores=found.scores or done.scores)
    _write(found, folder)
    if outcome == "ok" and options.merge:
        gc.collect()
        merge(recipe, folder / ADAPTER, folder / MERGED, offline=options.offline)
        found = dataclasses.replace(found, merged=str(folder / MERGED))
        _write(found, folder)
    return found


def _prepare(recipe: Recipe, options: Options) -> Any:
    """Settle, before any card is used, which one it is; on the null device, say what it answers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.on == "cpu":
        return None
    from whichlora.nulldevice import control

    from ..verify.nvml import ProcessBytes

    if control.is_null_device():
        control.reset()
        control.set_bool(recipe.data.packing)  # "are all of the mask ones?"
        _decompose_on_host()
    return ProcessBytes()


def _decompose_on_host() -> None:
    """Let the host decompose matrices (LoRA-FA's optimizer does): the null device has no cuSOLVER."""
    import torch

    from ..rehearse.inside import decompose_on_host

    decompose_on_host(torch.linalg)


def _process_bytes(process: Any, on: str) -> dict[str, int]:
    if on == "null":
        return {}
    if on == "cpu":
        from ..verify.recorders import resident_peak_bytes

        return {"process_bytes": resident_peak_bytes()}
    import torch

    found = process.read(str(torch.cuda.get_device_properties(0).uuid))
    return {} if found is None else {"process_bytes": found}


def _summed_up(attempt: _Run, outcome: str, error: str) -> Outcome:
    """Store a measurement, compare with the prediction, and return all of it."""
    recipe, seen, options = attempt.recipe, attempt.seen, attempt.options
    environment, gpu = _where(recipe, options.on)
    workload = measured_workload(recipe, seen)
    kept = None
    if options.store is not None and (seen.steps or outcome not in ("ok", "stopped")):
        kept = make_measurement(
            recipe,
            seen,
            on=options.on,
            outcome=outcome,
            error=error,
            environment=environment,
            counts={name: value for name, value in attempt.counts.items() if value},
        )
        options.store.add([kept])
    train = seen.peaks.get("train", (None, None))
    return Outcome(
        outcome=outcome,
        error=error,
        steps=attempt.steps,
        total_steps=attempt.total_steps,
        train_s=attempt.train_s if options.on != "null" else None,
        step_s=_median_s(seen) if options.on != "null" else None,
        **losses(seen, options.on),
        scores=attempt.scores,
        allocated_peak_bytes=train[0],
        reserved_peak_bytes=train[1],
        process_bytes=attempt.counts.get("process_bytes"),
        compared=compare(recipe, workload, seen, gpu) if outcome in ("ok", "stopped") else (),
        measurement=None if kept is None else kept.id,
        **attempt.saved,
    )


def _median_s(seen: Seen) -> float | None:
    return statistics.median(step.seconds for step in seen.steps) if seen.steps else None


def _where(recipe: Recipe, on: str) -> tuple[Environment, Gpu | None]:
    """Return the environment of a measurement made here, and the card that it was made on if our data knows it."""
    from whichlora_estimators.gpus import find_gpu

    from ..rehearse.stored import card_fields
    from ..verify.card import environment_here

    environment = environment_here("cpu" if on == "cpu" else "cuda")
    if on == "null":
        return dataclasses.replace(environment, driver_version=None, **card_fields(recipe.gpu)), recipe.gpu
    gpu = find_gpu(environment.gpu) if environment.gpu else None
    return environment, gpu


# --- the result ---


def _write(found: Outcome, folder: Path) -> None:
    write_whole({folder / RESULT: json.dumps(to_json(found), indent=1) + "\n"})


def _done(folder: Path) -> Outcome | None:
    """Return what a folder's run came to, if it came to its end."""
    from ..records import from_json

    with contextlib.suppress(OSError, ValueError, BadValue):
        fields = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        found = from_json(Outcome, fields, "")
        return found if found.outcome == "ok" else None
    return None


# --- another process ---


def null_environment(recipe: Recipe) -> dict[str, str]:
    """Return the environment of a process that finds the recipe's card on the null device."""
    from whichlora.nulldevice import environment

    from ..rehearse.pool import python_path

    padded = not recipe.data.packing
    variables = environment(recipe.gpu, context_bytes=context_bytes(recipe.gpu), bool_read=not padded)
    return {**os.environ, **variables, "PYTHONPATH": python_path(variables.get("PYTHONPATH", ""))}


def lines(found: Outcome) -> Iterator[str]:
    """Sum an outcome up for people."""
    from whichlora_estimators.units import format_bytes, format_seconds

    yield f"{found.outcome}: {found.steps} of {found.total_steps} steps" + (f" ({found.error})" if found.error else "")
    if found.train_s is not None and found.step_s is not None:
        yield f"trained for {format_seconds(found.train_s)}, a step took {format_seconds(found.step_s)} (median)"
    if found.first_loss is not None and found.last_loss is not None:
        yield f"loss: {found.first_loss:.4f} at first, {found.last_loss:.4f} at last"
    if found.eval_loss is not None and found.perplexity is not None:
        yield f"validation: loss {found.eval_loss:.4f}, perplexity {found.perplexity:.2f}"
    if found.scores is not None:
        yield from _score_lines(found.scores)
    for each in found.compared:
        low, high = format_bytes(each.predicted.low_bytes), format_bytes(each.predicted.high_bytes)
        above = each.seen_bytes > each.predicted.high_bytes
        verdict = "as predicted" if each.inside else f"{'ABOVE' if above else 'below'} the prediction"
        yield f"{each.counter} peak: {format_bytes(each.seen_bytes)}, {verdict} ({low} to {high})"
    if found.adapter:
        yield f"adapter: {found.adapter}"
    if found.merged:
        yield f"merged model: {found.merged}"
    if found.measurement:
        yield f"stored as measurement {found.measurement[:12]}"


def _score_lines(scores: Scores) -> Iterator[str]:
    shown = {
        "exact match": None if scores.exact_match is None else f"{scores.exact_match:.1%}",
        "Jaccard similarity": None if scores.jaccard is None else f"{scores.jaccard:.3f}",
        "perplexity": None if scores.perplexity is None else f"{scores.perplexity:.2f}",
        "generated": None if scores.tokens_per_s is None else f"{scores.tokens_per_s:.1f} tokens/s",
    }
    known = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    yield f"evaluation on {scores.samples} rows: {known or 'nothing was computed'}"
