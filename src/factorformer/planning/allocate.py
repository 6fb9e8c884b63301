"""Who gets how much of the budget."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal

import torch

from factorformer.errors import BudgetError
from factorformer.planning.cost import Cost, Matrix, total
from factorformer.planning.plan import Entry, left_dense
from factorformer.structures import Structure

AllocationName = Literal["uniform"]
TOLERANCE = 0.01
"""How far the bytes of a plan may be from the budget, relative to it."""


def uniform(matrices: Sequence[Matrix], structure: type[Structure], ratio: float, rest: Cost) -> tuple[Entry, ...]:
    """Give every matrix the same fraction of its own dense bytes.

    Sizes are whole numbers, so what rounding leaves over goes, one step at a time, to the matrices that stand furthest
    below the common fraction.

    Args:
        matrices: all matrices in scope; those that must stay dense count at full price.
        structure: what the others become.
        ratio: bytes of everything in scope over the bytes it may take.
        rest: cost of the other tensors in scope.

    Raises:
        BudgetError: the ratio cannot be met within `TOLERANCE`; the message names the nearest that can.
    """
    if not ratio >= 1:
        raise BudgetError(f"ratio must be at least 1 (original bytes / compressed bytes), got {ratio}")
    ladders = {m.name: _Ladder(m, structure) for m in matrices if m.dense is None}
    if not any(ladder.specs for ladder in ladders.values()):
        raise BudgetError("no matrix in scope can be factorized; see the plan's reasons or widen include and scope")
    original = total(m.cost(None) for m in matrices).bytes + rest.bytes
    fixed = rest.bytes + total(m.cost(None) for m in matrices if m.dense is not None).bytes
    smallest = fixed + sum(ladder.bytes[0] for ladder in ladders.values())
    largest = original / smallest
    if smallest > original / ratio * (1 + TOLERANCE):
        reasons = "; ".join(left_dense([Entry(m, None, m.dense) for m in matrices if m.dense is not None], original))
        raise BudgetError(
            f"ratio {ratio:g} cannot be met: at the smallest size of every matrix the ratio is {largest:.4g}, and "
            f"{fixed:,} of {original:,} bytes in scope stay as they are{f' ({reasons})' if reasons else ''}; "
            f"ask for at most {largest:.4g}"
        )

    def meet(ratio: float) -> tuple[dict[str, int], float, bool]:
        steps = _fill(ladders, max(original / ratio, smallest) - fixed)
        reached = original / (fixed + sum(ladder.bytes[steps[name]] for name, ladder in ladders.items()))
        return steps, reached, abs(ratio / reached - 1) <= TOLERANCE

    steps, reached, met = meet(ratio)
    if not met:
        # What is reached here need not be reached again from there: the named ratio is one that was tried.
        for _ in range(50):
            near = float(f"{reached:.4g}")
            _, reached, met = meet(near)
            if met:
                break
        else:
            near = largest
        raise BudgetError(f"ratio {ratio:g} cannot be met within {TOLERANCE:.0%} in bytes; the nearest is {near:.4g}")
    return tuple(_entry(m, ladders.get(m.name), steps.get(m.name, 0)) for m in matrices)


class _Ladder:
    """The sizes that a matrix can have, in growing bytes; the last step is dense."""

    def __init__(self, matrix: Matrix, structure: type[Structure]) -> None:
        dtype = getattr(torch, matrix.dtype)
        self.specs: list[Structure] = list(structure.candidates(matrix.shape, dtype))
        self.dense = matrix.cost(None).bytes
        self.bytes = [spec.bytes(matrix.shape, dtype) for spec in self.specs] + [self.dense]

    def below(self, fraction: float) -> int:
        """The largest step whose bytes stay within a fraction of the dense bytes; step 0 if none does."""
        return max(bisect.bisect_right(self.bytes, fraction * self.dense) - 1, 0)

    def next_step(self, step: int) -> float:
        """Bytes that the next size takes beyond this one; infinite at the last."""
        return self.bytes[step + 1] - self.bytes[step] if step + 1 < len(self.bytes) else math.inf


def _fill(ladders: dict[str, _Ladder], budget: float) -> dict[str, int]:
    """Steps of all ladders for a budget: the common fraction by bisection, then the remainder one step at a time."""

    def spent(fraction: float) -> int:
        return sum(ladder.bytes[ladder.below(fraction)] for ladder in ladders.values())

    low, high = 0.0, 1.0
    if spent(high) <= budget:
        low = high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    steps = {name: ladder.below(low) for name, ladder in ladders.items()}
    left = budget - spent(low)
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
        return Entry(matrix, None, matrix.dense or "")
    if step == len(ladder.specs):
        reason = "no smaller size fits the structure" if not ladder.specs else "the budget allows the dense matrix"
        return Entry(matrix, None, reason)
    return Entry(matrix, ladder.specs[step], f"uniform: {ladder.bytes[step] / ladder.dense:.1%} of its bytes")


ALLOCATIONS = {"uniform": uniform}
