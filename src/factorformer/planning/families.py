"""Choice among the size trade-offs of a structure, by cheap fits of a few matrices."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from factorformer.layers.matrix import Matrix
from factorformer.planning.plan import Entry
from factorformer.structures import Structure

LARGE = 2**20
"""Entries beyond which one matrix of a group, the middle one, is fitted to choose for all of them; it is the first, the
middle and the last of smaller ones."""

LIKE = 1.05
"""Bytes within a group, as a multiple of the smallest: what allocations give differs by a step even among equals."""


WORTH = 1e-3
"""Part by which squared errors differ at least for one to be smaller: less than that is the rounding of a machine."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The sizes that a matrix should choose among, and why.

    Args:
        ladder: specs in order of growing bytes.
        reason: human-readable.
    """

    ladder: tuple[Structure, ...]
    reason: str


def choose_families(
    entries: Sequence[Entry],
    error: Callable[[Matrix, Structure], float],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Choice]:
    """For each matrix, the family of its structure that fits best within the bytes it was given.

    Matrices of one shape, role and size are one group and get one family: the one whose largest spec within those bytes
    leaves the smallest sum of squared relative errors on up to three of them. Errors are taken to have one minimum
    along the families: the search walks downhill from the family nearest to the spec that the matrix was given.

    Args:
        entries: an allocation over the candidates of a structure.
        error: the relative error of a fit of a matrix.
        progress: called with the number of fits done.

    Returns:
        Choices by name of the matrix; none for those that stay dense, or have no more than one family.
    """
    choices: dict[str, Choice] = {}
    done = 0

    def measured(matrix: Matrix, spec: Structure) -> float:
        nonlocal done
        found = error(matrix, spec)
        done += 1
        if progress is not None:
            progress(done)
        return found

    for group in _groups(entries):
        first = group[0]
        assert first.spec is not None
        dtype, shape = first.matrix.values, first.matrix.shape
        budget = max(entry.compressed.bytes for entry in group)
        ladders, specs = [], []
        for family in first.spec.families(shape, dtype):
            sizes = [first.matrix.bytes(spec) for spec in family]
            place = bisect.bisect_right(sizes, budget)
            if place:
                ladders.append(tuple(family))
                specs.append(family[place - 1])
        if len(ladders) < 2:
            continue
        samples = [group[len(group) // 2]]
        if math.prod(shape) <= LARGE:
            samples = [group[i] for i in sorted({0, len(group) // 2, len(group) - 1})]
        errors: dict[int, float] = {}

        def squares(index: int, specs=specs, samples=samples, errors=errors) -> float:
            if index not in errors:
                errors[index] = sum(measured(entry.matrix, specs[index]) ** 2 for entry in samples)
            return errors[index]

        best = _descend(squares, _nearest(specs, first.spec, first.matrix), len(specs))
        least = (errors[best] / len(samples)) ** 0.5
        reason = f"{_differences(specs, best)} left the least error, {least:.2g}, of {len(errors)} such sizes tried"
        choices |= {entry.matrix.name: Choice(ladders[best], reason) for entry in group}
    return choices


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries whose matrices are alike, in the order of the model."""
    order = {entry.matrix.name: place for place, entry in enumerate(entries)}
    alike: dict[object, list[Entry]] = {}
    for entry in entries:
        if entry.spec is not None:
            matrix = entry.matrix
            alike.setdefault((type(entry.spec), matrix.shape, matrix.dtype, matrix.role), []).append(entry)
    groups: list[list[Entry]] = []
    for members in alike.values():
        smallest = 0.0
        for entry in sorted(members, key=lambda entry: entry.compressed.bytes):
            if entry.compressed.bytes > LIKE * smallest:
                groups.append([])
                smallest = entry.compressed.bytes
            groups[-1].append(entry)
    return [sorted(group, key=lambda entry: order[entry.matrix.name]) for group in groups]


def _nearest(specs: Sequence[Structure], spec: Structure, matrix: Matrix) -> int:
    """The spec that spends its bytes most as another one does: by the part of the factor named `weight`."""

    def part(spec: Structure) -> float:
        sizes = spec.tensors(matrix.shape)
        return sizes["weight"].bytes(torch.float32) / spec.bytes(matrix.shape)

    return min(range(len(specs)), key=lambda index: abs(part(specs[index]) - part(spec)))


def _descend(value: Callable[[int], float], start: int, count: int) -> int:
    """The place of the smallest value among `count`, if values fall towards it from both sides; of equals the nearest.

    >>> _descend(lambda i: abs(i - 9), 2, 12)
    9
    """
    best = start
    for direction in (-1, 1):
        while 0 <= best + direction < count and value(best + direction) < (1 - WORTH) * value(best):
            best += direction
        if best != start:
            break
    return best


def _differences(specs: Sequence[Structure], index: int) -> str:
    """The fields of a spec in which it differs from others."""
    fields = [spec.to_dict() for spec in specs]
    return ", ".join(f"{k}={v}" for k, v in fields[index].items() if any(other[k] != v for other in fields))
