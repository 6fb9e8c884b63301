"""Healing: a compressed sentence encoder learns from plain text alone to embed as the original does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from factorformer.hf.callbacks import moving
from factorformer.layers.modes import requiring_gradients
from factorformer.progress import Progress, silent
from factorformer.tasks.checkpoints import FILES, check_same_run, last_checkpoint, locked
from factorformer.tasks.data import check_lengths, collator
from factorformer.tasks.evaluation import Pool, compare_embeddings, embed
from factorformer.tasks.reproducible import ReproducibleTrainer, finish
from factorformer.tasks.trainer import Settings, Watch, frozen_embeddings, seeded
from factorformer.training.distillation import pooled_loss
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.rank_checkpoint import STATE
from factorformer.training.straight_through import StraightThrough

ROW = "row"
"""The column of the number of a row, by which the embedding of the original is remembered."""

ENDLESS = 10**9
"""Steps of a training that time ends."""

REMEMBERED = 2**32
"""Bytes of embeddings of the original that are remembered; of further texts it is asked each time."""


@dataclasses.dataclass(frozen=True)
class HealingSettings(Settings):
    """How a compressed encoder is healed; see `Settings` for the rest.

    Args:
        minutes: of training, what is measured and saved on the way included; if given, `epochs` does not count, and
            the learning rate falls with time.
        points: at which embeddings of held-out texts are compared and a checkpoint is written.
        freeze_embeddings: leave dense word embeddings as they are; factorized ones are trained in any case.
    """

    learning_rate: float = 5e-4
    batch_size: int = 128
    warmup: float = 0.03
    minutes: float | None = None
    points: int = 10
    freeze_embeddings: bool = True


class HealingTrainer(ReproducibleTrainer):
    """A `Trainer` whose model is to embed rows as a teacher does.

    Embeddings of the teacher are remembered: in a second epoch it is not asked again.

    Args:
        teacher: kept in evaluation mode; it reads the same inputs.
        pool: what users of the model make of its hidden states.
        teacher_pool: the same of the teacher.
        settings: of the training.
        rows: of the training data, numbered in the column `ROW`.
        measure: the metrics of the model as it is.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        pool: Pool,
        teacher_pool: Pool,
        settings: HealingSettings,
        rows: int,
        measure: Callable[[], dict[str, float]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.follow(teacher)
        self.pool, self.teacher_pool, self.settings, self.measure = pool, teacher_pool, settings, measure
        self.targets: Tensor | None = None
        self.known = torch.zeros(rows, dtype=torch.bool)
        self.args._n_gpu = 1  # several would each need the teacher's part of what is remembered

    @property
    def part(self) -> float:
        """How much of the training is over, 0 to 1."""
        if self.settings.minutes is not None:
            return min(self.clock.seconds / (60 * self.settings.minutes), 1.0)
        return self.state.global_step / max(self.state.max_steps, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """How far the embeddings of a batch are from the teacher's."""
        model.eval()  # no dropout: embeddings are compared as users get them
        encoder = self.accelerator.unwrap_model(model)
        assert isinstance(encoder, PreTrainedModel)
        known = dict(inputs)
        rows, mask = known.pop(ROW).cpu(), known["attention_mask"].bool()
        outputs, student = self._embed(encoder, self.pool, known, mask)
        target = self._target(rows, known, mask)
        loss = pooled_loss(student, target)
        return (loss, outputs) if return_outputs else loss

    def _embed(
        self, encoder: PreTrainedModel, pool: Pool, inputs: Mapping[str, Any], mask: Tensor
    ) -> tuple[Any, Tensor]:
        """What the model returns, a head left out, and pooled embeddings."""
        # The precision that the Trainer asks for is that of the whole model's forward pass, and would not be met here.
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            outputs = encoder.base_model(**inputs)
        return outputs, pool(outputs.last_hidden_state.float(), mask)

    def _target(self, rows: Tensor, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        if self.targets is not None and bool(self.known[rows].all()):
            return self.targets[rows].to(mask.device).float()
        with torch.no_grad():
            _, made = self._embed(self.teacher, self.teacher_pool, inputs, mask)
        made = nn.functional.normalize(made, dim=1)
        if self.targets is None:
            most = REMEMBERED // (2 * made.shape[1])
            self.targets = torch.empty(min(len(self.known), most), made.shape[1], dtype=torch.float16)
        kept = rows < len(self.targets)
        self.targets[rows[kept]], self.known[rows[kept]] = made.cpu().half()[kept], True
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear, with warm-up, by what part of the training is over."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert isinstance(optimizer, torch.optim.Optimizer)
            warmup = max(self.settings.warmup, 1e-6)

            def rate(step: int) -> float:
                part = self.part
                return max(min((part + warmup / 100) / warmup, (1 - part) / (1 - warmup)), 0.0)

            self.lr_scheduler = LambdaLR(optimizer, rate)
        assert isinstance(self.lr_scheduler, LambdaLR)
        return self.lr_scheduler

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Compare embeddings of held-out texts with the teacher's."""
        return self.measured({f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()})


class _Points(TrainerCallback):
    """Measures and saves at regular parts of a training, and ends it when its time is over."""

    def __init__(self, trainer: HealingTrainer, progress: Progress, phase: str) -> None:
        self.trainer, self.progress, self.phase = trainer, progress, phase
        self.done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = math.floor(self.trainer.part * self.trainer.settings.points)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        part, minutes = self.trainer.part, self.trainer.settings.minutes
        if minutes is not None:
            self.progress(self.phase, min(int(self.trainer.clock.seconds), int(60 * minutes)), int(60 * minutes))
            state.max_steps = math.ceil(state.global_step / part) + 1  # by which ranks move
        if part >= 1:
            control.should_training_stop = True
        if math.floor(part * self.trainer.settings.points) > self.done:
            self.done = math.floor(part * self.trainer.settings.points)
            control.should_log = control.should_evaluate = control.should_save = True


def heal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    held: datasets.Dataset,
    settings: HealingSettings,
    output: Path,
    *,
    teacher: PreTrainedModel,
    pool: Pool,
    teacher_pool: Pool | None = None,
    straight: StraightThrough | None = None,
    ranks: DynamicRank | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
    phase: str = "train",
) -> list[dict[str, float]]:
    """Train a compressed encoder in place to embed texts as another does: no labels, nothing but the embeddings.

    The loss is one minus the cosine of the two embeddings of a text. A run that was interrupted goes on from the last
    checkpoint in `output`.

    Args:
        model: compressed; integers are held as floats that the forward pass rounds.
        tokenizer: of the model, for padding.
        data: texts to learn, from `data.encode`, without labels.
        held: texts whose embeddings are compared on the way; nothing else is done with them.
        settings: see `HealingSettings`.
        output: directory of checkpoints.
        teacher: the original.
        pool: what users of the model make of its hidden states.
        teacher_pool: the same of the teacher, if that is another.
        straight: made of the model, if it trains straight through; finished at the end.
        ranks: made of the model, if its ranks are found in training; finished at the end.
        report: told in one line how similar embeddings are, at each point.
        progress: progress callback, in steps, or in seconds where time ends the training.
        phase: name of the phase reported to `progress`.

    Returns:
        The curve, one row for each point: `step`, `seconds`, `embedding_cosine`, `similarity_spearman`,
        `neighbour_recall`.

    Raises:
        DataError: texts longer than the model can read.
        DivergedError: the loss became NaN or infinite.
        OutputError: `output` holds checkpoints of a run with other settings, or another process trains into it.
    """
    check_lengths(model, data, "the training data")
    check_lengths(model, held, "the held-out texts")
    teacher_pool = teacher_pool or pool
    wanted = embed(teacher, tokenizer, held, pool=teacher_pool)

    def measure() -> dict[str, float]:
        found = compare_embeddings(wanted, embed(model, tokenizer, held, pool=pool))
        values = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        report(f"{phase}: after {trainer.clock.seconds / 60:.1f} minutes {values}")
        return found

    an_epoch = math.ceil(len(data) / settings.batch_size)
    steps = ENDLESS if settings.minutes is not None else math.ceil(settings.epochs * an_epoch)
    numbered = data.add_column(ROW, list(range(len(data))))
    description = {**dataclasses.asdict(settings), "rows": len(data)}
    del description["precision"]  # which the processor decides, and another may go on
    if ranks is None:
        description["parameters"] = model.num_parameters()
    else:
        description[FILES] = [STATE]
    acting: list[TrainerCallback] = [Watch(silent if settings.minutes is not None else progress, phase)]
    acting += moving(straight, ranks)
    frozen = settings.freeze_embeddings and (ranks is None or not ranks.holds(model.get_input_embeddings()))
    with (
        locked(output / ".lock"),
        seeded(settings.seed),
        frozen_embeddings(model, frozen),
        requiring_gradients(teacher.parameters(), False),
    ):
        check_same_run(output, description)
        trainer = HealingTrainer(
            model=model,
            args=settings.arguments(
                output,
                on_cpu=model.device.type == "cpu",
                max_steps=steps,
                max_grad_norm=1.0,
                remove_unused_columns=False,
                logging_strategy="no",
                eval_strategy="no",
                save_strategy="no",
                save_total_limit=2,
            ),
            train_dataset=numbered,
            data_collator=collator(tokenizer, data, settings.multiple(model, data)),
            callbacks=acting,
            teacher=teacher,
            pool=pool,
            teacher_pool=teacher_pool,
            settings=settings,
            rows=len(data),
            measure=measure,
        )
        trainer.add_callback(_Points(trainer, progress, phase))
        try:
            history = finish(trainer, last_checkpoint(output), steps)
        finally:
            if straight is not None:
                straight.finish()
            if ranks is not None:
                ranks.detach()
    model.eval()
    return _curve(history)


def _curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    rows = []
    for entry in history:
        values = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        if values:
            rows.append({"step": entry["step"], "seconds": entry["seconds"], **values})
    return rows
