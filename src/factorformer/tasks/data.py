"""Labelled and plain text: from local files or the Hub, through `datasets`, to batches of token ids."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError, one_of
from factorformer.hf.source import most_tokens

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without quoting: a quote in a sentence is a quote. Empty and "NA" fields are text, not missing numbers. Without an
    # index: pandas would take surplus fields for one and shift all columns.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False, "index_col": False}),
    ".csv": ("csv", {"keep_default_na": False, "index_col": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {}),
}


def read(source: str | os.PathLike[str]) -> datasets.Dataset:
    """Rows of a local TSV (no quoting), CSV, JSONL or plain text file, or of a data set on the Hub.

    Args:
        source: a file name, or `NAME[:CONFIG]:SPLIT` on the Hub, e.g. `nyu-mll/glue:sst2:train`.

    Raises:
        DataError: the file is missing, unreadable or empty, or the Hub cannot be reached or has no such data.
    """
    path = Path(source)
    if path.suffix.lower() not in READERS:
        return _from_hub(str(source))
    if not path.is_file():
        raise DataError(f"no such data file: '{path}'")
    builder, options = READERS[path.suffix.lower()]
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if path.stat().st_size == 0:
            raise DataError(f"'{path}' is empty")
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except DataError:
        raise
    except Exception as error:  # readers raise many types, all of which mean a malformed file
        raise DataError(f"cannot read '{path}' as {path.suffix[1:].upper()}: {error.__cause__ or error}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    if not isinstance(rows, datasets.Dataset) or len(rows) == 0:
        raise DataError(f"'{path}' has no rows")
    return rows


def _from_hub(source: str) -> datasets.Dataset:
    name, *rest = source.split(":")
    if len(rest) not in (1, 2):
        raise DataError(
            f"'{source}' is neither a file ({', '.join(READERS)}) nor a data set on the Hub (NAME[:CONFIG]:SPLIT)"
        )
    try:
        rows = datasets.load_dataset(name, *rest[:-1], split=rest[-1])
    except Exception as error:
        raise DataError(f"cannot load '{source}' from the Hub: {error}") from error
    assert isinstance(rows, datasets.Dataset)
    return rows


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the text (one, or a pair of sentences) and the label (None: plain text)."""

    text: tuple[str, ...]
    label: str | None = None

    def check(self, rows: datasets.Dataset, source: object = "the data") -> None:
        """Raise `DataError` unless the table has these columns."""
        if not 1 <= len(self.text) <= 2:
            raise DataError(f"give one text column, or two for sentence pairs; got {len(self.text)}")
        for column in [*self.text, *([self.label] if self.label else [])]:
            if column not in rows.column_names:
                raise DataError(f"{source} has no column {one_of(column, rows.column_names)}")


@dataclasses.dataclass(frozen=True)
class Labels:
    """The meaning of the labels of a task.

    Args:
        kind: what is predicted: one of several classes, or a number.
        names: class names in the order of their ids; empty for regression.
    """

    kind: Literal["classification", "regression"]
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: datasets.Dataset, column: str, regression: bool = False) -> Labels:
        """Read the labels of training data: fractional numbers mean regression, everything else classes.

        Args:
            rows: a table.
            column: where its labels are.
            regression: whole numbers are scores as well.

        Raises:
            DataError: fewer than two classes, or a label that is missing.
        """
        feature = rows.features[column]
        values = rows[column]
        if isinstance(feature, datasets.ClassLabel) and not regression:
            return cls("classification", tuple(feature.names))
        if any(value is None for value in values):
            raise DataError(f"column '{column}' has rows without a label")
        if regression or any(isinstance(value, float) and not value.is_integer() for value in values):
            return cls("regression")
        names = sorted({_name(value) for value in values}, key=_natural)
        if len(names) < 2:
            raise DataError(f"column '{column}' holds a single label {names}: nothing can be learned from it")
        return cls("classification", tuple(names))

    def ids(self, rows: datasets.Dataset, column: str) -> list[int] | list[float]:
        """Labels as the model wants them.

        Raises:
            DataError: a label that training has not seen, or that is not a number in a regression task.
        """
        if self.kind == "regression":
            try:
                numbers = [float(value) for value in rows[column]]
            except (TypeError, ValueError) as error:
                raise DataError(f"column '{column}' must hold numbers for regression: {error}") from error
            if not all(map(math.isfinite, numbers)):
                raise DataError(f"column '{column}' holds NaN or infinite numbers")
            return numbers
        feature = rows.features[column]
        known = feature.names if isinstance(feature, datasets.ClassLabel) else None
        names = [_name(value) if known is None else known[value] for value in rows[column]]
        index = {name: i for i, name in enumerate(self.names)}
        unseen = sorted(set(names) - index.keys())
        if unseen:
            raise DataError(
                f"column '{column}' holds labels never seen in training: {unseen[:5]}; known: {list(self.names)[:20]}"
            )
        return [index[name] for name in names]

    def __str__(self) -> str:
        shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        return shown or "a score"


