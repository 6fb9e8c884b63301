"""Models with a head for the labels of a task: their own, or a new one."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, set_seed

from factorformer.errors import DataError, ModelError
from factorformer.hf.source import from_pretrained, load_model, load_tokenizer, read_config, ready, refuse
from factorformer.tasks.data import Labels


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with a head for the labels of a task.

    Args:
        model: any `...ForSequenceClassification`.
        labels: of the task, in the order of the head's outputs.
        trained: the head came with the model; a new one has random weights.
        replaced: what the head predicted that a new one took the place of; None if there was none.
    """

    model: PreTrainedModel
    labels: Labels
    trained: bool
    replaced: Labels | None = None


def load_classifier(path: Path, labels: Labels, seed: int = 0, dtype: torch.dtype | None = torch.float32) -> Classifier:
    """A model with a sequence-classification head: its own if that knows the task's labels, else a new one.

    Args:
        path: the model directory, dense or compressed.
        labels: as the data has them; the order of a head that is kept goes before theirs.
        seed: of a new head.
        dtype: of the weights: full precision for training; None keeps the one on disk.

    Raises:
        CheckpointError: weights other than the head's are missing or misshapen.
        ModelError: an architecture without such heads, or weights that are not finite.
    """
    config = read_config(path)
    head = head_labels(config)
    kept = _agree(head, labels) if head is not None else None
    if kept is not None:
        return Classifier(load_model(path, dtype), kept, trained=True)
    config.num_labels = max(len(labels.names), 1)
    if labels.kind == "classification":
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: i for i, name in enumerate(labels.names)}
        config.problem_type = "single_label_classification"
    else:
        config.problem_type = "regression"
    if config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(path).pad_token_id
    set_seed(seed)
    model, info = from_pretrained(
        AutoModelForSequenceClassification, path, config=config, dtype=dtype or "auto", ignore_mismatched_sizes=True
    )
    inside = f"{model.base_model_prefix}."
    wrong = [[str(k) for k in info[kind]] for kind in ("missing_keys", "mismatched_keys")]
    # A checkpoint from masked-language modelling has no pooler: it belongs to the head and is new as well.
    refuse(path, *[[key for key in keys if inside in key and ".pooler." not in key] for keys in wrong])
    return Classifier(ready(model), labels, trained=False, replaced=head)


def head_labels(config: PretrainedConfig) -> Labels | None:
    """What the sequence-classification head of a saved model predicts; None if it has no such head."""
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return None
    if config.problem_type == "regression" or config.num_labels == 1:
        return Labels("regression")
    return Labels("classification", tuple(name for _, name in sorted((config.id2label or {}).items())))


def labels_for(path: Path, rows: datasets.Dataset, column: str) -> Labels:
    """How labelled data reads under the head that a model has: labels are matched by name, or else by number.

    Raises:
        ModelError: the model has no sequence-classification head.
    """
    head = head_labels(read_config(path))
    if head is None:
        raise ModelError(f"'{path}' has no sequence-classification head: train one with `factorformer finetune`")
    for labels in (head, _numbered(head)):
        with contextlib.suppress(DataError):
            labels.ids(rows, column)
            return labels
    return head  # whoever reads the labels with it meets the error that names them


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
