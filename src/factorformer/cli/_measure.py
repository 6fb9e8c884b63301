"""What a model is measured by on a table: its task, the tokens it goes on with, or its embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import datasets
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.cli._texts import LOGITS
from factorformer.errors import DataError, ModelError
from factorformer.files import BEFORE
from factorformer.progress import Progress
from factorformer.tasks import language_modelling
from factorformer.tasks.classification import is_causal
from factorformer.tasks.data import Labels
from factorformer.tasks.evaluation import LEAST_TEXTS, evaluate, read_all
from factorformer.tasks.targets import Embeddings, Remembered, Target


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about a model.

    Args:
        metrics: of the model alone.
        outputs: embeddings of the texts, or scores of a model with a head, `(rows, outputs)`.
        target: what these are compared by.
    """

    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    outputs: Tensor | None = None
    target: Remembered | None = None


def check_measurable(config: PretrainedConfig, data: datasets.Dataset, source: str) -> None:
    """Raise an error for plain text, or a model, that `measure` could make nothing of.

    Raises:
        DataError: too few texts or tokens.
        ModelError: an encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise ModelError("the model is an encoder and a decoder: embeddings of texts are not defined for it")
    if is_causal(config):
        return
    if len(data) < LEAST_TEXTS:
        raise DataError(
            f"'{source}' has {len(data)} text{'s' * (len(data) != 1)}: give at least {LEAST_TEXTS}, whose similarities "
            "can be ranked"
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    labels: Labels | None,
    progress: Progress,
    phase: str,
    target: Target | None = None,
    original: PreTrainedModel | None = None,
) -> Measured:
    """Metrics of a task; without labels those of a language model, or what a target reads.

    Predictions of a language model are compared with those of the original, if there is one.
    """
    if labels is not None:
        return Measured(evaluate(model, tokenizer, data, labels, progress, phase))
    if not is_causal(model.config):
        target = target if isinstance(target, Remembered) else Embeddings()
        found = read_all(partial(target.read, model), model, tokenizer, data, progress=progress, phase=phase)
        return Measured(outputs=found, target=target)
    size = max(1, LOGITS // (max(data["length"]) * model.config.get_text_config().vocab_size))
    size = min(size, 32)
    return Measured(language_modelling.predict(model, tokenizer, data, "causal", size, progress, phase, original))


def compare(before: Measured | None, after: Measured | None) -> dict[str, float]:
    """All metrics: of the original under the prefix `original_`, of the result, and of how far the two agree.

    What plans predict is among them: the rise of the loss, or 1 - cosine of embeddings.
    """
    earlier, later = before or Measured(), after or Measured()
    metrics = {**{BEFORE + name: value for name, value in earlier.metrics.items()}, **later.metrics}
    if "loss" in metrics and f"{BEFORE}loss" in metrics:
        metrics["loss_rise"] = metrics["loss"] - metrics[f"{BEFORE}loss"]
    if earlier.outputs is not None and later.outputs is not None and later.target is not None:
        metrics |= later.target.compare(earlier.outputs, later.outputs)
    if "embedding_cosine" in metrics:
        metrics["cosine_loss"] = 1 - metrics["embedding_cosine"]
    return metrics
