"""Allocation by predicted loss: one global problem over all matrices, structures and sizes."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from factorformer.layers.matrix import Matrix
from factorformer.planning.allocate import KEPT, NO_SIZE, TOLERANCE, meet
from factorformer.planning.plan import Cause, Entry, Unit
from factorformer.structures import Dense, Structure

UNMEASURED = "the model's output on the calibration data does not show its effect, left dense"

ROUNDING = 1e-9
"""A budget that is met exactly is met, whatever floating point makes of it."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice of structure and size for a matrix.

    Args:
        spec: None for dense.
        cost: in the unit of the budget.
        loss: expected harm to the model; that of several matrices adds up.
    """

    spec: Structure | None
    cost: float
    loss: float

    @property
    def kind(self) -> str:
        """The structure's name, or `dense`."""
        return "dense" if self.spec is None else self.spec.kind


def by_loss(
    matrices: Sequence[Matrix],
    options: Mapping[str, Sequence[Option]],
    ratio: float,
    rest: float,
    unit: Unit = "bytes",
    unmeasured: Collection[str] = (),
) -> tuple[Entry, ...]:
    """Choose one option for each matrix so that the sum of losses is smallest within a common budget.

    This is a multiple-choice knapsack. Options on the lower convex hull of `(cost, loss)` of each matrix are bought in
    the order of what they gain for their cost, across all matrices, until the budget is spent: for every budget that
    is met exactly so, no choice of options loses less (Everett, 1963; Sinha and Zoltners, 1979). The last price paid,
    loss per unit of cost, is the Lagrange multiplier of the budget. What is left over then goes to options between.

    Args:
        matrices: all matrices in scope.
        options: of each matrix by its name, in any order; a matrix that has to stay dense has no other option. Where
            there is dense in int8, dense as it is only says what the original costs.
        ratio: cost of everything in scope, dense, over what it may cost.
        rest: cost of the other tensors in scope.
        unit: of costs.
        unmeasured: names of matrices of which no loss is known, and which stay dense for that.

    Raises:
        BudgetError: the ratio cannot be met within `TOLERANCE`; the message names the nearest that can.

    >>> from factorformer.structures import LowRank
    >>> rank = {name: Option(LowRank(4), 6, loss) for name, loss in (("a", 0.2), ("b", 0.1))}
    >>> chosen = by_loss([Matrix("a", (16, 16)), Matrix("b", (16, 16))],
    ...                  {name: [option, Option(None, 10, 0.0)] for name, option in rank.items()}, ratio=1.25, rest=0)
    >>> [str(entry.spec) for entry in chosen]
    ['None', 'low_rank(rank=4)']
    """
    choices = {matrix.name: _choices(options[matrix.name]) for matrix in matrices}
    ladders = {name: _Ladder.of(choice) for name, choice in choices.items()}
    original = math.fsum(next(o.cost for o in options[m.name] if o.spec is None) for m in matrices)
    stays = {
        matrix.name: Entry.whole(matrix, UNMEASURED, Cause.UNMEASURED)
        if matrix.name in unmeasured
        else Entry.whole(matrix, NO_SIZE, Cause.UNABLE)
        for matrix in matrices
        if len(choices[matrix.name]) == 1
    }
    purchases = _purchases(ladders)

    def fill(budget: float) -> tuple[dict[str, Option], float]:
        chosen = _spend(ladders, purchases, budget * (1 + ROUNDING) - rest, TOLERANCE * budget)
        return chosen, rest + math.fsum(option.cost for option in chosen.values())

    chosen = meet(
        fill,
        ratio,
        original=rest + original,
        smallest=rest + math.fsum(ladder.frontier[0].cost for ladder in ladders.values()),
        largest=rest + math.fsum(ladder.frontier[-1].cost for ladder in ladders.values()),
        fixed=rest + math.fsum(ladders[name].frontier[0].cost for name in stays),
        stays=list(stays.values()),
        unit=unit,
    )
    return tuple(stays.get(m.name) or _entry(m, chosen[m.name], options[m.name], ladders[m.name]) for m in matrices)


def _choices(options: Sequence[Option]) -> list[Option]:
    """Without dense as it is where there is dense in int8."""
    in_int8 = any(isinstance(option.spec, Dense) for option in options)
    return [option for option in options if option.spec is not None or not in_int8]


