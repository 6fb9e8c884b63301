"""What `compress` reads and checks before it loads a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factorformer.cli._given import note_unused
from factorformer.cli._inputs import check_dense, check_speaks_alike, check_teacher, find_pooling, note_new_head
from factorformer.cli._jobs.compress_options import CompressJob
from factorformer.cli._measure import check_measurable
from factorformer.cli._options import LENGTH, note
from factorformer.cli._text_files import Source
from factorformer.cli._texts import (
    about,
    columns_in,
    encode_table,
    encode_text,
    longest_of,
    plain_columns,
    read_table,
    read_text,
    written,
)
from factorformer.errors import DataError
from factorformer.export.sentence import Writing, read_writing
from factorformer.hf.source import find, load_tokenizer, read_config
from factorformer.tasks.classification import (
    Head,
    check_head,
    find_head,
    gives_scores,
    head_labels,
    is_causal,
    labels_for,
    labels_of,
)
from factorformer.tasks.data import Columns, Labels, count_tokens, encode, hold_out, sample, unlike
from factorformer.tasks.healing import Reading
from factorformer.tasks.targets import Embeddings, NextTokens, Predictions, Remembered, Target
from factorformer.tasks.vocabulary import trimmed_tokenizer, used_tokens
from factorformer.tasks.windows import MEASURED, sequence_length, windows

COMPARED = 1000
"""Embeddings are compared on at most so many rows: the similarities are those of all pairs."""


@dataclasses.dataclass(frozen=True)
class OriginalInputs:
    """Rows as the tokenizer reads them that knows all tokens.

    Args:
        tokenizer: of the original.
        train, evaluation: encoded rows.
    """

    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset | None
    evaluation: datasets.Dataset | None

    @property
    def reading(self) -> Reading:
        """What a teacher reads."""
        assert self.train is not None
        assert self.evaluation is not None
        return Reading(self.tokenizer, self.train, self.evaluation)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read and checked before the weights of a model are.

    Args:
        path: the model's directory.
        tokenizer: None where there is no text at all.
        labels: of the task, in the order of the model's head; None without one.
        head: where the head to train comes from; None if none is trained.
        train, evaluation, calibration: encoded rows.
        target: what is compared with the original where there are no labels.
        kept: tokens of the original that are left, where others are dropped; the tokenizer knows these alone.
        original: what the original reads of the same rows then; None for a language model, which predicts tokens.
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
    original: OriginalInputs | None = None

    @property
    def heals(self) -> bool:
        """The model learns without labels: from a teacher to embed or to score, or to go on with texts."""
        return self.train is not None and self.target is not None

    @property
    def speaks(self) -> bool:
        """It is a causal language model, which is measured by what it predicts."""
        return isinstance(self.target, NextTokens)

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
    columns = {name: columns_in(sources[name], job.columns) for name in sources if labelled.get(name) is not None}
    tables = {name: read_table(sources[name], columns[name]) for name in columns}
    texts: dict[str, Any] = {}
    for name in [name for name in sources if name not in tables]:
        columns[name] = plain_columns(sources[name], job.columns)
        texts[name] = read_text(sources[name], columns[name], config)
    labels, head = _task(job, path, config, tables, columns)
    if head is not None and not head.trained and job.needs == "labelled text":
        raise DataError(
            f"method '{job.chosen}' measures the model on labels, but '{job.model}' has no head trained for them: "
            "run `factorformer finetune` first and compress its output"
        )
    if job.train is not None and label is None and job.distill is None and not is_causal(config):
        raise DataError("training needs labels or a teacher: give --label, or --distill with the original model")
    target = None if label is not None or not texts else _target(path, config, job.distill)
    if texts and isinstance(target, NextTokens):
        note_unused("of language models", "max_length", "task")
    elif texts:
        note_unused("but for causal language models", "sequence_length")
    if job.distill is not None:
        if isinstance(target, NextTokens):
            check_speaks_alike(job.distill, config, path)
        else:
            check_teacher(job.distill, config, head, target, None if target is None else path)
    if isinstance(target, Predictions) and config.num_labels == 1 and all(len(c.text) == 1 for c in columns.values()):
        note(
            "the model gives one score, and the text has one column: if it scores pairs, as rerankers do, name the "
            "columns of both texts by --text"
        )
    longest, writing = job.max_length or LENGTH, Writing()
    if isinstance(target, Remembered):
        longest = longest_of(path, config, job.max_length)
    if isinstance(target, Embeddings):
        writing = read_writing(path)
        texts = {name: written(rows, columns[name], writing) for name, rows in texts.items()}
        if writing.prompt:
            note(f"texts begin with {writing.prompt!r}, as the directory of the model says")
    apart = isinstance(target, Embeddings) and any(len(c.text) > 1 for c in columns.values())
    if apart:
        note("the texts of the two columns are embedded each by itself")

    # Of the rows that are learned, those that are not measured on, be it the one or the other that reads them.
    left: list[int] | None = None
    read_rows = 0

    def encoded(tokenizer: PreTrainedTokenizerBase, names: Collection[str]) -> dict[str, datasets.Dataset]:
        data: dict[str, datasets.Dataset] = {}
        lengths = {"max_length": longest, "sequence_length": job.sequence_length}
        for name in names:
            source, read_of = sources[name], columns[name]
            if name == "calibration" and "train" in data and name in texts and _is_same(source, job.train):
                data[name] = data["train"]
                continue
            if name in tables:
                rows = tables[name]
                data[name] = encode_table(source, rows, read_of, tokenizer, labels, longest, config)
                continue
            each = [Columns((column,)) for column in read_of.text] if apart else [read_of]
            data[name] = datasets.concatenate_datasets(
                [encode_text(source, texts[name], c, tokenizer, config, **lengths) for c in each]
            )
        nonlocal left, read_rows
        seed, same = job.settings.seed, _is_same(job.calibration, job.train)
        if label is None and "train" in data:
            if job.evaluation is None:
                least = 1 if isinstance(target, NextTokens) else 3
                data["train"], data["evaluation"] = hold_out(data["train"], seed, least=least)
            if left is None:
                left = unlike(data["train"], data["evaluation"])
                if (twice := len(data["train"]) - len(left)) and job.evaluation is not None:
                    note(f"{twice:,} rows of --train are among those of --eval too, and not learned")
            if len(data["train"]) != (read_rows := read_rows or len(data["train"])):
                raise DataError(
                    "some rows of the training data are nothing to the trimmed vocabulary, and are something to the "
                    "original's: leave them out, or keep the vocabulary"
                )
            data["train"] = data["train"].select(left)
            if "calibration" in data and same:
                data["calibration"] = data["train"]  # what is measured on is not calibrated on
        if labels is None and "evaluation" in data:
            check_measurable(config, data["evaluation"], str(job.evaluation or job.train))
            speaks = isinstance(target, NextTokens)
            measured = max(MEASURED // max(data["evaluation"]["length"]), 1) if speaks else COMPARED
            if len(data["evaluation"]) > measured and speaks:
                note(f"measured on {measured:,} windows of them, drawn at random")
            data["evaluation"] = sample(data["evaluation"], measured, seed)
        return data

    read = [*tables, *texts]
    tokenizer = load_tokenizer(path) if read or job.trim_vocabulary is not None else None
    kept, original, data = None, None, {}
    if tokenizer is not None and job.trim_vocabulary is not None:
        if isinstance(target, Remembered) or labels is not None:
            both = [name for name in read if name == "evaluation" or (name == "train" and target is not None)]
            whole = encoded(tokenizer, both)
            original = OriginalInputs(tokenizer, whole.get("train"), whole.get("evaluation"))
        tokenizer, kept = _trimmed(load_tokenizer(path), job, config, writing)
    if tokenizer is not None:
        data = encoded(tokenizer, read)
    measured = None if original is None else original.evaluation
    if measured is not None and len(measured) != len(data["evaluation"]):
        raise DataError("some of the texts to measure on are nothing to the trimmed vocabulary: leave them out")
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
        original,
    )


def _is_same(one: Source | None, other: Source | None) -> bool:
    """Whether two names are of one file, or the same name of something else."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _trimmed(
    tokenizer: PreTrainedTokenizerBase, job: CompressJob, config: PretrainedConfig, writing: Writing
) -> tuple[PreTrainedTokenizerBase, Tensor]:
    """The tokenizer without tokens that neither a text nor a prompt uses, and the numbers of those that are left."""
    source = job.trim_vocabulary or ""
    columns = plain_columns(source, job.columns)
    read = read_text(source, columns, config)
    reads = copy.deepcopy(tokenizer)  # which remembers where it cut texts last
    with about(source):
        if isinstance(read, datasets.Dataset):
            rows = written(read, columns, writing)
            texts = [encode(reads, rows, Columns((column,)), max_length=None) for column in columns.text]
            if writing.prompts:
                prompts = datasets.Dataset.from_dict({"text": [*map(writing.cased, writing.prompts)]})
                texts.append(encode(reads, prompts, Columns(("text",)), max_length=None))
        else:
            texts = [windows(reads, read, sequence_length(config, job.sequence_length))]
            note("the original is measured without the other tokens as well")
    kept = used_tokens(tokenizer, count_tokens(texts, max(tokenizer.get_vocab().values()) + 1))
    note(f"vocabulary: {len(kept):,} of {len(tokenizer):,} tokens are kept")
    return trimmed_tokenizer(tokenizer, kept), kept


