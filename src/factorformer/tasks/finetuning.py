"""Fine-tuning with the Hugging Face `Trainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from factorformer.errors import DataError, MethodError, ModelError
from factorformer.hf.callbacks import DynamicRankCallback, StraightThroughCallback
from factorformer.layers.nn import FactorizedMatrix
from factorformer.progress import Progress, silent
from factorformer.tasks.data import IGNORED, collator
from factorformer.tasks.trainer import own_forward, seeded
from factorformer.training.distillation import (
    WITHOUT_LABELS,
    DistillationWeights,
    hidden_loss,
    logit_loss,
    mean_pool,
    pooled_loss,
)
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.straight_through import StraightThrough


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a model is fine-tuned; the same for dense and compressed models.

    Args:
        epochs: passes over the training data.
        learning_rate: peak of a linear schedule with warm-up.
        batch_size: examples in a step, bucketed by length.
        seed: of initialization, order and dropout.
        warmup: fraction of all steps.
        weight_decay: of AdamW.
        freeze_embeddings: leave word embeddings as they are, which saves memory and half of the time on small models.
            Factorized ones are trained in any case: they have lost something that they can learn again.
        precision: of matrix products; parameters and optimizer stay in their own.
    """

    epochs: float = 3.0
    learning_rate: float = 1e-4
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    freeze_embeddings: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuse settings under which nothing sensible can happen.

        Raises:
            MethodError: the message names the setting, its value and what is allowed.
        """
        rules = {
            "epochs": (0 < self.epochs < math.inf, "a finite number above 0"),
            "learning_rate": (0 <= self.learning_rate < math.inf, "a finite number of at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "warmup": (0 <= self.warmup < 1, "a fraction of at least 0 and below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise MethodError(f"{name.replace('_', ' ')} has to be {allowed}; got {getattr(self, name)}")


class DistillationTrainer(Trainer):
    """A `Trainer` whose model also follows a teacher: logits, hidden states, pooled embeddings.

    Args:
        teacher: kept in evaluation mode; it reads the same inputs.
        weights: how much each signal counts.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weights: DistillationWeights, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        nn.Module.to(self.teacher, self.args.device)
        self.weights = weights
        # The loss is a mean over the batch: the Trainer is to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the signals whose weight is not zero."""
        weights = self.weights
        wants_hidden = weights.hidden > 0 or weights.pooled > 0
        outputs = model(**inputs, output_hidden_states=wants_hidden)
        with torch.no_grad():
            unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
            target = self.teacher(**unlabelled, output_hidden_states=wants_hidden)
        mask = inputs["attention_mask"].bool()
        terms = []
        if weights.labels > 0:
            terms.append(weights.labels * outputs.loss)
        if weights.logits > 0:
            logits, wanted = outputs.logits, target.logits
            if logits.dim() == 3:  # of every token: those that have a label count
                counted = inputs["labels"] != IGNORED if "labels" in inputs else mask
                logits, wanted = logits[counted], wanted[counted]
            several = self.teacher.config.problem_type == "multi_label_classification"
            terms.append(weights.logits * logit_loss(logits, wanted, weights.temperature, several))
        if weights.hidden > 0:
            terms.append(weights.hidden * hidden_loss(outputs.hidden_states, target.hidden_states, mask))
        if weights.pooled > 0:
            mine, theirs = outputs.hidden_states[-1], target.hidden_states[-1]
            terms.append(weights.pooled * pooled_loss(mean_pool(mine, mask), mean_pool(theirs, mask)))
        loss = torch.stack(terms).sum()
        return (loss, outputs) if return_outputs else loss


def check_can_follow(student: PretrainedConfig) -> None:
    """Raise `ModelError` for a model that cannot learn from a teacher."""
    if student.is_encoder_decoder:
        raise ModelError(
            f"the model ({student.model_type}) is an encoder and a decoder: distillation is not defined for it, train "
            "without a teacher"
        )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    settings: TrainingSettings,
    *,
    teacher: PreTrainedModel | None = None,
    distillation: DistillationWeights | None = None,
    straight: StraightThrough | None = None,
    ranks: DynamicRank | None = None,
    callbacks: list[TrainerCallback] | None = None,
    progress: Progress = silent,
    phase: str = "train",
) -> float:
    """Fine-tune in place: length-bucketed batches, fused AdamW, linear schedule with warm-up.

    Args:
        model: dense or compressed.
        tokenizer: of the model, for padding.
        data: from `data.encode`.
        settings: see `TrainingSettings`.
        teacher: if given, the model also learns from it; without labels in the data, from it alone.
        distillation: weights of the teacher's signals; by default chosen by whether there are labels.
        straight: made of the model, if it trains straight through; finished at the end.
        ranks: made of the model, if its ranks are found in training; finished at the end.
        callbacks: of the Trainer.
        progress: progress callback, in steps.
        phase: name of the phase reported to `progress`.

    Returns:
        Seconds of training.

    Raises:
        DataError: neither labels nor a teacher.
        ModelError: the loss became NaN or infinite, or a teacher for an encoder-decoder.
    """
    labelled = "labels" in data.column_names
    if not labelled and teacher is None:
        raise DataError("training needs labels or a teacher: give a label column or --distill")
    if teacher is not None:
        check_can_follow(model.config)
    weights = distillation or (DistillationWeights() if labelled else WITHOUT_LABELS)
    acting: list[TrainerCallback] = [_Steps(progress, phase)]
    acting += [] if straight is None else [StraightThroughCallback(straight)]
    acting += [] if ranks is None else [DynamicRankCallback(ranks)]
    frozen = settings.freeze_embeddings and (ranks is None or not ranks.holds(model.get_input_embeddings()))
    with (
        tempfile.TemporaryDirectory() as scratch,
        _frozen_embeddings(model, frozen),
        own_forward(model),
        seeded(settings.seed),
    ):
        common: dict[str, Any] = {
            "model": model,
            "args": _arguments(settings, scratch, on_cpu=model.device.type == "cpu"),
            "train_dataset": data,
            "data_collator": collator(tokenizer, data),
            "callbacks": [*acting, *(callbacks or [])],
        }
        trainer = (
            Trainer(**common) if teacher is None else DistillationTrainer(**common, teacher=teacher, weights=weights)
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        try:
            result = trainer.train()
        finally:
            if straight is not None:
                straight.finish()
            if ranks is not None:
                ranks.detach()
        seconds = time.perf_counter() - started
    if not np.isfinite(result.training_loss):
        raise ModelError(
            f"training diverged (loss {result.training_loss}): lower the learning rate {settings.learning_rate:g}"
        )
    model.eval()
    return seconds


def _arguments(settings: TrainingSettings, scratch: str, *, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        seed=settings.seed,
        data_seed=settings.seed,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        bf16=settings.precision == "bf16",
        use_cpu=on_cpu,  # even where there is a GPU
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # which would report a finite loss for a run that diverged
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )


class _Steps(TrainerCallback):
    def __init__(self, progress: Progress, phase: str) -> None:
        self.progress, self.phase = progress, phase

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.phase, state.global_step, state.max_steps)


@contextlib.contextmanager
def _frozen_embeddings(model: PreTrainedModel, frozen: bool) -> Iterator[None]:
    """Word embeddings without gradients, for as long as training lasts; tied output heads stay frozen with them.

    Factorized embeddings are trained even so: the fit has just damaged them, and they have to recover.
    """
    embeddings = model.get_input_embeddings()
    frozen = frozen and not isinstance(embeddings, FactorizedMatrix)
    parameters = [p for p in embeddings.parameters() if p.requires_grad] if frozen else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
