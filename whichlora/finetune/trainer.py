"""Transformers' Trainer, set up for a recipe."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

from .examples import Collator, Example, LongestFirst
from .recipe import Recipe
from .watch import ADALORA_FILE, Seen, restore_ranks

#: Checkpoints, evaluations and lines of the log in an epoch, where the config does not say how often.
SAVES_AN_EPOCH = 10
EVALUATIONS_AN_EPOCH = 4
LINES = 50


def steps_of(recipe: Recipe, examples: int) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the whole training."""
    micro = ceil(examples / recipe.micro_batch_size)
    epoch = ceil(micro / recipe.workload.accumulation)
    total = epoch * recipe.epochs
    return epoch, min(total, recipe.training.max_steps or total)


def make_trainer(
    recipe: Recipe,
    model: Any,
    optimizer: Any,
    examples: tuple[list[Example], list[Example]],
    *,
    folder: Path,
    on: str,
    pad_id: int,
    seen: Seen,
    callback: Any,
) -> Any:
    """Return a Trainer that runs this recipe and resumes exactly; examples are those to train and to validate on."""
    import transformers

    train, validation = examples
    adalora = recipe.workload.method == "adalora"

    class Tuner(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            lengths = [len(each["input_ids"]) for each in train]
            grouped = recipe.data.group_by_length
            return LongestFirst(lengths, first=recipe.micro_batch_size, seed=recipe.training.seed, grouped=grouped)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.shapes.append(tuple(inputs["input_ids"].shape))
            return super().training_step(model, inputs, *args, **kwargs)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if adalora and (Path(resume_from_checkpoint) / ADALORA_FILE).exists():
                restore_ranks(self.model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    trainer = Tuner(
        model=model,
        args=_arguments(recipe, len(train), bool(validation), folder=folder, on=on),
        train_dataset=train,
        eval_dataset=validation or None,
        data_collator=Collator(pad_id=pad_id, seq_len=recipe.workload.seq_len),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it would write into what we say on stdout
    return trainer


def _arguments(recipe: Recipe, examples: int, evaluates: bool, *, folder: Path, on: str) -> Any:
    import transformers

    training, precision = recipe.training, recipe.workload.precision
    epoch, total = steps_of(recipe, examples)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.workload.accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate_for(recipe.workload.method),
        lr_scheduler_type=training.scheduler,
        warmup_steps=int(training.warmup_share * total),
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_grad_norm or 0.0,
        bf16=precision == "bf16-mixed",
        fp16=precision == "fp16-mixed",
        use_cpu=on == "cpu",
        seed=training.seed,
        logging_steps=max(1, total // LINES),
        save_strategy="steps",
        save_steps=training.save_steps or max(1, ceil(epoch / SAVES_AN_EPOCH)),
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval_steps or max(1, ceil(epoch / EVALUATIONS_AN_EPOCH)),
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on != "cpu",
        report_to="none",
        disable_tqdm=True,
    )