def _target(path: Path, config: PretrainedConfig, teacher: str | None) -> Target:
    """Next tokens, or scores of a model with a head for them, and else embeddings, pooled as the directory says."""
    if is_causal(config):
        return NextTokens()
    head = head_labels(config)
    if head is not None and gives_scores(config):
        return Predictions(independent=head.kind == "multi_label")
    ours = find_pooling(path)
    theirs = ours if teacher is None else find_pooling(find(teacher))
    # A plain directory is used like the one that it learns from, and the other way round.
    student, original = (theirs if ours.pooling is None else ours), (ours if theirs.pooling is None else theirs)
    return Embeddings(student.pooler, original.pooler)


def _task(
    job: CompressJob,
    path: Path,
    config: PretrainedConfig,
    tables: Mapping[str, datasets.Dataset],
    columns: Mapping[str, Columns],
) -> tuple[Labels | None, Head | None]:
    """What labels mean, and the head that is trained on them, if one is."""
    if not tables:
        return None, None
    name = next(name for name in ("train", "evaluation", "calibration") if name in tables)
    label = columns[name].label
    assert label is not None
    with about(getattr(job, name)):
        if name != "train":
            return labels_for(check_head(path, config, job.task), tables[name], label), None
        found = labels_of(path, config, tables[name], label, job.task)
        head = find_head(path, found, config)
    note_new_head(head)
    return head.labels, head