def _name(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _natural(name: str) -> tuple[bool, float, str]:
    """Numbers in numeric order before words."""
    return (False, float(name), "") if name.lstrip("-").isdigit() else (True, 0.0, name)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    columns: Columns,
    labels: Labels | None = None,
    max_length: int = 128,
) -> datasets.Dataset:
    """Token ids of every row, with `labels` where the task has them, and `length` for bucketing.

    Args:
        tokenizer: of the model.
        rows: a table.
        columns: where its texts and labels are.
        labels: read from the training data; None for plain text.
        max_length: longer inputs are cut.

    Raises:
        DataError: a missing column or text, or labels that do not fit.
    """
    columns.check(rows)
    texts = [_texts(rows, column) for column in columns.text]
    encoded = tokenizer(texts[0], texts[1] if len(texts) > 1 else None, truncation=True, max_length=max_length)
    content: dict[str, Any] = {key: encoded[key] for key in encoded if key in tokenizer.model_input_names}
    content["length"] = [len(ids) for ids in content["input_ids"]]
    if labels is not None and columns.label is not None:
        content["labels"] = labels.ids(rows, columns.label)
    return datasets.Dataset.from_dict(content)


def _texts(rows: datasets.Dataset, column: str) -> list[str]:
    values = rows[column]
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(f"column '{column}' has no text in row {missing + 1} of {len(rows)}")
    return [str(value) for value in values]


def batches(
    tokenizer: PreTrainedTokenizerBase, data: datasets.Dataset, batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of encoded rows, sorted by length so that little is padded; the order is not that of the rows."""
    for _, batch in indexed_batches(tokenizer, data, batch_size):
        yield batch


def indexed_batches(
    tokenizer: PreTrainedTokenizerBase, data: datasets.Dataset, batch_size: int = 32
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """As `batches`, with the row numbers of each batch."""
    collate = DataCollatorWithPadding(tokenizer)
    lengths: Sequence[int] = data["length"]
    order = sorted(range(len(data)), key=lambda row: lengths[row], reverse=True)
    inputs = data.remove_columns("length")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, dict(collate([inputs[row] for row in chosen]))


def sample(data: datasets.Dataset, rows: int, seed: int = 0) -> datasets.Dataset:
    """At most `rows` rows, drawn without replacement."""
    if rows >= len(data):
        return data
    generator = torch.Generator().manual_seed(seed)
    return data.select(torch.randperm(len(data), generator=generator)[:rows].tolist())


def check_lengths(model: PreTrainedModel, data: datasets.Dataset, source: str = "the data") -> None:
    """Raise `DataError` if a row is longer than a model with a table of positions can read.

    Args:
        model: dense or compressed; models with rotary or relative positions read anything.
        data: from `data.encode`.
        source: the data's name in the message.
    """
    positions = most_tokens(model)
    longest = max(data["length"])
    if positions is not None and longest > positions:
        raise DataError(
            f"{source} holds a text of {longest} tokens, and the model has {positions} positions: "
            f"cut texts with a --max-length of at most {positions}"
        )
