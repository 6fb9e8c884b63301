"""The `Trainer` of healing: rows are numbered, what an original makes of them is remembered, time may end it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from factorformer.errors import DataError
from factorformer.hf.compat import use_one_gpu
from factorformer.progress import Progress
from factorformer.tasks.data import AT_ONCE, check_lengths, collator
from factorformer.tasks.reproducible import ReproducibleTrainer
from factorformer.tasks.targets import Target
from factorformer.tasks.trainer import Settings

ROW = "row"
"""The column of the number of a row, by which what the original made of it is remembered."""

WARMING = 20
"""Steps in which the learning rate rises at least, but for trainings of few: the first ones of Adam are as long
whatever gradients say."""

REMEMBERED = 2**32
"""Bytes of the original's outputs that are remembered; for further rows it is asked each time."""


@dataclasses.dataclass(frozen=True)
class HealingSettings(Settings):
    """How a compressed model is healed; see `Settings` for the rest.

    Args:
        learning_rate: peak of a linear schedule with warm-up; None sets it by how far the model is from the original
            before training, and how wide and deep it is.
        minutes: of training, what is measured and saved on the way included; if given, `epochs` does not count, and
            the learning rate falls with time.
        points: at which held-out rows are compared and a checkpoint is written.
        freeze_embeddings: leave dense tables of word embeddings as they are; factorized ones are trained in any case.
        factors_only: leave all that is dense as it is, norms and biases included.
        checkpointing: compute layers again in the backward pass instead of keeping what is inside them.
    """

    chooses_rate: ClassVar[bool] = True
    learning_rate: float | None = None
    batch_size: int = 128
    warmup: float = 0.03
    minutes: float | None = None
    points: int = 10
    freeze_embeddings: bool = True
    factors_only: bool = False
    checkpointing: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """The same rows as the teacher reads them, whose vocabulary is another.

    Args:
        tokenizer: of the teacher.
        data: to learn on, in the same order.
        held: to compare on, likewise.
    """

    tokenizer: PreTrainedTokenizerBase
    data: datasets.Dataset
    held: datasets.Dataset

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Some rows of the data."""
        names = [name for name in self.data.column_names if name != "length"]
        chosen = self.data.select_columns(names)
        return dict(collator(self.tokenizer, chosen)([chosen[row] for row in rows.tolist()]))

    def check(self, teacher: PreTrainedModel, data: datasets.Dataset, held: datasets.Dataset) -> None:
        """Raise `DataError` where these are not the rows of the model, or not such as the teacher can read."""
        if (len(self.data), len(self.held)) != (len(data), len(held)):
            raise DataError("the teacher reads other rows than the model: give `reading` and `held` of the same ones")
        check_lengths(teacher, self.data, "what the teacher reads")
        check_lengths(teacher, self.held, "what the teacher reads")


class HealingTrainer(ReproducibleTrainer):
    """A `Trainer` whose model is to do with rows as a teacher does.

    What the teacher makes of a row is remembered: in a second epoch it is not asked again.

    Args:
        teacher: kept in evaluation mode; it reads the same inputs. None where the text itself is what is learned.
        target: which outputs are compared, and how.
        settings: of the training.
        rows: of the training data, numbered in the column `ROW`.
        measure: the metrics of the model as it is, after so many steps and seconds.
        reading: what the teacher reads, if that is not what the model does.
        one_call: whether the teacher's layers run in one call, which makes products in its own way.
        recompute: called before each pass, after the model is in evaluation mode.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        target: Target,
        settings: HealingSettings,
        rows: int,
        measure: Callable[[int, float], dict[str, float]],
        reading: Reading | None,
        one_call: bool,
        recompute: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.follow(teacher)
        self.target, self.settings, self.measure, self.reading = target, settings, measure, reading
        self.one_call, self.recompute = one_call, recompute
        self.share = 1.0
        """What part of a batch goes forward and back at a time."""
        self.remembered: Tensor | None = None
        self.known = torch.zeros(rows, dtype=torch.bool)
        use_one_gpu(self.args)  # several would each need their part of what is remembered

    @property
    def part(self) -> float:
        """How much of the training is over, 0 to 1."""
        if self.settings.minutes is not None:
            return min(self.clock.seconds / (60 * self.settings.minutes), 1.0)
        return self.state.global_step / max(self.state.max_steps, 1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A batch, in parts where its texts are long, whose gradients add up to the same."""
        rows, ids = len(inputs[ROW]), inputs.get("input_ids")
        most = rows if ids is None or not self.target.remembers else max(AT_ONCE // ids.shape[1], 1)
        total = torch.zeros((), device=self.args.device)
        try:
            for first in range(0, rows, most):
                part = {name: value[first : first + most] for name, value in inputs.items()}
                self.share = len(part[ROW]) / rows
                total += super().training_step(model, part, *args, **kwargs)
        finally:
            self.share = 1.0
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """How far what the model makes of a batch is from what the teacher does."""
        model.eval()  # no dropout: outputs are compared as users get them
        self.recompute()
        student = self.accelerator.unwrap_model(model)
        assert isinstance(student, PreTrainedModel)
        known = dict(inputs)
        rows = known.pop(ROW).cpu()
        with self._products():
            found = self.target.read(student, known)
        loss = self.target.loss(found, self._wanted(rows, known), known) * self.share
        return (loss, {"outputs": found}) if return_outputs else loss

    def _products(self) -> contextlib.AbstractContextManager[object]:
        """The precision that the Trainer asks for is that of the whole model's forward pass, and not met by a part."""
        precision = self.settings.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.args.device.type, dtype, enabled=precision != "fp32")

    def _wanted(self, rows: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        if self.teacher is None:
            return None
        if self.remembered is not None and bool(self.known[rows].all()):
            return self.remembered[rows].to(self.args.device)
        if self.reading is not None:
            inputs = {name: value.to(self.args.device) for name, value in self.reading.batch(rows).items()}
        called = self.one_call and self.teacher.device.type == "cpu"
        with torch.no_grad(), contextlib.nullcontext() if called else self._products():
            made = self.target.read_teacher(self.teacher, inputs)
        if not self.target.remembers:
            return made
        if self.remembered is None:
            most = REMEMBERED // (made.element_size() * made.shape[1])
            self.remembered = torch.empty(min(len(self.known), most), made.shape[1], dtype=made.dtype)
        kept = rows < len(self.remembered)
        self.remembered[rows[kept]], self.known[rows[kept]] = made.cpu()[kept], True
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear, with warm-up, by what part of the training is over."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert isinstance(optimizer, torch.optim.Optimizer)
            warmup = max(self.settings.warmup, 1e-6)
            few = num_training_steps // 4 if self.settings.minutes is None else WARMING
            warming = max(min(WARMING, few), 1)

            def rate(step: int) -> float:
                part = self.part
                return max(min((part + warmup / 100) / warmup, (1 - part) / (1 - warmup), (step + 1) / warming), 0.0)

            self.lr_scheduler = LambdaLR(optimizer, rate)
        assert isinstance(self.lr_scheduler, LambdaLR)
        return self.lr_scheduler

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Compare what is made of held-out rows with what the teacher makes of them."""
        metrics = self.measure(self.state.global_step, self.clock.seconds)
        return self.measured({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})


class Points(TrainerCallback):
    """Measures, and saves if asked to, at regular parts of a training, and ends it when its time is over."""

    def __init__(self, trainer: HealingTrainer, progress: Progress, phase: str, *, saves: bool) -> None:
        self.trainer, self.progress, self.phase, self.saves = trainer, progress, phase, saves
        self.done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin behind the points that an interrupted run has passed."""
        self.done = math.floor(self.trainer.part * self.trainer.settings.points)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if a point is reached."""
        part, minutes = self.trainer.part, self.trainer.settings.minutes
        if minutes is not None:
            self.progress(self.phase, min(int(self.trainer.clock.seconds), int(60 * minutes)), int(60 * minutes))
            state.max_steps = math.ceil(state.global_step / part) + 1  # by which ranks move
        if part >= 1:
            control.should_training_stop = True
        if math.floor(part * self.trainer.settings.points) > self.done:
            self.done = math.floor(part * self.trainer.settings.points)
            control.should_log = control.should_evaluate = True
            control.should_save = self.saves
