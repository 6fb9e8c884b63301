"""Fine-tuning with the Hugging Face `Trainer`."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from factorformer.errors import DataError, ModelError
from factorformer.hf.callbacks import moving
from factorformer.progress import Progress, silent
from factorformer.tasks.classification import writes
from factorformer.tasks.data import collator
from factorformer.tasks.labels import IGNORED
from factorformer.tasks.trainer import FastTrainer, Settings, Watch, frozen_embeddings, run, seeded
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

ENDS = ("start_logits", "end_logits")
"""Outputs of a model that answers questions."""

LEAST = -1e4
"""A logit of what cannot be."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Settings):
    """How a model is fine-tuned; see `Settings` for the rest.

    Args:
        freeze_embeddings: leave word embeddings as they are, which saves memory and half of the time on small models.
            Factorized ones are trained in any case: they have lost something that they can learn again.
    """

    freeze_embeddings: bool = True


class DistillationTrainer(FastTrainer):
    """A `Trainer` whose model also follows a teacher: logits, hidden states, pooled embeddings.

    Args:
        teacher: kept in evaluation mode; it reads the same inputs.
        weights: how much each signal counts.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weights: DistillationWeights, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.follow(teacher.requires_grad_(False))
        self.weights = weights

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the signals whose weight is not zero."""
        weights = self.weights
        assert self.teacher is not None
        wants_hidden = weights.hidden > 0 or weights.pooled > 0
        outputs = model(**inputs, output_hidden_states=wants_hidden)
        with torch.no_grad():
            # A decoder reads the labels, one token late.
            reads = self.teacher.config.is_encoder_decoder
            known = {key: value for key, value in inputs.items() if key != "labels" or reads}
            target = self.teacher(**known, output_hidden_states=wants_hidden)
        mask = inputs["attention_mask"].bool()
        terms = []
        if weights.labels > 0:
            terms.append(weights.labels * outputs.loss)
        if weights.logits > 0 and "start_logits" in outputs:
            pairs = [(outputs[name].masked_fill(~mask, LEAST), target[name].masked_fill(~mask, LEAST)) for name in ENDS]
            losses = [logit_loss(*pair, weights.temperature) for pair in pairs]
            terms.append(weights.logits * torch.stack(losses).mean())
        elif weights.logits > 0:
            logits, wanted = outputs.logits, target.logits
            if logits.dim() == 3:  # of every token: those that have a label count
                counted = inputs["labels"] != IGNORED if "labels" in inputs else mask
                logits, wanted = logits[counted], wanted[counted]
            several = self.teacher.config.problem_type == "multi_label_classification"
            terms.append(weights.logits * logit_loss(logits, wanted, weights.temperature, several))
        if weights.hidden > 0:
            masks = {"hidden_states": mask, "encoder_hidden_states": mask}
            masks |= {"decoder_hidden_states": inputs["labels"] != IGNORED} if reads else {}
            losses = [hidden_loss(outputs[name], target[name], masks[name]) for name in masks if name in outputs]
            terms.append(weights.hidden * torch.stack(losses).mean())
        if weights.pooled > 0:
            name = "encoder_hidden_states" if reads else "hidden_states"
            mine, theirs = outputs[name][-1], target[name][-1]
            terms.append(weights.pooled * pooled_loss(mean_pool(mine, mask), mean_pool(theirs, mask)))
        loss = torch.stack(terms).sum()
        return (loss, outputs) if return_outputs else loss


def check_can_follow(student: PretrainedConfig, *, labelled: bool) -> None:
    """Raise `ModelError` for a model that cannot learn from a teacher: encoder-decoders, unless they write texts."""
    if student.is_encoder_decoder and not (labelled and writes(student)):
        raise ModelError(
            f"the model ({student.model_type}) is an encoder and a decoder: distillation is defined for those that "
            "write a text for each text of labelled data, train without a teacher"
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
        DivergedError: the loss became NaN or infinite.
        ModelError: a teacher for an encoder-decoder.
    """
    labelled = not {"labels", "start_positions"}.isdisjoint(data.column_names)
    if not labelled and teacher is None:
        raise DataError("training needs labels or a teacher: give a label column or --distill")
    if teacher is not None:
        check_can_follow(model.config, labelled=labelled)
    weights = distillation or (DistillationWeights() if labelled else WITHOUT_LABELS)
    acting: list[TrainerCallback] = [Watch(progress, phase), *moving(straight, ranks)]
    frozen = settings.freeze_embeddings and (ranks is None or not ranks.holds(model.get_input_embeddings()))
    with (
        tempfile.TemporaryDirectory() as scratch,
        frozen_embeddings(model, frozen),
        seeded(settings.seed),
    ):
        common: dict[str, Any] = {
            "model": model,
            "args": settings.arguments(
                scratch,
                on_cpu=model.device.type == "cpu",  # even where there is a GPU
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_strategy="epoch",
            ),
            "train_dataset": data,
            "data_collator": collator(tokenizer, data, settings.multiple(model, data)),
            "callbacks": [*acting, *(callbacks or [])],
        }
        trainer = (
            FastTrainer(**common)
            if teacher is None
            else DistillationTrainer(**common, teacher=teacher, weights=weights)
        )
        started = time.perf_counter()
        try:
            run(trainer)
        finally:
            if straight is not None:
                straight.finish()
            if ranks is not None:
                ranks.detach()
        seconds = time.perf_counter() - started
    model.eval()
    return seconds
