"""What `compress` reads and checks before it loads a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factorformer.cli._inputs import (
    about,
    check_dense,
    check_teacher,
    encode_table,
    find_pooling,
    note_new_head,
    plain_columns,
    read_table,
)
from factorformer.cli._jobs.compress_options import CompressJob
from factorformer.cli._measure import check_measurable
from factorformer.cli._options import note
from factorformer.errors import DataError, MethodError
from factorformer.hf.source import find, load_tokenizer, read_config
from factorformer.tasks.classification import Head, check_head, find_head, head_labels, is_causal, labels_for
from factorformer.tasks.data import Columns, Labels, count_tokens, hold_out, sample
from factorformer.tasks.targets import Embeddings, Predictions, Target
from factorformer.tasks.vocabulary import trimmed_tokenizer, used_tokens

COMPARED = 1000
"""Embeddings are compared on at most so many rows: the similarities are those of all pairs."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read and checked before the weights of a model are.

    Args:
        path: the model's directory.
        tokenizer: None where there is no text at all.
        labels: of the task, in the order of the model's head; None without one.
        head: where the head to train comes from; None if none is trained.
        train, evaluation, calibration: encoded rows.
        target: what is compared with the original where there are no labels; None for a language model.
        kept: tokens of the original that are left, where others are dropped; the tokenizer knows these alone.
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase | None
    labels: Labels | None
    head: Head | None
    train: datasets.Dataset | None
    evaluation: datasets.Dataset | None
    calibration: datasets.Dataset | None
    target: Target | None
    kept: Tensor | None = None

    @property
    def heals(self) -> bool:
        """The model learns from a teacher alone to embed or to score."""
        return self.train is not None and self.target is not None

    @property
    def fresh(self) -> bool:
        """The head is new: its predictions mean nothing yet."""
        return self.head is not None and not self.head.trained


def read_inputs(job: CompressJob) -> Inputs:
    """Read all data, and check that it fits the model, of which nothing but the configuration is looked at.

    Raises:
        DataError: data that is missing, malformed, too little, or does not fit the model.
        ModelError: no such model, a head for another task, or a teacher that does not fit.
    """
    path, label = find(job.model), job.columns.label
    config = read_config(path)
    check_dense(path, config)
    labelled = {"train": job.train, "evaluation": job.evaluation} if label is not None else {}
    if job.needs == "labelled text":
        labelled["calibration"] = job.calibration
    sources = {"train": job.train, "evaluation": job.evaluation, "calibration": job.calibration}
    sources = {name: source for name, source in sources.items() if source is not None}
    columns: dict[str, Columns] = {name: job.columns for name in sources if labelled.get(name) is not None}
    tables = {name: read_table(sources[name], job.columns) for name in columns}
    for name in sources.keys() - columns.keys():
        columns[name] = plain_columns(sources[name], job.columns)
        tables[name] = read_table(sources[name], columns[name])
    labels, head = _task(job, path, config, {name: tables[name] for name in labelled if name in tables})
    if head is not None and not head.trained and job.needs == "labelled text":
        raise DataError(
            f"method '{job.chosen}' measures the model on labels, but '{job.model}' has no head trained for them: "
            "run `factorformer finetune` first and compress its output"
        )
    target = None if label is not None or is_causal(config) or not tables else _target(path, config, job.distill)
    if job.distill is not None:
        check_teacher(job.distill, config, head, target)
    tokenizer, kept = load_tokenizer(path) if tables or job.trim_vocabulary is not None else None, None
    if tokenizer is not None and job.trim_vocabulary is not None:
        tokenizer, kept = _trimmed(tokenizer, job, config)
    data: dict[str, datasets.Dataset] = {}
    for name, rows in tables.items():
        assert tokenizer is not None
        known = labels if columns[name].label is not None else None
        data[name] = encode_table(sources[name], rows, columns[name], tokenizer, known, job.max_length, config)
    seed = job.settings.seed
    if label is None and job.train is not None and job.evaluation is None:
        data["train"], data["evaluation"] = hold_out(data["train"], seed)
        if job.calibration == job.train:  # what is measured on is not calibrated on
            data["calibration"] = data["train"]
    if labels is None and "evaluation" in data:
        check_measurable(config, data["evaluation"], job.evaluation or job.train or "")
        data["evaluation"] = sample(data["evaluation"], COMPARED, seed)
    if job.healing.minutes is not None and job.train is not None and target is None:
        raise MethodError(f"--minutes is for encoders, and '{job.model}' is a language model: give --epochs")
    return Inputs(
        path,
        tokenizer,
        labels,
        head,
        data.get("train"),
        data.get("evaluation"),
        data.get("calibration"),
        target,
        kept,
    )


def _trimmed(
    tokenizer: PreTrainedTokenizerBase, job: CompressJob, config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, Tensor]:
    """The tokenizer without the tokens that a text never uses, and the numbers of those that are left."""
    source = job.trim_vocabulary or ""
    columns = plain_columns(source, job.columns)
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    rows = read_table(source, columns)
    for column in columns.text:
        texts = encode_table(source, rows, Columns((column,)), tokenizer, None, job.max_length, config)
        counts += count_tokens([texts], len(tokenizer))
    kept = used_tokens(tokenizer, counts)
    note(f"vocabulary: {len(kept):,} of {len(tokenizer):,} tokens are kept")
    return trimmed_tokenizer(tokenizer, kept), kept


def _target(path: Path, config: PretrainedConfig, teacher: str | None) -> Target:
    """Scores of a model with a head for them, and else embeddings, each pooled as its directory says."""
    head = head_labels(config)
    if head is not None and head.kind != "tokens":
        return Predictions(independent=head.kind == "multi_label")
    ours = find_pooling(path)
    theirs = ours if teacher is None else find_pooling(find(teacher))
    # A plain directory is used like the one that it learns from, and the other way round.
    student, original = (theirs if ours.pooling is None else ours), (ours if theirs.pooling is None else theirs)
    return Embeddings(student.pool, original.pool)


def _task(
    job: CompressJob, path: Path, config: PretrainedConfig, tables: Mapping[str, datasets.Dataset]
) -> tuple[Labels | None, Head | None]:
    """What labels mean, and the head that is trained on them, if one is."""
    label = job.columns.label
    if label is None or not tables:
        return None, None
    name = next(name for name in ("train", "evaluation", "calibration") if name in tables)
    with about(getattr(job, name)):
        if name != "train":
            return labels_for(check_head(path, config), tables[name], label), None
        head = find_head(path, Labels.of(tables[name], label, job.regression, job.columns.words), config)
    note_new_head(head)
    return head.labels, head
