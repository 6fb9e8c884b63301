"""The job of `evaluate --against`: what the embeddings of a compressed encoder are good for, beside the original's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.cli._inputs import find_pooling
from factorformer.cli._options import note
from factorformer.cli._texts import about, encode_table, longest_of, read_table, written
from factorformer.errors import DataError, ModelError
from factorformer.export.sentence import read_writing
from factorformer.files import BEFORE, short_names
from factorformer.hf.source import find, load_model, load_tokenizer, read_config
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.tasks import embeddings
from factorformer.tasks.cells import class_label
from factorformer.tasks.classification import head_labels, is_causal
from factorformer.tasks.data import Columns, check_lengths, sample
from factorformer.tasks.embeddings import Use
from factorformer.tasks.evaluation import LEAST_TEXTS, embed
from factorformer.tasks.reading import text_format
from factorformer.tasks.tables import column_names

TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"))
"""Names of text columns that are looked for where none are given."""

LABELS = ("label", "score")
"""Names of columns of labels that are looked for; the second beside pairs alone."""

MOST = 50_000
"""Rows of a file that are measured on: each text is compared with all others."""

INFERENCE = {"0", "1", "2"}
"""Labels of pairs that are numbers of classes rather than scores: entailment, neutral, contradiction."""


@dataclasses.dataclass(frozen=True)
class EmbeddingJob:
    """What is measured.

    Args:
        model: compressed, or any other.
        against: the original.
        data: files, or data sets of the Hub.
        text, label: columns, where they have other names than the usual ones.
        max_length: tokens after which texts are cut; None for what the original's directory says.
        device: where models run; None for a GPU if there is one.
        seed: of what is drawn.
    """

    model: str
    against: str
    data: Sequence[str]
    text: Sequence[str] | None
    label: str | None
    max_length: int | None
    device: str | None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Table:
    """A file: texts, or pairs of them, and what they are labelled with."""

    source: str
    columns: Columns
    texts: tuple[list[str], ...]
    labels: list[object] | None


class _Encoder:
    """A model and all that it takes to embed texts with it."""

    def __init__(self, name: str, device: str | None) -> None:
        self.name, self.path = name, find(name)
        self.config = read_config(self.path)
        if is_causal(self.config) or self.config.is_encoder_decoder:
            raise ModelError(f"'{name}' is no encoder: --against compares what embeddings of sentence encoders say")
        if head_labels(self.config) is not None:
            raise ModelError(
                f"'{name}' has a head, which scores texts or pairs itself: measure it by evaluate --data FILE --label "
                "COLUMN; --against is for encoders without one"
            )
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        self.layout, self.writing = find_pooling(self.path), read_writing(self.path)
        if self.writing.prompt:
            note(f"'{name}': texts begin with {self.writing.prompt!r}, as its directory says")
        self.device = device
        self.model: PreTrainedModel | None = None

    def load(self) -> PreTrainedModel:
        """The model, read once."""
        self.model = self.model or load_model(self.path, device=self.device)
        return self.model

    def embed(self, table: _Table, max_length: int, progress: Progress) -> tuple[Tensor, ...]:
        """`(rows, width)` of the texts, or of both texts of each pair."""
        model, found = self.load(), []
        for column, texts in zip(table.columns.text, table.texts, strict=True):
            rows = written(datasets.Dataset.from_dict({column: texts}), Columns((column,)), self.writing)
            encoded = encode_table(
                table.source, rows, Columns((column,)), self.tokenizer, None, max_length, self.config
            )
            if len(encoded) < len(texts):
                raise DataError(f"'{table.source}': the tokenizer of '{self.name}' makes no token of a text")
            check_lengths(model, encoded, f"'{table.source}'")
            phase = f"embed {Path(table.source).name} by {Path(self.name).name}"
            found.append(embed(model, self.tokenizer, encoded, pool=self.layout.pool, progress=progress, phase=phase))
            if not bool(found[-1].isfinite().all()):
                raise ModelError(f"embeddings of '{self.name}' are NaN or infinite")
        return tuple(found)


def evaluate_embeddings(job: EmbeddingJob) -> Result:
    """Measure two encoders on the same texts.

    Raises:
        ModelError: one of them is no encoder, or cannot be read.
        DataError: a file that cannot be read, or is too small to measure anything on.
    """
    tables = [_read(source, job.text, job.label, job.seed) for source in job.data]
    encoders = [_Encoder(name, job.device) for name in (job.against, job.model)]
    for one, other in (encoders, encoders[::-1]):
        if one.layout.pooling is None and other.layout.pooling is not None:
            note(f"'{one.name}' says nothing of pooling: pooled as '{other.name}' is")
            one.layout, one.writing = dataclasses.replace(one.layout, pooling=other.layout.pooling), other.writing
    longest = longest_of(encoders[0].path, encoders[0].config, job.max_length)
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with bars() as progress:
        for name, table in zip(short_names(job.data), tables, strict=True):
            before, after = (encoder.embed(table, longest, progress) for encoder in encoders)
            with about(table.source):
                metrics |= _flat(name, _uses(table, before, after, job.seed))
    seconds = {"evaluate": time.perf_counter() - started}
    original, model = (encoder.load() for encoder in encoders)
    whole = inventory(original.to(model.dtype), "all")  # pyright: ignore[reportArgumentType]
    costs = dataclasses.replace(inventory(model, "all"), before=whole.compressed)
    return Result.of(costs, metrics=metrics, seconds=seconds, seed=job.seed)


def _uses(table: _Table, before: tuple[Tensor, ...], after: tuple[Tensor, ...], seed: int) -> Mapping[str, Use]:
    if len(table.texts) == 2:
        assert table.labels is not None
        if (same := embeddings.same_class(table.labels)) is not None:
            note(f"'{table.source}': pairs of class '{same}' are taken to mean the same")
        return embeddings.pairs((before[0], before[1]), (after[0], after[1]), table.labels, seed)
    found = embeddings.kept(before[0], after[0], seed)
    return found if table.labels is None else found | embeddings.classes(before[0], after[0], table.labels, seed)


def _flat(name: str, uses: Mapping[str, Use]) -> dict[str, float]:
    """As metrics: of the original, of the model, and how far the second is from the first, each with its interval."""
    metrics: dict[str, float] = {}
    for measure, use in uses.items():
        parts = {BEFORE: use.original, "": use.compressed, "difference_": use.difference}
        for prefix, estimate in parts.items():
            if estimate is not None:
                key = f"{prefix}{name}_{measure}"
                metrics |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    return metrics


def _read(source: str, text: Sequence[str] | None, label: str | None, seed: int) -> _Table:
    """A table with the columns that are asked for, or that have the usual names."""
    if text_format(Path(source)) == ".txt":
        columns = Columns(("text",))
    else:
        names = column_names(source, note)
        texts = tuple(text or next((found for found in TEXTS if set(found) <= set(names)), ()))
        if not texts:
            usual = "; ".join(" and ".join(found) for found in TEXTS)
            raise DataError(
                f"'{source}' has the columns {', '.join(names)}, and none of the usual ones for texts ({usual}): name "
                "one, or the two of pairs, by --text"
            )
        usual = LABELS if len(texts) == 2 else LABELS[:1]
        columns = Columns(texts, label or next((found for found in usual if found in names), None))
    try:
        return _checked(source, columns, label, seed)
    except DataError as error:
        if len(columns.text) == 2 or label is not None or columns.label is None:
            raise
        found = _checked(source, dataclasses.replace(columns, label=None), label, seed)
        note(f"{error}; column '{columns.label}' is left out")
        return found


def _checked(source: str, columns: Columns, label: str | None, seed: int) -> _Table:
    """The table, all of whose cells can be measured on: what is wrong is said before hours of embedding."""
    rows = read_table(source, columns)
    if len(rows) > MOST:
        note(f"'{source}': measured on {MOST:,} of {len(rows):,} rows, drawn at random")
        rows = sample(rows, MOST, seed)
    if len(columns.text) == 2 and columns.label is None:
        raise DataError(f"'{source}' holds pairs of texts without labels: name their column by --label")
    if len(rows) < LEAST_TEXTS:
        raise DataError(
            f"'{source}' has {len(rows)} rows: give at least {LEAST_TEXTS}, whose similarities can be ranked"
        )
    if len(columns.text) == 2 and label is None and columns.label == LABELS[0]:
        _check_scores(source, rows[columns.label])
    texts_of = tuple([str(value) for value in rows[column]] for column in columns.text)
    labels = None if columns.label is None else _labels(source, rows, columns.label)
    if labels is not None:
        with about(source):
            (embeddings.check_pairs if len(columns.text) == 2 else embeddings.check_classes)(labels)
    return _Table(source, columns, texts_of, labels)


def _labels(source: str, rows: datasets.Dataset, column: str) -> list[object]:
    """Names, where a data set of the Hub numbers its classes."""
    labels, feature = list(rows[column]), class_label(rows.features[column])
    if any(isinstance(label, list) for label in labels):
        raise DataError(f"'{source}', column '{column}': lists of labels; give one label for each row")
    return [feature.int2str(label) for label in labels] if feature is not None else labels


def _check_scores(source: str, labels: Iterable[object]) -> None:
    """Raise `DataError` for labels that are numbers of three classes, unless the user has named their column."""
    if {str(label) for label in labels} == INFERENCE:
        raise DataError(
            f"'{source}': the labels 0, 1 and 2 look like numbers of classes of inference: if they are scores, say so "
            "by --label label; if not, leave the file out, or keep two classes of it"
        )
