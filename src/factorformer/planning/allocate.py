"""Allocation of a budget of bytes to matrices."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import torch

from factorformer.errors import BudgetError
from factorformer.layers.matrix import Cost, Matrix, Role, total
from factorformer.planning.plan import Cause, Entry, Unit, left_dense
from factorformer.structures import Shape, Structure

AllocationName = Literal["uniform", "by_role", "by_loss", "dynamic"]
TOLERANCE = 0.01
"""How far the cost of a plan may be from the budget, relative to it."""

NEAR = 0.03
"""How far dense int8 may stay above a budget: scales, biases and norms make it a little less than 4 times smaller, and
to factorize all matrices for the sake of that would lose far more."""

KEPT = "the budget allows the dense matrix"
NO_SIZE = "no smaller size fits the structure"

Chosen = TypeVar("Chosen")

RANKS: Mapping[Role, int] = {"attention": 1, "feed_forward": 2, "embedding": 6}
"""Ranks of the roles in relation to each other, where ranks go by role."""


Sizes = Callable[[Matrix], Iterable[Structure]]
"""The specs that a matrix can have, in order of growing bytes, all below those of the dense matrix."""


def candidates_of(structure: type[Structure], multiple: int = 1) -> Sizes:
    """The sizes that a structure proposes where nothing is known of a matrix but its shape.

    Args:
        structure: what matrices become.
        multiple: of ranks, where a rank is a side of a dense product.
    """

    @functools.cache  # a model has many matrices of few shapes
    def of(shape: Shape, values: torch.dtype) -> tuple[Structure, ...]:
        return tuple(spec for spec in structure.candidates(shape, values) if spec.is_multiple(multiple))

    return lambda matrix: of(matrix.shape, matrix.values)


def uniform(matrices: Sequence[Matrix], sizes: Sizes, ratio: float, rest: Cost) -> tuple[Entry, ...]:
    """Give every matrix the same fraction of its own dense bytes.

    In int8 the largest size of a matrix is the dense one in int8, so that smaller ratios than this gives are exceeded.
    Sizes are whole numbers, so what rounding leaves over goes, one step at a time, to the matrices that stand furthest
    below the common fraction.

    Args:
        matrices: all matrices in scope; those that must stay dense count at full price.
        sizes: what the others can become.
        ratio: bytes of everything in scope over the bytes it may take.
        rest: cost of the other tensors in scope.

    Raises:
        BudgetError: the ratio cannot be met within `TOLERANCE`; the message names the nearest that can.
    """
    return _allocate(matrices, sizes, ratio, rest, _same_fraction)


def by_role(matrices: Sequence[Matrix], sizes: Sizes, ratio: float, rest: Cost) -> tuple[Entry, ...]:
    """Small ranks for attention, higher ranks for embeddings, feed-forward matrices in between.

    Ranks stand in the relation of `RANKS`, but factorized embeddings together stay smaller than the rest of the model,
    as in Shapeshifter (Panahi, Saeedi and Arodz, NeurIPS 2021), unless the rest is dense already and the budget not
    spent. The numbers of that relation are our choice.

    Args:
        matrices, sizes, ratio, rest: as for `uniform`.

    Raises:
        BudgetError: as for `uniform`.
    """

    def fill(ladders: dict[str, _Ladder], budget: float) -> dict[str, int]:
        dense = rest.bytes + sum(m.cost(None).bytes for m in matrices if m.dense is not None)
        return _ranks_by_role(ladders, budget, dense)

    return _allocate(matrices, sizes, ratio, rest, fill)


def _allocate(
    matrices: Sequence[Matrix],
    sizes: Sizes,
    ratio: float,
    rest: Cost,
    fill: Callable[[dict[str, _Ladder], float], dict[str, int]],
) -> tuple[Entry, ...]:
    """The entries that `fill` chooses for the bytes that are left for the matrices that can be factorized."""
    ladders = {m.name: _Ladder(m, sizes) for m in matrices if m.dense is None}
    if not any(ladder.bytes[0] < ladder.dense for ladder in ladders.values()):
        _check_ratio(ratio)
        raise BudgetError("no matrix in scope can be factorized; see the plan's reasons or widen include and scope")
    fixed = rest.bytes + total(m.cost(None) for m in matrices if m.dense is not None).bytes

    def spend(budget: float) -> tuple[dict[str, int], int]:
        steps = fill(ladders, budget - fixed)
        return steps, fixed + _bytes(ladders, steps)

    steps = meet(
        spend,
        ratio,
        original=total(m.cost(None) for m in matrices).bytes + rest.bytes,
        smallest=fixed + sum(ladder.bytes[0] for ladder in ladders.values()),
        largest=fixed + sum(ladder.bytes[-1] for ladder in ladders.values()),
        fixed=fixed,
        stays=[Entry.whole(m) for m in matrices if m.dense is not None],
    )
    return tuple(_entry(m, ladders.get(m.name), steps.get(m.name, 0)) for m in matrices)


def meet(
    fill: Callable[[float], tuple[Chosen, float]],
    ratio: float,
    *,
    original: float,
    smallest: float,
    largest: float,
    fixed: float,
    stays: Sequence[Entry],
    unit: Unit = "bytes",
    exceeding: bool = False,
) -> Chosen:
    """What `fill` makes of the budget `original / ratio`, if that meets it; all dense in int8 where that nearly does.

    Args:
        fill: gives a choice for a budget, and what the choice costs.
        ratio: cost of everything in scope over what it may cost.
        original: that cost.
        smallest, largest: the least and the most that `fill` can make it cost.
        fixed: what of it has to stay as it is.
        stays: the matrices that have to stay dense.
        unit: of costs.
        exceeding: whether greater ratios than the one asked for will do, as where int8 loses next to nothing.

    Raises:
        BudgetError: the ratio cannot be met within `TOLERANCE`; the message names the nearest that can.
    """
    _check_ratio(ratio)
    most = original / smallest if smallest else 1.0
    if smallest > original / ratio * (1 + TOLERANCE):
        reasons = "; ".join(left_dense(stays, round(original))) if unit == "bytes" else ""
        number = ",.0f" if unit != "milliseconds" else ",.3g"
        raise BudgetError(
            f"ratio {ratio:g} cannot be met: at the smallest size of every matrix the ratio is {most:.4g}, and "
            f"{fixed:{number}} of {original:{number}} {unit} in scope stay as they are"
            f"{f' ({reasons})' if reasons else ''}; ask for at most {most:.4g}"
        )

    if largest < original and largest <= original / ratio * (1 + NEAR):  # all dense in int8
        return fill(largest)[0]

    def attempt(ratio: float) -> tuple[Chosen, float, bool]:
        chosen, cost = fill(max(original / ratio, smallest))
        reached = original / cost if cost else ratio
        return chosen, reached, abs(ratio / reached - 1) <= TOLERANCE or (exceeding and reached > ratio)

    chosen, reached, met = attempt(ratio)
    if not met:
        # What is reached here need not be reached again from there: the named ratio is one that was tried.
        for _ in range(50):
            near = float(f"{reached:.4g}")
            _, reached, met = attempt(near)
            if met:
                break
        else:
            near = most
        raise BudgetError(f"ratio {ratio:g} cannot be met within {TOLERANCE:.0%} in {unit}; the nearest is {near:.4g}")
    return chosen


def _check_ratio(ratio: float) -> None:
    if not ratio >= 1:
        raise BudgetError(f"ratio must be at least 1 (original bytes / compressed bytes), got {ratio}")


class _Ladder:
    """The sizes that a matrix can have, in growing bytes; the last step is dense, in int8 if the matrix is to be."""

    def __init__(self, matrix: Matrix, sizes: Sizes) -> None:
        whole = Entry.whole(matrix)
        self.role: Role = matrix.role
        self.dense = whole.original.bytes
        sized = sorted(((matrix.bytes(spec), spec) for spec in sizes(matrix)), key=lambda pair: pair[0])
        smaller = [(size, spec) for size, spec in sized if size < whole.compressed.bytes]
        self.specs = [spec for _, spec in smaller]
        self.bytes = [*(size for size, _ in smaller), whole.compressed.bytes]

    def below(self, fraction: float) -> int:
        """The largest step whose bytes stay within a fraction of the dense bytes; step 0 if none does."""
        return max(bisect.bisect_right(self.bytes, fraction * self.dense) - 1, 0)

    def full(self, step: int) -> bool:
        """Whether this is the last step: the dense matrix."""
        return step + 1 == len(self.bytes)

    def next_step(self, step: int) -> float:
        """Bytes that the next size takes beyond this one; infinite at the last."""
        return self.bytes[step + 1] - self.bytes[step] if step + 1 < len(self.bytes) else math.inf


def _same_fraction(ladders: dict[str, _Ladder], budget: float) -> dict[str, int]:
    """Steps of all ladders for a budget: the largest common fraction of dense bytes, and what that leaves over."""

    def steps_of(fraction: float) -> dict[str, int]:
        return {name: ladder.below(fraction) for name, ladder in ladders.items()}

    fraction = _largest(lambda fraction: _bytes(ladders, steps_of(fraction)) <= budget, 1.0)
    return _spend_rest(ladders, steps_of(fraction), budget)


def _ranks_by_role(ladders: dict[str, _Ladder], budget: float, dense: int) -> dict[str, int]:
    """Steps of all ladders for a budget: the largest common multiple of `RANKS`, and what that leaves over.

    Args:
        ladders: of all matrices that can be factorized.
        budget: bytes they may take.
        dense: bytes of everything else in scope.
    """
    embeddings = {name: ladder for name, ladder in ladders.items() if ladder.role == "embedding"}
    others = {name: ladder for name, ladder in ladders.items() if ladder.role != "embedding"}
    most = float(max(len(ladder.bytes) for ladder in ladders.values()))

    def at(multiple: float, group: dict[str, _Ladder]) -> dict[str, int]:
        ranks = {name: int(multiple * RANKS[ladder.role]) for name, ladder in group.items()}
        return {name: min(max(rank - 1, 0), len(group[name].bytes) - 1) for name, rank in ranks.items()}

    def steps_of(multiple: float) -> dict[str, int]:
        steps = at(multiple, others)
        most_embeddings = _bytes(others, steps) + dense
        lower = _largest(lambda lower: _bytes(embeddings, at(lower, embeddings)) < most_embeddings, multiple)
        return steps | at(lower, embeddings)

    steps = steps_of(_largest(lambda multiple: _bytes(ladders, steps_of(multiple)) <= budget, most))
    if all(ladder.full(steps[name]) for name, ladder in others.items()):
        left = budget - _bytes(others, steps)
        steps |= at(_largest(lambda multiple: _bytes(embeddings, at(multiple, embeddings)) <= left, most), embeddings)
        return steps | _spend_rest(embeddings, steps, left) if embeddings else steps
    return steps | _spend_rest(others, steps, budget - _bytes(embeddings, steps))


def _largest(fits: Callable[[float], bool], high: float) -> float:
    """The largest number from 0 to `high` that fits, if smaller ones fit as well; 0 if none does."""
    if fits(high):
        return high
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bytes(ladders: dict[str, _Ladder], steps: dict[str, int]) -> int:
    return sum(ladder.bytes[steps[name]] for name, ladder in ladders.items())


def _spend_rest(ladders: dict[str, _Ladder], steps: dict[str, int], budget: float) -> dict[str, int]:
    """Give what is left of a budget away one step at a time, first to those with the smallest part of their bytes."""
    steps = {name: steps[name] for name in ladders}
    left = budget - _bytes(ladders, steps)
    for name, ladder in sorted(ladders.items(), key=lambda item: item[1].bytes[steps[item[0]]] / item[1].dense):
        if ladder.next_step(steps[name]) <= left:
            left -= ladder.next_step(steps[name])
            steps[name] += 1
    # All steps fit below the budget; one more may come nearer to it.
    step, _, name = min(
        ((ladder.next_step(steps[n]), ladder.bytes[steps[n]] / ladder.dense, n) for n, ladder in ladders.items())
    )
    if step < 2 * left:
        steps[name] += 1
    return steps


def _entry(matrix: Matrix, ladder: _Ladder | None, step: int) -> Entry:
    if ladder is None:
        return Entry.whole(matrix)
    if not ladder.specs:
        return Entry.whole(matrix, NO_SIZE, Cause.UNABLE)
    if ladder.full(step):
        return Entry.whole(matrix, KEPT)
    return Entry(matrix, ladder.specs[step], f"{matrix.role}: {ladder.bytes[step] / ladder.dense:.1%} of its bytes")


Allocate = Callable[[Sequence[Matrix], Sizes, float, Cost], tuple[Entry, ...]]

ALLOCATIONS: Mapping[AllocationName, Allocate | None] = {
    "uniform": uniform,
    "by_role": by_role,
    "dynamic": uniform,
    "by_loss": None,
}
"""Every way to divide a budget. Training moves sizes on from where `dynamic` starts; None is for what needs evidence of
the model, `evidence.prediction.plan_by_loss`."""
