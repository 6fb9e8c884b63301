"""Training from scratch: any model and collator, resumable, with reproducible batches and a learning curve."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from factorformer.errors import DivergedError, MethodError
from factorformer.layers.modes import evaluating
from factorformer.progress import Progress, silent
from factorformer.tasks.checkpoints import check_same_run, last_checkpoint, locked
from factorformer.tasks.data import IGNORED
from factorformer.tasks.trainer import own_forward, seeded

_POOL = 50
"""Batches among which rows are sorted by length."""


@dataclasses.dataclass(frozen=True)
class ScratchSettings:
    """How a model is trained from scratch; the same for dense and factorized models.

    Args:
        epochs: passes over the training rows.
        steps: optimizer steps; if given, `epochs` does not count.
        learning_rate: peak of a linear schedule with warm-up.
        batch_size: rows in a step, of similar length.
        label_smoothing: part of the probability that goes to all tokens alike (Szegedy et al. 2016).
        warmup: fraction of all steps, from 0 to 1, in which the learning rate rises.
        weight_decay: of AdamW, on matrices and factors.
        adam_beta2: decay of AdamW's second moment; 0.98 for Transformers from scratch (Vaswani et al. 2017).
        clip: largest norm of the gradient.
        points: of the learning curve; at each of them the validation loss is measured and a checkpoint written.
        precision: in which matrices are multiplied; parameters and optimizer are fp32 in any case. fp16 needs a GPU.
        seed: of order and dropout.
        use_cpu: leave a GPU alone.

    Raises:
        MethodError: a number that is not finite or out of its range.
    """

    epochs: float = 20.0
    steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 128
    label_smoothing: float = 0.1
    warmup: float = 0.1
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    clip: float = 1.0
    points: int = 20
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    use_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "adam_beta2", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise MethodError(f"{name} is {getattr(self, name)}, and has to be a finite number above 0")
        for name in ("steps", "batch_size", "points"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise MethodError(f"{name} is {getattr(self, name)}, and has to be 1 or more")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise MethodError(f"{name} is {getattr(self, name)}, and has to be a fraction from 0 to 1")

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole training.

        >>> ScratchSettings(epochs=2, batch_size=100).total_steps(250)
        6
        """
        return self.steps or math.ceil(self.epochs * math.ceil(rows / self.batch_size))


