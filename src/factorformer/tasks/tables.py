"""Tables of texts and labels, from local files or the Hub, and the columns that a task reads of them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.table import InMemoryTable

from factorformer.errors import DataError, one_line, one_of
from factorformer.tasks.cells import check_kind, check_label_cells, check_labels, check_texts, row_name
from factorformer.tasks.reading import COMPRESSED, SEPARATORS, TEXT_FORMATS, check_file, read_rows, text_format


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the text and the label.

    Args:
        text: one column, or two for pairs of sentences; cells are strings or numbers.
        label: the column of labels; None for plain text. Cells are names or numbers, or lists of these where a text has
            any number of labels.
        words: texts are lists of words, and labels lists with the label of every word.
    """

    text: tuple[str, ...]
    label: str | None = None
    words: bool = False

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.text, *([self.label] if self.label else [])]

    def check(self, rows: datasets.Dataset, source: object = "the data") -> None:
        """Raise `DataError` unless the table has these columns, and each of their cells is what it has to be."""
        present = {name: rows[name] for name in self.names if name in rows.column_names}
        self.check_cells(present, rows.column_names, str(source), row_name)
        if self.label is not None:
            check_labels(rows, self.label, str(source))

    def check_cells(
        self, cells: Mapping[str, Iterable[Any]], names: Sequence[str], source: str, where: Callable[[int], str]
    ) -> None:
        """As `check`, for columns of plain Python values.

        Args:
            cells: of the columns that are there.
            names: of all columns of the table.
            source: its name in messages.
            where: the place of a row in messages.
        """
        if not 1 <= len(self.text) <= (1 if self.words else 2):
            allowed = "of words" if self.words else ", or two for sentence pairs"
            raise DataError(f"give one text column{' ' * self.words}{allowed}; got {len(self.text)}")
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"column '{twice}' is named twice: texts and labels are columns of their own")
        for column in self.names:
            if column not in names:
                hint = next((text for mark, text in SEPARATORS.items() if mark in names[0]), "") if names else ""
                hint = f" (is it separated by {hint}? Then it is not what its name says)" if hint else ""
                raise DataError(f"{source} has no column {one_of(column, names)}{hint if len(names) == 1 else ''}")
        for column in self.text:
            check_texts(cells[column], source, column, where, self.words)
        if self.label is None:
            return
        check_label_cells(cells[self.label], source, self.label, where)
        for row, (text, label) in enumerate(zip(cells[self.text[0]], cells[self.label], strict=True)):
            if self.words and (not isinstance(label, list) or len(text) != len(label)):
                has = f"{len(label)} labels" if isinstance(label, list) else "a single label"
                raise DataError(f"{source}, {where(row)}, column '{self.label}': {len(text)} words, but {has}")


def read(
    source: str | os.PathLike[str],
    columns: Columns | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> datasets.Dataset:
    """Rows of a local file or of a data set on the Hub.

    Files are CSV (also separated by semicolons, tabs or bars), TSV (no quoting), JSONL, JSON, plain text (a text a
    line), any of these compressed (.gz, .bz2, .xz, .zst), or Parquet. Cells of CSV and TSV are strings.

    Args:
        source: a file name, or `NAME[:CONFIG]:SPLIT` on the Hub, e.g. `nyu-mll/glue:sst2:train`.
        columns: if given, only these are kept, and all their cells are checked.
        note: told if the encoding of a file had to be guessed.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed, a cell is not what its column is for, or the Hub
            cannot be reached or has no such data. The message names line or row, and column.
    """
    path = Path(source)
    if text_format(path) is None:
        rows = _parquet(path) if path.suffix.lower() == ".parquet" else _from_hub(str(source))
        if columns is not None:
            columns.check(rows, f"'{source}'")
        return rows
    check_file(path)
    wanted = None if columns is None else columns.names
    found = read_rows(path, wanted, note)
    count = len(next(iter(found.columns.values()), found.lines))
    lacking = columns is not None and not set(columns.names) <= set(found.names)
    if not found.names or (count == 0 and not lacking):
        raise DataError(f"'{path}' has no rows")
    if columns is not None:
        columns.check_cells(found.columns, found.names, f"'{path}'", found.where)
        for name in columns.text:
            values = found.columns[name]
            found.columns[name] = values if isinstance(values[0], list) else [str(value) for value in values]
    else:
        for name, values in found.columns.items():
            check_kind(values, f"'{path}'", name, found.where)
    try:
        return datasets.Dataset.from_dict(found.columns)
    except Exception as error:  # of Arrow, for cells that it has no type for
        raise DataError(f"cannot read '{path}': {one_line(error)}") from error


def column_names(source: str | os.PathLike[str], note: Callable[[str], None] = warnings.warn) -> list[str]:
    """The columns of what `read` reads, whatever their cells are.

    Raises:
        DataError: as `read`, but for cells.
    """
    path = Path(source)
    if text_format(path) is None:
        return read(source).column_names
    check_file(path)
    names = list(read_rows(path, (), note).names)
    if not names:
        raise DataError(f"'{path}' has no rows")
    return names


def _parquet(path: Path) -> datasets.Dataset:
    check_file(path)
    try:
        table = pyarrow.parquet.read_table(path)
        for i, field in enumerate(table.schema):
            if pyarrow.types.is_dictionary(field.type):  # a categorical column of pandas
                table = table.set_column(i, field.name, table[i].cast(field.type.value_type))
        rows = datasets.Dataset(InMemoryTable(table))
    except Exception as error:
        raise DataError(f"cannot read '{path}' as Parquet: {one_line(error)}") from error
    if len(rows) == 0:
        raise DataError(f"'{path}' has no rows")
    return rows


def _from_hub(source: str) -> datasets.Dataset:
    name, *rest = source.split(":")
    formats = f"{', '.join((*TEXT_FORMATS, '.parquet'))}; compressed {', '.join(COMPRESSED)}"
    if Path(source).exists():
        if not Path(source).is_file():
            check_file(Path(source))
        raise DataError(f"'{source}' is not a file of a kind that can be read ({formats}): save it as one of these")
    if len(rest) not in (1, 2):
        raise DataError(f"'{source}' is neither a file ({formats}) nor a data set on the Hub (NAME[:CONFIG]:SPLIT)")
    try:
        rows = datasets.load_dataset(name, *rest[:-1], split=rest[-1])
    except Exception as error:  # of the Hub's client, of HTTP, of readers
        raise DataError(f"cannot load '{source}' from the Hub: {one_line(error)}") from error
    assert isinstance(rows, datasets.Dataset)
    if len(rows) == 0:
        raise DataError(f"'{source}' has no rows")
    return rows
