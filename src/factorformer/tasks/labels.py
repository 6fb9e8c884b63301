"""What the labels of a task mean, and the ids that a model knows them by."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import datasets

from factorformer.errors import DataError
from factorformer.tasks.cells import NUMBER, check_labels, class_label
from factorformer.tasks.reading import described

Kind = Literal["classification", "regression", "multi_label", "tokens", "answers", "text"]

IGNORED = -100
"""The label of a token that has none."""

TASKS: dict[Kind, str] = {
    "classification": "one label a text",
    "regression": "a score for a text",
    "multi_label": "any number of labels a text (multi-label)",
    "tokens": "a label for every word",
    "answers": "the part of a context that answers a question",
    "text": "a text for each text",
}


@dataclasses.dataclass(frozen=True)
class Labels:
    """The meaning of the labels of a task.

    Args:
        kind: what is predicted: one of several classes of a text, a number, any number of classes of a text, a class of
            every word, a part of a context, or a text.
        names: class names in the order of their ids; empty where there are none.
    """

    kind: Kind
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: datasets.Dataset, column: str, kind: Kind | None = None) -> Labels:
        """Read the labels of training data.

        Unless a kind says otherwise, fractional numbers, also those written as strings, mean regression; lists mean
        several classes a text; objects are answers; everything else means classes.

        Args:
            rows: a table.
            column: where its labels are.
            kind: of the task, where it is known.

        Raises:
            DataError: fewer than two classes, a label that is missing or none of this kind, or values of several types.
        """
        check_labels(rows, column)
        values = list(rows[column])
        feature = class_label(rows.features[column])
        kind = kind or _kind(values, named=feature is not None)
        if kind in ("answers", "text", "regression"):
            labels = cls(kind)
            labels.ids(rows, column)  # which says what is no answer, no text, no number
            return labels
        cls(kind)._check_shape(values, column)
        if feature is not None:
            return cls(kind, tuple(feature.names))
        items = [item for value in values for item in (value if isinstance(value, list) else [value])]
        names = sorted({_name(item) for item in items}, key=_natural)
        if len(names) < (1 if kind == "multi_label" else 2):
            raise DataError(f"column '{column}' holds a single label {names}: nothing can be learned from it")
        return cls(kind, tuple(names))

    def ids(self, rows: datasets.Dataset, column: str) -> list[Any]:
        """Labels as the model wants them: an id, a number, a 0 or 1 for each class, or a list with an id for each word.

        Answers and texts are left as they are: where the one lie, and what tokens the others have, `data.encode` finds.

        Raises:
            DataError: a label that training has not seen, one that is missing, that is not a number in a regression
                task, or a list where the task has none, or the other way round.
        """
        check_labels(rows, column)
        values = list(rows[column])
        self._check_shape(values, column)
        if self.kind in ("answers", "text"):
            return values
        if self.kind == "regression":
            return [_number(value, row, column) for row, value in enumerate(values)]
        feature = class_label(rows.features[column])
        index = {name: i for i, name in enumerate(self.names)}
        unseen: dict[str, int] = {}

        def id_of(value: Any, row: int) -> int:
            raw = str(value) if feature is None else feature.names[value]
            name = raw if raw in index else _name(value) if feature is None else raw
            if name not in index:
                unseen.setdefault(name, row)
            return index.get(name, -1)

        found: list[Any] = [
            [id_of(item, row) for item in value] if isinstance(value, list) else id_of(value, row)
            for row, value in enumerate(values)
        ]
        if unseen:
            raise DataError(
                f"column '{column}' holds labels never seen in training: {list(unseen)[:5]}, first in "
                f"row {next(iter(unseen.values())) + 1}; known: {list(self.names)[:20]}"
            )
        if self.kind == "multi_label":
            return [[float(i in set(ids)) for i in range(len(self.names))] for ids in found]
        return found

    def _check_shape(self, values: Sequence[Any], column: str) -> None:
        kinds: dict[str, tuple[str, tuple[type, ...]]] = {
            "multi_label": ("a list", (list,)),
            "tokens": ("a list", (list,)),
            "answers": ("answers, or a text", (Mapping, str)),
            "text": ("a text", (str, int, float)),
        }
        belongs, types = kinds.get(self.kind, ("one value", (str, int, float)))
        wrong = next((row for row, value in enumerate(values) if not isinstance(value, types)), None)
        if wrong is not None:
            raise DataError(
                f"column '{column}', row {wrong + 1}: the task is {TASKS[self.kind]}: {belongs} belongs here, not "
                f"{described(values[wrong])}"
            )

    def __str__(self) -> str:
        shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        return shown or "a score"


def _kind(values: Sequence[Any], *, named: bool) -> Kind:
    """What labels mean by themselves; `named` ones are numbers of classes that have names."""
    if any(isinstance(value, Mapping) for value in values):
        return "answers"
    if any(isinstance(value, list) for value in values):
        return "multi_label"
    return "classification" if named or not _fractional(values) else "regression"


def _fractional(values: Sequence[Any]) -> bool:
    """Whether these are numbers, as such or written as strings, not all of them whole."""
    if all(isinstance(value, str) for value in values):
        if not all(NUMBER.fullmatch(value.strip()) for value in values):
            return False
        values = [float(value) for value in values]
    return any(isinstance(value, float) and not value.is_integer() for value in values)


def _number(value: Any, row: int, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"column '{column}', row {row + 1}: regression needs finite numbers, not {described(value)}")
    return number


def _name(value: object) -> str:
    """The name of a class; whole numbers have no decimal point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    whole = re.fullmatch(r"(-?\d+)\.0*", value) if isinstance(value, str) else None
    return whole[1] if whole else str(value)


def _natural(name: str) -> tuple[bool, float, str]:
    """Numbers in numeric order before words."""
    return (False, float(name), "") if re.fullmatch(r"-?\d+", name, re.ASCII) else (True, 0.0, name)
