"""What a model is measured by: predictions of its task, scores, and embeddings of plain text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError, ModelError
from factorformer.layers.modes import fast_float32
from factorformer.progress import Progress, silent
from factorformer.tasks import answers, translation
from factorformer.tasks.data import indexed_batches
from factorformer.tasks.embeddings import neighbour_recall, unit
from factorformer.tasks.labels import IGNORED, Labels
from factorformer.training.distillation import logit_loss, mean_pool

Pool = Callable[[Float[Tensor, "rows tokens width"], Bool[Tensor, "rows tokens"]], Float[Tensor, "rows pooled"]]
"""Hidden states, and which tokens are real, to one vector for each row."""

LEAST_TEXTS = 3
"""Similarities of texts can be ranked from so many on."""


def _outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    batch_size: int,
    progress: Progress,
    phase: str,
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Row numbers, logits and labels of each batch."""
    model.eval()
    done = 0
    for rows, batch in indexed_batches(tokenizer, data, batch_size):
        labels = batch.pop("labels", None)
        with torch.inference_mode(), fast_float32(model.device):
            logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
        yield rows, logits.float().cpu(), labels
        done += len(rows)
        progress(phase, done, len(data))
    if done == 0:
        raise DataError("there are no rows to evaluate on")


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> np.ndarray:
    """Logits of every text, `(rows, classes)`, in the order of the rows.

    Raises:
        DataError: no rows.
    """
    unlabelled = data.remove_columns("labels") if "labels" in data.column_names else data
    found = [(rows, logits) for rows, logits, _ in _outputs(model, tokenizer, unlabelled, batch_size, progress, phase)]
    order = np.concatenate([rows for rows, _ in found])
    return torch.cat([logits for _, logits in found]).numpy()[np.argsort(order)]


def predict_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all words that have a label, `(words, classes)`, and these labels, `(words,)`, in one order.

    Words of texts that were cut off are not among them.

    Raises:
        DataError: no rows, or no word with a label.
    """
    logits, labels = [], []
    for _, found, given in _outputs(model, tokenizer, data, batch_size, progress, phase):
        assert given is not None
        known = given != IGNORED
        logits.append(found[known])
        labels.append(given[known])
    references = torch.cat(labels).numpy()
    if len(references) == 0:
        raise DataError("there is no word with a label to evaluate on")
    return torch.cat(logits).numpy(), references


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    labels: Labels,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> dict[str, float]:
    """Metrics of a model on encoded, labelled rows.

    Raises:
        DataError: nothing to evaluate on.
        ModelError: predictions that are NaN or infinite.
    """
    if labels.kind == "answers":
        return answers.measure(model, data, indexed_batches(tokenizer, data), progress, phase)
    if labels.kind == "text":
        return translation.measure(model, tokenizer, data, progress, phase)
    if labels.kind == "tokens":
        logits, references = predict_words(model, tokenizer, data, progress=progress, phase=phase)
    else:
        logits = predict(model, tokenizer, data, progress=progress, phase=phase)
        references = np.asarray(data["labels"])
    if not np.isfinite(logits).all():
        raise ModelError("the model's predictions are NaN or infinite")
    return score(logits, references, labels)


def score(logits: np.ndarray, references: np.ndarray, labels: Labels) -> dict[str, float]:
    """The metrics that fit the task; NaN where one is not defined, as a correlation with a constant.

    Args:
        logits: `(rows, classes)`, of texts or of words.
        references: `(rows,)` ids or numbers; for several labels a text, `(rows, classes)` of 0 and 1.
        labels: what they mean.

    Returns:
        Classes: accuracy, macro-F1 and Matthews correlation, with two classes the F1 of the second, as MRPC reports
        it, and the cross-entropy in nats. Several labels a text: micro- and macro-F1, and accuracy of whole sets.
        Classes of words: accuracy, macro-F1, and the cross-entropy. Regression: Pearson and Spearman correlation, and
        mean squared error.
    """
    if labels.kind == "regression":
        predicted = logits[:, 0].astype(np.float64)
        return {
            "pearson": correlation(predicted, references),
            "spearman": rank_correlation(predicted, references),
            "mse": float(np.mean((predicted - references) ** 2)),
        }
    if labels.kind == "multi_label":
        chosen, wanted = logits > 0, references > 0.5
        undefined: Any = 0  # the F1 of a class that neither occurs nor is predicted
        return {
            "micro_f1": float(f1_score(wanted, chosen, average="micro", zero_division=undefined)),
            "macro_f1": float(f1_score(wanted, chosen, average="macro", zero_division=undefined)),
            "subset_accuracy": float((wanted == chosen).all(-1).mean()),
        }
    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": float(accuracy_score(references, predicted)),
        "macro_f1": float(f1_score(references, predicted, average="macro")),
        "loss": float(F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(references).long())),
    }
    if labels.kind == "tokens":
        return metrics
    several = len(np.unique(references)) > 1
    metrics["matthews"] = float(matthews_corrcoef(references, predicted)) if several else math.nan
    if len(labels.names) == 2:
        metrics["f1"] = float(f1_score(references, predicted))
    return metrics


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two vectors; NaN where it is not defined: below two values, or if one is constant."""
    return _statistic(pearsonr, a, b)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; NaN as for `correlation`."""
    return _statistic(spearmanr, a, b)


def _statistic(test: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(test(a, b).statistic)


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: datasets.Dataset,
    batch_size: int = 32,
    pool: Pool = mean_pool,
    progress: Progress = silent,
    phase: str = "embed",
) -> Tensor:
    """Pooled last hidden states of every row, `(rows, width)`, in the order of the rows.

    Args:
        model: an encoder; a head is left out.
        tokenizer: pads rows; None for rows of images or sound.
        data: from `data.encode`, or other inputs of the model.
        batch_size: rows at a time.
        pool: what becomes of hidden states.
        progress: told of `phase`, and how many rows are done.
        phase: see there.
    """
    return read_all(lambda inputs: pooled(model, inputs, pool), model, tokenizer, data, batch_size, progress, phase)


def pooled(model: PreTrainedModel, inputs: Mapping[str, Tensor], pool: Pool) -> Float[Tensor, "rows pooled"]:
    """Pooled last hidden states of a batch; of images, and sound that is shortened on its way, all states are real."""
    hidden = model.base_model(**inputs).last_hidden_state
    return pool(hidden.float(), real_tokens(hidden, inputs))


def real_tokens(
    hidden: Float[Tensor, "rows tokens width"], inputs: Mapping[str, Tensor]
) -> Bool[Tensor, "rows tokens"]:
    """Which hidden states are not of padding, by the inputs of a batch: all, where its mask is not of these."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    return mask.bool()


