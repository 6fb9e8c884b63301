"""Models with a head for the labels of a task: their own, or a new one where there is none for another task."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from factorformer.errors import DataError, ModelError, require
from factorformer.hf.source import from_pretrained, load_model, load_tokenizer, read_config, ready, refuse
from factorformer.tasks.labels import TASKS, Kind, Labels
from factorformer.tasks.trainer import seeded

PROBLEMS: dict[Kind, Any] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}
"""What transformers calls the tasks of a sequence-classification head."""


@dataclasses.dataclass(frozen=True)
class Head:
    """The head that a model has, or is to get, for the labels of a task.

    Args:
        labels: of the task, in the order of the head's outputs.
        trained: the head comes with the model; a new one has random weights.
        replaced: what the model's own head predicts, if a new one is to take its place.
    """

    labels: Labels
    trained: bool
    replaced: Labels | None = None


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with a head for the labels of a task.

    Args:
        model: any `...ForSequenceClassification` or `...ForTokenClassification`.
        head: where its head comes from.
    """

    model: PreTrainedModel
    head: Head

    @property
    def labels(self) -> Labels:
        """Of the task, in the order of the head's outputs."""
        return self.head.labels


def find_head(path: Path, labels: Labels, config: PretrainedConfig | None = None) -> Head:
    """The head for a task, before any weight is read: the model's own if that knows the task's labels, else a new one.

    A head for another task is never thrown away: a model that has one is refused.

    Args:
        path: the model directory, dense or compressed.
        labels: as the data has them; the order of a head that is kept goes before theirs.
        config: of the model; None to read it.

    Raises:
        ModelError: the model has a head for another task, or an architecture that has no head for this one.
    """
    config = config or read_config(path)
    own = head_labels(config)
    if own is None:
        _check_headless(path, config, labels)
        return Head(labels, trained=False)
    if _family(own) != _family(labels):
        raise _other_task(path, config, own, labels.kind)
    kept = _agree(own, labels)
    return Head(labels, trained=False, replaced=own) if kept is None else Head(kept, trained=True)


def load_classifier(
    path: Path,
    labels: Labels,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float32,
    device: str | None = None,
) -> Classifier:
    """A model with the head that `find_head` finds.

    Args:
        path: the model directory, dense or compressed.
        labels: as the data has them; the order of a head that is kept goes before theirs.
        seed: of a new head.
        dtype: of the weights: full precision for training; None keeps the one on disk.
        device: where the model is put; None for a GPU if there is one.

    Raises:
        CheckpointError: weights other than the head's are missing or misshapen.
        ModelError: as `find_head`, or weights that are not finite.
    """
    config = read_config(path)
    head = find_head(path, labels, config)
    if head.trained:
        return Classifier(load_model(path, dtype, device, whole=True), head)
    config.num_labels = 2 if labels.kind == "answers" else max(len(labels.names), 1)  # where they begin and end
    if labels.names:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: i for i, name in enumerate(labels.names)}
    config.problem_type = PROBLEMS.get(labels.kind)
    if config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(path).pad_token_id
    heads: dict[str, Any] = {"tokens": AutoModelForTokenClassification, "answers": AutoModelForQuestionAnswering}
    auto = heads.get(labels.kind, AutoModelForSequenceClassification)
    with seeded(seed):
        model, info = from_pretrained(auto, path, config=config, dtype=dtype or "auto", ignore_mismatched_sizes=True)
    inside = f"{model.base_model_prefix}."
    wrong = [[str(k) for k in info[kind]] for kind in ("missing_keys", "mismatched_keys")]
    # A checkpoint from masked-language modelling has no pooler: it belongs to the head and is new as well.
    refuse(path, *[[key for key in keys if inside in key and ".pooler." not in key] for keys in wrong])
    return Classifier(ready(model, device), head)


def head_labels(config: PretrainedConfig) -> Labels | None:
    """What the head of a saved model predicts, or the model writes; None if it has no such head."""
    names = tuple(name for _, name in sorted((config.id2label or {}).items()))
    if _class_name(config).endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple")):
        return Labels("answers")
    if writes(config):
        return Labels("text")
    if _class_name(config).endswith("ForTokenClassification"):
        return Labels("tokens", names)
    if not _class_name(config).endswith("ForSequenceClassification"):
        return None
    if config.problem_type == PROBLEMS["multi_label"]:
        return Labels("multi_label", names)
    if config.problem_type == PROBLEMS["regression"] or config.num_labels == 1:
        return Labels("regression")
    return Labels("classification", names)


def check_head(path: Path, config: PretrainedConfig, kind: Kind | None = None) -> Labels:
    """What the classification head of the model in a directory predicts.

    Raises:
        ModelError: the model has none, or one for another task than this.
    """
    head = head_labels(config)
    if head is None:
        _check_headless(path, config, None)
        raise ModelError(f"'{path}' has no classification head: train one with `factorformer finetune`")
    if kind not in (None, head.kind):
        raise _other_task(path, config, head, kind)
    return head


