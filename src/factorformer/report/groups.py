"""Matrices of the same role in all layers as one line: models of many layers have hundreds of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from factorformer.layers.matrix import Cost, Shape, total
from factorformer.planning import Entry

PLACE = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer, or of an expert, in a name."""

NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices with names, shapes and kinds of structure alike.

    Args:
        name: of them all: numbers of layers are `*`, or the ranges of those that are meant, as in `layers.[0-3,7].up`.
        shape: of each.
        form: how they are stored; where numbers differ, from the smallest to the largest.
        note: the reason that all of them have; empty where they have several.
        count: how many they are.
        original, compressed: what they cost together.
    """

    name: str
    shape: Shape
    form: str
    note: str
    count: int
    original: Cost
    compressed: Cost


def grouped(entries: Iterable[Entry]) -> list[Group]:
    """The matrices of a plan by role, in the order of the first of each."""
    alike: dict[tuple[object, ...], list[Entry]] = {}
    places: dict[str, set[int]] = {}
    for entry in entries:
        pattern = PLACE.sub("*", " = ".join([entry.matrix.name, *entry.matrix.aliases]))
        kind = NUMBER.sub("#", entry.form)
        alike.setdefault((pattern, entry.matrix.shape, kind, entry.values), []).append(entry)
        places.setdefault(pattern, set()).update(_layers(entry))
    return [_group(pattern, several, places[str(pattern)]) for (pattern, *_), several in alike.items()]


def alone(entries: Iterable[Entry]) -> list[Group]:
    """Each matrix of a plan by itself."""
    return [_group("", [entry], set()) for entry in entries]


def _layers(entry: Entry) -> list[int]:
    """The first number in a name, of the layer."""
    return [int(number) for number in PLACE.findall(entry.matrix.name)[:1]]


def _group(pattern: object, entries: Sequence[Entry], places: set[int]) -> Group:
    name, mine = str(pattern), {place for entry in entries for place in _layers(entry)}
    if len(entries) == 1:
        name = " = ".join([entries[0].matrix.name, *entries[0].matrix.aliases])
    elif mine != places:
        name = name.replace("*", f"[{ranges(mine)}]", 1)
    notes = {entry.reason for entry in entries}
    return Group(
        name,
        entries[0].matrix.shape,
        spread([entry.form for entry in entries]),
        notes.pop() if len(notes) == 1 else "",
        len(entries),
        total(entry.original for entry in entries),
        total(entry.compressed for entry in entries),
    )


def ranges(numbers: Iterable[int]) -> str:
    """Numbers from small to large, those that follow on each other as a range.

    >>> ranges([7, 0, 1, 2, 9, 10])
    '0-2,7,9-10'
    """
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)


def spread(texts: Sequence[str]) -> str:
    """Texts that differ in numbers alone as one, with the smallest and the largest of each.

    >>> spread(["low_rank(rank=12), int8", "low_rank(rank=7), int8"])
    'low_rank(rank=7 to 12), int8'
    """
    words, found = NUMBER.split(texts[0]), [NUMBER.findall(text) for text in texts]
    numbers = [min(column, key=int) for column in zip(*found, strict=True)]
    largest = [max(column, key=int) for column in zip(*found, strict=True)]
    between = [low if low == high else f"{low} to {high}" for low, high in zip(numbers, largest, strict=True)]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(words, between, fillvalue="")))