def read_all(
    read: Callable[[Mapping[str, Tensor]], Float[Tensor, "some outputs"]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: datasets.Dataset,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "embed",
) -> Float[Tensor, "rows outputs"]:
    """What a function makes of all rows, in their order, float32 on the CPU; the rest is as for `embed`."""
    model.eval()
    result: list[Tensor] = []
    order: list[int] = []
    with torch.inference_mode(), fast_float32(model.device):
        for rows, batch in indexed_batches(tokenizer, data, batch_size):
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            result.append(read(inputs).float().cpu())
            order += rows
            progress(phase, len(order), len(data))
    return torch.cat(result)[torch.tensor(order).argsort()]


def compare_embeddings(original: Tensor, compressed: Tensor) -> dict[str, float]:
    """How well a compressed encoder keeps embeddings `(rows, width)` and the similarities between rows.

    Returns:
        `embedding_cosine`: mean cosine of each row's two embeddings; `similarity_spearman`: rank correlation, over all
        pairs of rows, of the cosine similarities that the two models give, NaN below three rows; `neighbour_recall`: of
        the ten rows that are nearest to a row in the original, the part that is in the compressed model.
    """
    first, second = unit(original), unit(compressed)
    pairs = torch.triu_indices(len(original), len(original), 1)
    similarities = [(e @ e.T)[pairs[0], pairs[1]].numpy() for e in (first, second)]
    return {
        "embedding_cosine": float((first * second).sum(1).mean()),
        "similarity_spearman": rank_correlation(*similarities),
        "neighbour_recall": float(neighbour_recall(first, second).mean()),
    }


def compare_predictions(original: Tensor, compressed: Tensor, *, independent: bool = False) -> dict[str, float]:
    """How well a compressed model keeps scores `(rows, 1)` or logits of classes `(rows, classes)`.

    Returns:
        Of scores `score_spearman` and `score_pearson`, rank and linear correlation of the two; of classes
        `prediction_agreement`, how often both find the same one the likeliest, and `prediction_divergence`, the mean
        Kullback-Leibler divergence of the compressed model's predictions from the original's, in nats. Of classes that
        do not exclude each other, agreement is that of all of a row, and divergences add up.
    """
    first, second = original.float(), compressed.float()
    if first.shape[1] == 1:
        a, b = first[:, 0].numpy(), second[:, 0].numpy()
        return {"score_spearman": rank_correlation(a, b), "score_pearson": correlation(a, b)}
    if independent:
        agreement = ((first > 0) == (second > 0)).all(1).float().mean()
        divergence = logit_loss(second, first, temperature=1.0, independent=True)
        return {"prediction_agreement": float(agreement), "prediction_divergence": float(divergence)}
    divergence = F.kl_div(second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean")
    agreement = (first.argmax(1) == second.argmax(1)).float().mean()
    return {"prediction_agreement": float(agreement), "prediction_divergence": float(divergence)}
