"""Callbacks of the Hugging Face `Trainer`: straight-through training and dynamic ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from factorformer.errors import ModelError
from factorformer.hf.attachment import attach_all
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.straight_through import StraightThrough


class StraightThroughCallback(TrainerCallback):
    """Updates supports between the optimizer's steps, and leaves plain factors when training ends.

    Checkpoints hold the shadows: to resume, build the same objects and call `train(resume_from_checkpoint=...)`.

    Args:
        straight: made of the model before the `Trainer`, so that the optimizer sees its shadows.

    Raises:
        ModelError: when training begins, where parameters would be sharded.
    """

    def __init__(self, straight: StraightThrough) -> None:
        self.straight = straight

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would hold shadows in parts; and a checkpoint may just have been loaded."""
        _check_whole(args, "straight-through projections")
        self.straight.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Follow the optimizer, once for each of its steps, however many batches were accumulated."""
        self.straight.after_step(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the shadows."""
        self.straight.finish()


class DynamicRankCallback(TrainerCallback):
    """Moves ranks between matrices while the `Trainer` trains, and leaves a compressed model that saves as one.

    Checkpoints hold what is needed to resume: build the same dense model, `DynamicRank(model, plan,
    resume_from=checkpoint)`, this callback and the `Trainer`, and call `train(resume_from_checkpoint=checkpoint)`.

    Args:
        ranks: made of the model before the `Trainer`.

    Raises:
        ModelError: when training begins, for options of the `Trainer` under which ranks cannot change.
    """

    def __init__(self, ranks: DynamicRank) -> None:
        self.ranks = ranks
        told = ranks.changed

        def changed(model: nn.Module) -> None:
            attach_all(model)
            if told is not None:
                told(model)

        ranks.changed = changed
        ranks.tell()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would load larger tensors into a smaller model, or hide parameters."""
        if args.load_best_model_at_end:
            raise ModelError("load_best_model_at_end would load tensors of other ranks: set it to False")
        _check_whole(args, "dynamic ranks")
        if state.global_step != self.ranks.done:
            raise ModelError(
                f"the Trainer begins after step {state.global_step}, the dynamic ranks after step {self.ranks.done}: "
                "to resume, give the same checkpoint to DynamicRank(resume_from=) and train(resume_from_checkpoint=)"
            )
        self.ranks.align()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update importance from the gradients of the step, however many batches were accumulated."""
        self.ranks.before_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shrink the model and the optimizer's state."""
        self.ranks.after_step(state.global_step, state.max_steps, kwargs["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what is needed to resume into the checkpoint."""
        if state.is_world_process_zero:
            self.ranks.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the budget, if training was too short for it, and let go of the model."""
        self.ranks.finish(kwargs.get("optimizer"))


def _check_whole(args: TrainingArguments, training: str) -> None:
    """Raise `ModelError` where the `Trainer` would hold parameters in parts."""
    if args.fsdp or args.deepspeed:
        raise ModelError(f"{training} need whole parameters in every process: train without FSDP and DeepSpeed")


def moving(straight: StraightThrough | None, ranks: DynamicRank | None) -> list[TrainerCallback]:
    """The callbacks of those of the two that there are."""
    callbacks: list[TrainerCallback] = []
    if straight is not None:
        callbacks.append(StraightThroughCallback(straight))
    if ranks is not None:
        callbacks.append(DynamicRankCallback(ranks))
    return callbacks
