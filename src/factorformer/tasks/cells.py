"""What cells of a table may hold: texts, lists of words, labels; every error names row and column."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import datasets

from factorformer.errors import DataError
from factorformer.tasks.reading import described, kind_of

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
"""A number that is written as text."""

NO_NUMBER = {"nan", "inf", "infinity", "na", "n/a", "null", "none"}
"""What programs write, in any case and with any sign, where a number is missing."""


ANSWERS = ("text", "answer_start")
"""What the answers to a question are said by: lists of texts, and of where they begin in the context."""


def row_name(row: int) -> str:
    """The place of a row of a table in messages."""
    return f"row {row + 1}"


def class_label(feature: Any) -> datasets.ClassLabel | None:
    """The classes of a column of labels, or of lists of these, that the data set itself names."""
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return inner if isinstance(inner, datasets.ClassLabel) else None


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_storable(value: object, place: str) -> None:
    """Raise `DataError` for what JSON can say and no table can hold."""
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{place}: half of a surrogate pair, which is no character")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError(f"{place}: a whole number of more than 64 bits")


def check_texts(values: Iterable[Any], source: str, column: str, where: Callable[[int], str], words: bool) -> None:
    """Raise `DataError` unless all cells are texts or numbers, or all are lists of words.

    Args:
        values: the cells of a column.
        source: the table's name in messages.
        column: the column's name in messages.
        where: the place of a row in messages.
        words: whether cells are lists of words.
    """
    for row, value in enumerate(values):
        place = f"{source}, {where(row)}, column '{column}'"
        if _missing(value):
            raise DataError(f"{place}: no text")
        for item in value if isinstance(value, list) else [value]:
            _check_storable(item, place)
        if words:
            wrong = [word for word in value if not isinstance(word, str)] if isinstance(value, list) else [value]
            if wrong:
                raise DataError(f"{place}: a list of words belongs here, not {described(wrong[0])}")
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            advice = (
                " (if these are words with a label each, say --task token-classification)"
                if isinstance(value, list)
                else ""
            )
            raise DataError(f"{place}: a text belongs here, not {described(value)}{advice}")


def check_label_cells(values: Iterable[Any], source: str, column: str, where: Callable[[int], str]) -> None:
    """Raise `DataError` unless all cells are names or numbers, lists of these, or answers; arguments as above."""
    if isinstance(next(iter(values), None), Mapping):
        check_answers(values, source, column, where)
        return
    for row, value in enumerate(values):
        for item in value if isinstance(value, list) else [value]:
            place = f"{source}, {where(row)}, column '{column}'"
            if _missing(item) or (isinstance(item, str) and not item.strip()):
                raise DataError(f"{place}: no label")
            if not isinstance(item, str | int | float):
                raise DataError(f"{place}: a name or a number belongs here, not {described(item)}")
            if isinstance(item, float) and math.isinf(item):
                raise DataError(f"{place}: an infinite number is no label")
            _check_storable(item, place)
    check_kind(values, source, column, where)
    _check_numbers(values, source, column, where)


def check_answers(values: Iterable[Any], source: str, column: str, where: Callable[[int], str]) -> None:
    """Raise `DataError` unless all cells are answers as SQuAD writes them, none among them; arguments as above."""
    for row, value in enumerate(values):
        fields = [value.get(name) for name in ANSWERS] if isinstance(value, Mapping) else [None, None]
        texts, starts = ([None] if not isinstance(field, list) else field for field in fields)
        right = all(isinstance(t, str) and t for t in texts) and all(isinstance(s, int) and s >= 0 for s in starts)
        if not right or len(texts) != len(starts):
            raise DataError(
                f"{source}, {where(row)}, column '{column}': answers are an object of two lists of equal length, "
                f"{' and '.join(ANSWERS)}; got {described(value)}"
            )


def _check_numbers(values: Iterable[Any], source: str, column: str, where: Callable[[int], str]) -> None:
    """Raise `DataError` if all labels are numbers written as text, but for some that say that there is none."""
    texts = [value.strip() if isinstance(value, str) else "" for value in values]
    missing = [text.lstrip("+-").lower() in NO_NUMBER for text in texts]
    numbers = [bool(NUMBER.fullmatch(text)) for text in texts]
    if any(missing) and any(numbers) and all(map(operator.or_, missing, numbers)):
        row = missing.index(True)
        raise DataError(f"{source}, {where(row)}, column '{column}': no label ({texts[row]!r} among numbers)")


def check_kind(values: Iterable[Any], source: str, column: str, where: Callable[[int], str]) -> None:
    """Raise `DataError` if values of a column are of several types; None is of all."""
    first: tuple[str, int] | None = None
    for row, value in enumerate(values):
        for item in value if isinstance(value, list) else [value]:
            kind = kind_of(item) + (" in a list" if isinstance(value, list) else "")
            if item is None:
                continue
            first = first or (kind, row)
            if kind != first[0]:
                raise DataError(
                    f"{source}, {where(row)}, column '{column}': {described(item)}, but {where(first[1])} holds "
                    f"{first[0]}: a column holds values of one type"
                )


def check_labels(rows: datasets.Dataset, column: str, source: str = "the data") -> None:
    """Raise `DataError` unless every row has a label, and all are of one type."""
    check_label_cells(rows[column], source, column, row_name)
    feature = class_label(rows.features[column])
    classes = 0 if feature is None else len(feature.names)
    for row, cell in enumerate(rows[column] if classes else ()):
        for value in cell if isinstance(cell, list) else [cell]:
            if not 0 <= value < classes:
                what = "no label (-1)" if value == -1 else f"label {value}"
                raise DataError(
                    f"{source}, {row_name(row)}, column '{column}': {what}; classes are numbered 0 to {classes - 1}"
                )