@dataclasses.dataclass(frozen=True)
class _Ladder:
    """The options worth having, by growing cost and falling loss; `hull` are those of falling gain for their cost."""

    frontier: tuple[Option, ...]
    hull: tuple[Option, ...]

    @classmethod
    def of(cls, options: Sequence[Option]) -> _Ladder:
        frontier: list[Option] = []
        for option in sorted(options, key=lambda option: (option.cost, option.loss)):
            if not frontier or option.loss < frontier[-1].loss:
                frontier.append(option)
        hull: list[Option] = []
        for option in frontier:
            while len(hull) > 1 and _gain(hull[-1], option) >= _gain(hull[-2], hull[-1]):
                hull.pop()
            hull.append(option)
        return cls(tuple(frontier), tuple(hull))

    def within(self, cost: float) -> Option:
        """The best option that costs no more, or the cheapest."""
        place = bisect.bisect_right(self.frontier, cost, key=lambda option: option.cost)
        return self.frontier[max(place - 1, 0)]

    def following(self, option: Option) -> Option | None:
        """The next better option; None after the best."""
        place = bisect.bisect_right(self.frontier, option.cost, key=lambda option: option.cost)
        return self.frontier[place] if place < len(self.frontier) else None


def _gain(first: Option, second: Option) -> float:
    return (first.loss - second.loss) / (second.cost - first.cost)


def _purchases(ladders: Mapping[str, _Ladder]) -> list[tuple[str, Option, Option]]:
    """All steps along all hulls, `(matrix, from, to)`, those that gain most for their cost first."""
    steps = [(name, *pair) for name, ladder in ladders.items() for pair in itertools.pairwise(ladder.hull)]
    return sorted(steps, key=lambda step: -_gain(step[1], step[2]))


def _spend(
    ladders: Mapping[str, _Ladder], purchases: Sequence[tuple[str, Option, Option]], budget: float, tolerance: float
) -> dict[str, Option]:
    """The options that a budget buys; where they leave more than the tolerance, perhaps a little more than that."""
    chosen = {name: ladder.frontier[0] for name, ladder in ladders.items()}
    left = budget - math.fsum(option.cost for option in chosen.values())
    waiting: dict[str, None] = {}
    for name, before, after in purchases:
        if not waiting and after.cost - before.cost <= left:
            chosen[name] = after
            left -= after.cost - before.cost
        else:
            waiting.setdefault(name)  # the first step that is too expensive ends the purchases
    for name in waiting:
        better = ladders[name].within(chosen[name].cost + left)
        left -= better.cost - chosen[name].cost
        chosen[name] = better
    if left <= tolerance:
        return chosen
    # All of this stays below the budget; one more step may come nearer to it.
    steps = [(after.cost - chosen[n].cost, n, after) for n in waiting if (after := ladders[n].following(chosen[n]))]
    if steps:
        step, name, after = min(steps, key=lambda item: item[0])
        if step < 2 * left:
            chosen[name] = after
    return chosen


def _entry(matrix: Matrix, chosen: Option, options: Sequence[Option], ladder: _Ladder) -> Entry:
    if chosen.spec is None or isinstance(chosen.spec, Dense):
        smaller = [option for option in ladder.hull if option.cost < chosen.cost]
        if not smaller:
            return Entry.whole(matrix, f"{KEPT}: nothing else costs less")
        reason = f"{smaller[-1].spec} would lose more for what it saves than any size chosen"
        return Entry.whole(matrix, f"{KEPT}: {reason}")
    dense = next(option for option in options if option.spec is None)
    part = f"{matrix.role}: {chosen.cost / dense.cost:.1%} of its cost" if dense.cost else matrix.role
    return Entry(matrix, chosen.spec, f"{part}, {_runner_up(chosen, options)}")


def _runner_up(chosen: Option, options: Sequence[Option]) -> str:
    """The best option of another structure at no greater cost, and how much more it loses."""
    others = [option for option in options if option.spec is not None and option.kind != chosen.kind]
    if not others:
        return "whose error is worth what it costs"
    affordable = [option for option in others if option.cost <= chosen.cost]
    if not affordable:
        return f"where {' and '.join(sorted({option.kind for option in others}))} would cost more"
    best = min(affordable, key=lambda option: option.loss)
    times = f"{best.loss / chosen.loss:.2f} times the loss" if chosen.loss > 0 else "more"
    return f"where {best.kind} would have {times}"