def labels_for(head: Labels, rows: datasets.Dataset, column: str) -> Labels:
    """How labelled data reads under the head of a model: labels are matched by name, or else by number.

    Raises:
        DataError: labels of another kind, or that the head does not know.
        MissingPackageError: texts are to be compared, and sacreBLEU is not installed.
    """
    if head.kind == "text":
        require("translation")
    try:
        head.ids(rows, column)
        return head
    except DataError:
        numbered = _numbered(head)
        with contextlib.suppress(DataError):
            numbered.ids(rows, column)
            return numbered
        raise


def gives_scores(config: PretrainedConfig) -> bool:
    """Whether a saved model has a head for classes of texts, or for scores."""
    head = head_labels(config)
    return head is not None and head.kind in ("classification", "regression", "multi_label")


def embeds(config: PretrainedConfig) -> bool:
    """Whether a saved model is used for its hidden states: it has no head, or one by which it writes texts."""
    head = head_labels(config)
    return head is None or head.kind == "text"


def writes(config: PretrainedConfig) -> bool:
    """Whether a saved model is an encoder-decoder that writes a text for a text."""
    known = _names_of(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, config)
    return config.is_encoder_decoder and _class_name(config) in known


def labels_of(
    path: Path, config: PretrainedConfig, rows: datasets.Dataset, column: str, kind: Kind | None = None
) -> Labels:
    """What the labels of training data mean to a saved model: texts to one that writes, and else see `Labels.of`.

    Args:
        path: of the model.
        config: of it.
        rows: a table.
        column: of its labels.
        kind: of the task; None for what model and labels say.

    Raises:
        DataError: as from `Labels.of`.
        ModelError: the model is for another task.
        MissingPackageError: texts are to be compared, and sacreBLEU is not installed.
    """
    own = head_labels(config)
    if own is not None and own.kind in ("answers", "text"):
        if kind not in (None, own.kind):
            raise _other_task(path, config, own, kind)
        return labels_for(own, rows, column)
    if kind == "text":
        raise ModelError(
            f"'{path}' is a {_class_name(config)} and writes no texts: the task is {TASKS[kind]}, which is one for "
            "encoder-decoders with a head for it, such as T5ForConditionalGeneration"
        )
    return Labels.of(rows, column, kind)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a saved model goes on with a text, token by token, without an encoder."""
    name = _class_name(config)
    known = _names_of(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    return not config.is_encoder_decoder and (name in known or name.endswith(("ForCausalLM", "LMHeadModel")))


def _class_name(config: PretrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _names_of(mapping: Any, config: PretrainedConfig) -> list[str]:
    """Names of the classes that transformers has for a configuration; empty for one that it does not know."""
    found = mapping.get(type(config), ())
    return [each.__name__ for each in (found if isinstance(found, tuple | list) else (found,))]


def _check_headless(path: Path, config: PretrainedConfig, labels: Labels | None) -> None:
    """Raise `ModelError` for a model whose head a new one would take the place of, and for one that can get none."""
    name = _class_name(config)
    bare = name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel"))
    hidden = (*_names_of(MODEL_MAPPING, config), *_names_of(MODEL_FOR_MASKED_LM_MAPPING, config))
    if name and not (bare or name in hidden or name.endswith(("ForMaskedLM", "ForPreTraining"))):
        advice = "measure it on plain text" if is_causal(config) else "measure it with its own tools"
        raise ModelError(
            f"'{path}' is a {name}: labels are for classifiers of texts (ForSequenceClassification) and of words "
            "(ForTokenClassification), for models that answer questions or write texts for texts, and for models "
            f"without a head, which get one; {advice}, or save its base model (`AutoModel`) to train a head on that"
        )
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if labels is not None and labels.kind == "tokens":
        mapping = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    elif labels is not None and labels.kind == "answers":
        mapping = MODEL_FOR_QUESTION_ANSWERING_MAPPING
    if labels is not None and type(config) not in mapping and not hasattr(config, "auto_map"):
        raise ModelError(f"'{path}' ({config.model_type}) has no head in transformers for {TASKS[labels.kind]}")


def _other_task(path: Path, config: PretrainedConfig, own: Labels, kind: Kind) -> ModelError:
    return ModelError(
        f"'{path}' is a {_class_name(config)} whose task is {TASKS[own.kind]}, and that of the data, or of --task, is "
        f"{TASKS[kind]}: give labels of the model's kind, or a model without such a head"
    )


def _family(labels: Labels) -> str:
    """Tasks of one family have heads that can take each other's place."""
    return "sequence" if labels.kind in ("classification", "regression") else labels.kind


def _agree(head: Labels, data: Labels) -> Labels | None:
    """The head's labels as the data writes them, by name or by number; None if the head does not know all of them.

    Numbers may mean anything: unless the head has no names but numbers, the data has to hold all of them.
    """
    if head.kind == "regression" or data.kind == "regression":
        return head if head.kind == data.kind else None
    if set(data.names) <= set(head.names):
        return head
    numbered, unnamed = _numbered(head), head.names == tuple(f"LABEL_{i}" for i in range(len(head.names)))
    numbers = set(numbered.names)
    return numbered if set(data.names) == numbers or (unnamed and set(data.names) <= numbers) else None


def _numbered(head: Labels) -> Labels:
    return Labels(head.kind, tuple(str(i) for i in range(len(head.names))))
