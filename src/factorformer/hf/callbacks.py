"""What acts on a model while the Hugging Face `Trainer` trains it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from factorformer.training.straight_through import StraightThrough


class StraightThroughCallback(TrainerCallback):
    """Moves supports between the optimizer's steps, and leaves plain factors when training ends.

    Checkpoints hold the shadows: to resume, build the same objects and call `train(resume_from_checkpoint=...)`.

    Args:
        straight: made of the model before the `Trainer`, so that the optimizer sees its shadows.
    """

    def __init__(self, straight: StraightThrough) -> None:
        self.straight = straight

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint may just have been loaded."""
        self.straight.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Follow the optimizer, once for each of its steps, however many batches were accumulated."""
        self.straight.after_step(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the shadows."""
        self.straight.finish()
