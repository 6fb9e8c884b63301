"""Fine-tuning and evaluation with the Hugging Face `Trainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import datasets
import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from factorformer.errors import DataError, ModelError
from factorformer.hf.callbacks import DynamicRankCallback, StraightThroughCallback
from factorformer.layers.nn import FactorizedMatrix
from factorformer.progress import Progress, silent
from factorformer.tasks.data import Labels, indexed_batches
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
            terms.append(weights.logits * logit_loss(outputs.logits, target.logits, weights.temperature))
        if weights.hidden > 0:
            terms.append(weights.hidden * hidden_loss(outputs.hidden_states, target.hidden_states, mask))
        if weights.pooled > 0:
            mine, theirs = outputs.hidden_states[-1], target.hidden_states[-1]
            terms.append(weights.pooled * pooled_loss(mean_pool(mine, mask), mean_pool(theirs, mask)))
        loss = torch.stack(terms).sum()
        return (loss, outputs) if return_outputs else loss


def check_can_follow(student: PreTrainedModel) -> None:
    """Raise `ModelError` for a model that cannot learn from a teacher."""
    if student.config.is_encoder_decoder:
        raise ModelError(
            f"{type(student).__name__} is an encoder and a decoder: distillation is not defined for it, train without "
            "a teacher"
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
        progress: told how many steps are done.
        phase: the name under which progress is told.

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
        check_can_follow(model)
    acting: list[TrainerCallback] = [] if straight is None else [StraightThroughCallback(straight)]
    acting += [] if ranks is None else [DynamicRankCallback(ranks)]
    frozen = settings.freeze_embeddings and (ranks is None or not ranks.holds(model.get_input_embeddings()))
    with tempfile.TemporaryDirectory() as scratch, _frozen_embeddings(model, frozen), _own_forward(model):
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            seed=settings.seed,
            data_seed=settings.seed,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            bf16=settings.precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),  # or else bf16 is refused
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,  # which would report a finite loss for a run that diverged
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        common: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": data,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "callbacks": [_Steps(progress, phase), *acting, *(callbacks or [])],
        }
        set_seed(settings.seed)
        if teacher is None:
            trainer = Trainer(**common)
        else:
            weights = distillation or (DistillationWeights() if labelled else WITHOUT_LABELS)
            trainer = DistillationTrainer(**common, teacher=teacher, weights=weights)
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


class _Steps(TrainerCallback):
    def __init__(self, progress: Progress, phase: str) -> None:
        self.progress, self.phase = progress, phase

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.phase, state.global_step, state.max_steps)


@contextlib.contextmanager
def _frozen_embeddings(model: PreTrainedModel, frozen: bool) -> Iterator[None]:
    """Word embeddings without gradients, for as long as training lasts; tied output heads stay frozen with them.

    Factorized embeddings are trained even so: the fit has just damaged them, and they have to heal.
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


@contextlib.contextmanager
def _own_forward(model: PreTrainedModel) -> Iterator[None]:
    """Accelerate wraps `forward` for the precision of the training, which is not that of what comes after."""
    wrapped = ("forward", "_original_forward")
    own = {name: vars(model)[name] for name in wrapped if name in vars(model)}
    try:
        yield
    finally:
        for name in wrapped:
            vars(model).pop(name, None)
        vars(model).update(own)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> np.ndarray:
    """Logits of every row, `(rows, classes)`, in the order of the rows."""
    model.eval()
    unlabelled = data.remove_columns("labels") if "labels" in data.column_names else data
    result: np.ndarray | None = None
    done = 0
    with torch.inference_mode():
        for rows, batch in indexed_batches(tokenizer, unlabelled, batch_size):
            logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits.float().cpu().numpy()
            if result is None:
                result = np.empty((len(data), logits.shape[-1]), dtype=np.float32)
            result[rows] = logits
            done += len(rows)
            progress(phase, done, len(data))
    if result is None:
        raise DataError("there are no rows to evaluate on")
    return result


def score(logits: np.ndarray, references: np.ndarray, labels: Labels) -> dict[str, float]:
    """The metrics that fit the task: accuracy, macro-F1 and Matthews correlation, or Pearson and Spearman.

    Two classes also get the F1 of the second one, as MRPC reports it.
    """
    if labels.kind == "regression":
        predicted = logits[:, 0]
        return {
            "pearson": correlation(predicted, references),
            "spearman": rank_correlation(predicted, references),
            "mse": float(np.mean((predicted - references) ** 2)),
        }
    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": float(accuracy_score(references, predicted)),
        "macro_f1": float(f1_score(references, predicted, average="macro")),
        "matthews": float(matthews_corrcoef(references, predicted)),
    }
    if len(labels.names) == 2:
        metrics["f1"] = float(f1_score(references, predicted))
    return metrics


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two vectors; 0 where one of them is constant and it is not defined."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; ties share their mean rank."""
    return correlation(rankdata(a), rankdata(b))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    labels: Labels,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> dict[str, float]:
    """Metrics of a model on encoded, labelled rows."""
    logits = predict(model, tokenizer, data, progress=progress, phase=phase)
    if not np.isfinite(logits).all():
        raise ModelError("the model's predictions are NaN or infinite")
    return score(logits, np.asarray(data["labels"]), labels)


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: datasets.Dataset, batch_size: int = 32
) -> Tensor:
    """Mean-pooled last hidden states of every row, `(rows, width)`, in the order of the rows."""
    base = model.base_model.eval()
    device = model.device
    result: list[Tensor] = []
    order: list[int] = []
    with torch.inference_mode():
        for rows, batch in indexed_batches(tokenizer, data, batch_size):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            hidden = base(**inputs).last_hidden_state
            result.append(mean_pool(hidden, inputs["attention_mask"].bool()).float().cpu())
            order += rows
    return torch.cat(result)[torch.tensor(order).argsort()]


def compare_embeddings(original: Tensor, compressed: Tensor) -> dict[str, float]:
    """How well a compressed encoder keeps embeddings `(rows, width)` and the similarities between rows.

    Returns:
        `embedding_cosine`: mean cosine of each row's two embeddings; `similarity_spearman`: rank correlation, over all
        pairs of rows, of the cosine similarities that the two models give.
    """
    cosine = nn.functional.cosine_similarity(original, compressed).mean()
    pairs = torch.triu_indices(len(original), len(original), 1)
    similarities = [
        (unit @ unit.T)[pairs[0], pairs[1]].numpy()
        for unit in (nn.functional.normalize(e, dim=-1) for e in (original, compressed))
    ]
    return {
        "embedding_cosine": float(cosine),
        "similarity_spearman": rank_correlation(*similarities),
    }
