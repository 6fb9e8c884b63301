"""Training from scratch: any model that learns from text, resumable, with reproducible batches and a learning curve."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ModelError
from factorformer.progress import Progress, silent
from factorformer.tasks.architectures import Task
from factorformer.tasks.checkpoints import check_same_run, last_checkpoint, locked
from factorformer.tasks.data import check_lengths
from factorformer.tasks.language_modelling import predict, training_collator, with_labels
from factorformer.tasks.reproducible import ReproducibleTrainer, finish
from factorformer.tasks.trainer import Settings, Watch, diverged, seeded


@dataclasses.dataclass(frozen=True)
class ScratchSettings(Settings):
    """How a model is trained from scratch, dense or factorized; see `Settings` for the rest.

    Args:
        steps: optimizer steps; if given, `epochs` does not count.
        label_smoothing: part of the probability that goes to all tokens alike (Szegedy et al. 2016).
        adam_beta2: decay of AdamW's second moment; 0.98 for Transformers from scratch (Vaswani et al. 2017).
        clip: largest norm of the gradient.
        points: of the learning curve; at each of them the validation loss is measured and a checkpoint written.
        use_cpu: leave a GPU alone.
    """

    epochs: float = 20.0
    steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 128
    label_smoothing: float = 0.1
    adam_beta2: float = 0.98
    clip: float = 1.0
    points: int = 20
    use_cpu: bool = False

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole training.

        >>> ScratchSettings(epochs=2, batch_size=100).total_steps(250)
        6
        """
        return self.steps or math.ceil(self.epochs * math.ceil(rows / self.batch_size))


class ScratchTrainer(ReproducibleTrainer):
    """A `Trainer` with validation loss per token; validation takes no time on its clock.

    Args:
        tokenizer: of the model.
        task: what the model learns.
    """

    def __init__(self, *args: Any, tokenizer: PreTrainedTokenizerBase, task: Task, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer = tokenizer
        self.task: Task = task

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validation loss, every token counting the same and without smoothing; the clock stands still meanwhile."""
        started = time.perf_counter()
        assert isinstance(self.model, PreTrainedModel)
        assert isinstance(self.eval_dataset, datasets.Dataset)
        try:
            found = predict(self.model, self.tokenizer, self.eval_dataset, self.task, self.args.eval_batch_size)
        except ModelError as error:
            raise diverged("the validation loss is not finite", self.args, self.state) from error
        self.clock.started += time.perf_counter() - started
        return self.measured({f"{metric_key_prefix}_loss": found["loss"]})


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    validation: datasets.Dataset,
    task: Task,
    settings: ScratchSettings,
    output: Path,
    progress: Progress = silent,
    phase: str = "train",
) -> list[dict[str, float]]:
    """Train a model in place: AdamW, linear schedule with warm-up, label smoothing.

    A run that was interrupted goes on from the last checkpoint in `output`, which it ends as if it had never stopped.

    Args:
        model: fresh, dense or factorized.
        tokenizer: of the model, for padding and hiding.
        data: rows to learn, from the `encode` of the task.
        validation: rows whose loss is measured; nothing else is done with them.
        task: what is learned.
        settings: see `ScratchSettings`; label smoothing of language models is usually 0.
        output: directory of checkpoints, ordinary model directories with the state of the optimizer beside.
        progress: progress callback, called with the steps done.
        phase: name of the phase reported to `progress`.

    Returns:
        The learning curve, one row for each point: `step`, `epoch`, `loss` (mean since the last row, smoothed),
        `validation_loss` (nats per token, not smoothed), `learning_rate`, `seconds` of training so far.

    Raises:
        DataError: texts longer than the model can read.
        DivergedError: the loss became NaN or infinite.
        ModelError: a model that does not learn this task, or has no token to start a translation with.
        OutputError: `output` holds checkpoints of a run with other settings, or another process trains into it.
    """
    if model.config.is_encoder_decoder != (task == "translation"):
        reads = "pairs of texts" if model.config.is_encoder_decoder else "single texts"
        raise ModelError(f"{type(model).__name__} learns from {reads}: it cannot be trained for the task '{task}'")
    if task == "translation" and getattr(model.config, "decoder_start_token_id", None) is None:
        raise ModelError("the model's configuration has no decoder_start_token_id to start a translation with")
    check_lengths(model, data, "the training data")
    check_lengths(model, validation, "the validation data")
    steps = settings.total_steps(len(data))
    every = math.ceil(steps / settings.points)
    description = {**dataclasses.asdict(settings), "rows": len(data), "parameters": model.num_parameters()}
    with locked(output / ".lock"), seeded(settings.seed):
        check_same_run(output, description)
        trainer = ScratchTrainer(
            model=model,
            args=settings.arguments(
                output,
                on_cpu=settings.use_cpu or not torch.accelerator.is_available(),  # or else bf16 is refused
                max_steps=steps,
                label_smoothing_factor=settings.label_smoothing,
                adam_beta2=settings.adam_beta2,
                max_grad_norm=settings.clip,
                logging_steps=every,
                eval_strategy="steps",
                eval_steps=every,
                save_steps=every,
                save_total_limit=2,
            ),
            train_dataset=data if task == "masked" else with_labels(data, tokenizer, task),
            eval_dataset=with_labels(validation, tokenizer, task),
            data_collator=training_collator(tokenizer, model, task),
            callbacks=[Watch(progress, phase)],
            tokenizer=tokenizer,
            task=task,
        )
        history = finish(trainer, last_checkpoint(output), steps)
    model.eval()
    return _curve(history)


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    names = {"eval_loss": "validation_loss"}
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "seconds")
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        if "train_runtime" not in entry:
            row = rows.setdefault(entry["step"], {})
            row |= {names.get(key, key): entry[key] for key in kept if key in entry}
    return list(rows.values())