class LengthGroupedSampler(Sampler[int]):
    """An order of rows that puts texts of similar length in a batch: a function of seed and epoch alone.

    The Trainer's own `group_by_length` draws from torch's global generator, whose state at the start of an epoch is in
    no checkpoint: an epoch resumed halfway would go on with other batches. Here it goes on as the interrupted one would
    have, and models with other dropout see the same batches. Batches are shuffled too: their lengths do not run from
    long to short.

    Args:
        lengths: of the rows.
        batch_size: rows in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the `Trainer` before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        pools = [order[i : i + _POOL * self.batch_size] for i in range(0, len(order), _POOL * self.batch_size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        full = len(order) // self.batch_size * self.batch_size
        batches = random.permutation(order[:full].reshape(-1, self.batch_size))
        yield from batches.ravel().tolist()
        yield from order[full:].tolist()


class ScratchTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` with reproducible batches, loss per token, and the seconds of training in its log."""

    def __init__(self, *args: Any, label_smoothing: float, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._smoothed_loss, **kwargs)
        self.label_smoothing = label_smoothing
        self.clock = _Clock()
        self.add_callback(self.clock)

    def _smoothed_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total = F.cross_entropy(
            outputs["logits"].flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # Not of the argument, which has lost the column that `forward` does not take.
        assert isinstance(self.train_dataset, datasets.Dataset)
        return LengthGroupedSampler(self.train_dataset["length"], self.args.train_batch_size, self.args.seed)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validation loss, every token counting the same and without smoothing; the clock stands still meanwhile."""
        started = time.perf_counter()
        assert isinstance(self.model, PreTrainedModel)
        assert isinstance(self.eval_dataset, datasets.Dataset)
        loss = token_loss(self.model, self.data_collator, self.eval_dataset, self.args.eval_batch_size)
        self.clock.started += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the `Trainer` does, with `seconds` since the first step, those of interrupted runs included."""
        super().log({**logs, "seconds": self.clock.seconds()}, start_time)


class _Clock(TrainerCallback):
    """Seconds of training; a resumed run goes on where the log of its checkpoint ends."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter() - max((row["seconds"] for row in state.log_history), default=0.0)

    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 2)


class _Watch(TrainerCallback):
    """Reports progress, and stops a run whose loss is not finite."""

    def __init__(self, progress: Progress, phase: str) -> None:
        self.progress, self.phase = progress, phase

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.phase, state.global_step, state.max_steps)
        if state.global_step == state.max_steps:  # where the Trainer evaluates in any case
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged by step {state.global_step} (loss {loss}): lower the learning rate "
                f"{args.learning_rate:g}"
            )


def optimize(
    model: PreTrainedModel,
    collate: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    settings: ScratchSettings,
    output: Path,
    progress: Progress = silent,
    phase: str = "train",
    *,
    keep_columns: bool = False,
) -> list[dict[str, float]]:
    """Train a model in place: AdamW, linear schedule with warm-up, label smoothing.

    A run that was interrupted goes on from the last checkpoint in `output`, which it ends as if it had never stopped.

    Args:
        model: fresh, dense or factorized.
        collate: rows to a batch, with `labels` where the model predicts them and -100 where it does not.
        train: rows with a `length`, by which batches are grouped.
        validation: rows whose loss is measured; nothing else is done with them.
        settings: see `ScratchSettings`.
        output: directory of checkpoints, ordinary model directories with the state of the optimizer beside.
        progress: progress callback, called with the steps done.
        phase: name of the phase reported to `progress`.
        keep_columns: whether the collator sees columns that the model's `forward` does not name.

    Returns:
        The learning curve, one row for each point: `step`, `epoch`, `loss` (mean since the last row, smoothed),
        `validation_loss` (nats per token, not smoothed), `learning_rate`, `seconds` of training so far.

    Raises:
        DivergedError: the loss became NaN or infinite.
        OutputError: `output` holds checkpoints of a run with other settings, or another process trains into it.
    """
    steps = settings.total_steps(len(train))
    run = {**dataclasses.asdict(settings), "rows": len(train), "parameters": model.num_parameters()}
    with locked(output / ".lock"), seeded(settings.seed):
        check_same_run(output, run)
        trainer = ScratchTrainer(
            model=model,
            args=_arguments(settings, steps, output, keep_columns),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate,
            callbacks=[_Watch(progress, phase)],
            label_smoothing=settings.label_smoothing,
        )
        trainer.remove_callback(PrinterCallback)
        history = _finish(trainer, last_checkpoint(output), steps)
    model.eval()
    return _curve(history)


def _arguments(settings: ScratchSettings, steps: int, output: Path, keep_columns: bool) -> Seq2SeqTrainingArguments:
    """The settings in the Trainer's terms; a checkpoint is written at every point of the curve."""
    every = math.ceil(steps / settings.points)
    return Seq2SeqTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        warmup_steps=math.ceil(steps * settings.warmup),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=settings.use_cpu or not torch.accelerator.is_available(),  # or else bf16 is refused
        logging_strategy="steps",
        logging_steps=every,
        logging_nan_inf_filter=False,  # which would report a finite loss for a run that diverged
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        remove_unused_columns=not keep_columns,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and not settings.use_cpu,
    )


def _finish(trainer: ScratchTrainer, checkpoint: Path | None, steps: int) -> list[dict[str, Any]]:
    """Train from the start or from a checkpoint to the last step; the log of the whole run."""
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= steps:  # the Trainer would make one step more
            trainer._load_from_checkpoint(str(checkpoint))
            return state["log_history"]
    assert isinstance(trainer.model, PreTrainedModel)
    with own_forward(trainer.model):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.state.log_history


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    names = {"eval_loss": "validation_loss"}
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "seconds")
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        if "train_runtime" not in entry:
            row = rows.setdefault(entry["step"], {})
            row |= {names.get(key, key): entry[key] for key in kept if key in entry}
    return list(rows.values())


def token_loss(model: PreTrainedModel, collate: Any, data: datasets.Dataset, batch_size: int = 128) -> float:
    """Mean negative log-likelihood per predicted token, in nats; its exponential is the perplexity.

    Args:
        model: dense or factorized.
        collate: makes a padded batch of rows, with padding labelled -100 (`DataCollatorForSeq2Seq`).
        data: encoded rows with their `length`.
        batch_size: rows in a forward pass.
    """
    order = np.argsort(data["length"], kind="stable")
    rows = data.remove_columns("length")
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([rows[int(row)] for row in order[start : start + batch_size]])
            labels = batch.pop("labels").to(model.device)
            logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits.float()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            tokens += int((labels != IGNORED).sum())
    return total / tokens
