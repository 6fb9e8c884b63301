"""Allocation by predicted loss: one global problem over all matrices, structures and sizes."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy
from numpy.typing import NDArray

from factorformer.fitting.statistics import UNSHOWN
from factorformer.layers.matrix import Matrix
from factorformer.planning.allocate import KEPT, NO_SIZE, TOLERANCE, meet
from factorformer.planning.plan import Cause, Entry, Unit
from factorformer.structures import Dense, Structure
from factorformer.structures.integers import Bits

ROUNDING = 1e-9
"""A budget that is met exactly is met, whatever floating point makes of it."""

IN_FLOATS = "the budget allows floats, and rounding to integers would lose more here than elsewhere"

MOST = 10**8
"""Partial choices that are looked at, at most: beyond them the choice that the price makes stands."""

FEW = 4
"""Steps that are too expensive for what is left, of which it is seen what others would have to do with, at most."""

GAP = 1e-3
"""How much more than the best choice within the budget a plan may lose, relative to it."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice of structure and size for a matrix.

    Args:
        spec: None for dense.
        cost: in the unit of the budget.
        loss: expected harm to the model; that of several matrices adds up.
        bits: of the integers in which it is stored; None for those that are planned for the matrix.
    """

    spec: Structure | None
    cost: float
    loss: float
    bits: Bits | None = None

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
    loss per unit of cost, is the Lagrange multiplier of the budget, and bounds what any choice can reach. What is left
    over then goes to options between; where that stays more than `GAP` above the bound, dynamic programming over the
    few options that could be part of a better choice decides (the core of the problem: Pisinger, 1995).

    Args:
        matrices: all matrices in scope.
        options: of each matrix by its name, in any order; a matrix that has to stay dense has no other option. Where
            there is dense in integers, dense as it is says what the original costs, and is a choice for budgets alone
            that dense in the widest of integers does not spend.
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
    original = math.fsum(next(o.cost for o in options[m.name] if o.spec is None) for m in matrices)
    in_integers = rest + math.fsum(max(o.cost for o in _without_floats(options[m.name]) if _whole(o)) for m in matrices)
    floats = (rest + original) / max(ratio, 1) > in_integers
    choices = {
        m.name: list(options[m.name]) if floats and m.name not in unmeasured else _without_floats(options[m.name])
        for m in matrices
    }
    ladders = {name: _Ladder.of(choice) for name, choice in choices.items()}
    stays = {
        matrix.name: Entry.whole(matrix, UNSHOWN, Cause.UNMEASURED)
        if matrix.name in unmeasured
        else Entry.whole(matrix, NO_SIZE, Cause.UNABLE)
        for matrix in matrices
        if len(choices[matrix.name]) == 1
    }
    purchases, exceeding = _purchases(ladders), floats and in_integers < rest + original

    def fill(budget: float) -> tuple[dict[str, Option], float]:
        enough, most = ((budget * part - rest) for part in (1 / (1 + TOLERANCE), 1 + ROUNDING))
        chosen = _spend(ladders, purchases, most, math.inf if exceeding else TOLERANCE * budget)
        chosen = _closer(ladders, purchases, chosen, enough, max(_cost(chosen), most))
        return chosen, rest + _cost(chosen)

    chosen = meet(
        fill,
        ratio,
        original=rest + original,
        smallest=rest + math.fsum(ladder.frontier[0].cost for ladder in ladders.values()),
        largest=rest + math.fsum(ladder.frontier[-1].cost for ladder in ladders.values()),
        fixed=rest + math.fsum(ladders[name].frontier[0].cost for name in stays),
        stays=list(stays.values()),
        unit=unit,
        exceeding=exceeding,
    )
    return tuple(stays.get(m.name) or _entry(m, chosen[m.name], options[m.name], ladders[m.name]) for m in matrices)


def _cost(chosen: Mapping[str, Option]) -> float:
    return math.fsum(option.cost for option in chosen.values())


def _whole(option: Option) -> bool:
    """Whether it is the dense matrix, in floats or in integers."""
    return option.spec is None or isinstance(option.spec, Dense)


def _without_floats(options: Sequence[Option]) -> list[Option]:
    """Without dense as it is where there is dense in integers."""
    in_integers = any(isinstance(option.spec, Dense) for option in options)
    return [option for option in options if option.spec is not None or not in_integers]


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
    ladders: Mapping[str, _Ladder],
    purchases: Sequence[tuple[str, Option, Option]],
    budget: float,
    tolerance: float,
    *,
    exchanging: bool = True,
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
    if exchanging:  # for which others do with less, where the steps of one matrix are a large part of the budget
        exchanges = [chosen | {name: after} for _, name, after in steps]
        for _, name, after in sorted(steps, key=lambda item: item[0])[:FEW]:
            others = {n: ladder for n, ladder in ladders.items() if n != name}
            left_for, their = budget - after.cost, [purchase for purchase in purchases if purchase[0] != name]
            if left_for >= math.fsum(ladder.frontier[0].cost for ladder in others.values()):
                exchanges.append({**_spend(others, their, left_for, tolerance, exchanging=False), name: after})
        near = [choice for choice in exchanges if abs(budget - _cost(choice)) <= tolerance]
        if near:
            return min(near, key=lambda choice: math.fsum(option.loss for option in choice.values()))
    if steps:
        step, name, after = min(steps, key=lambda item: item[0])
        if step < 2 * left:
            chosen[name] = after
    return chosen


def _closer(
    ladders: Mapping[str, _Ladder],
    purchases: Sequence[tuple[str, Option, Option]],
    chosen: dict[str, Option],
    enough: float,
    budget: float,
) -> dict[str, Option]:
    """A choice that costs enough and loses at most `GAP` more than the best within a budget; the given one if it does.

    With a price `p`, no choice within the budget loses less than the sum of the smallest `loss + p cost` of matrices,
    less `p budget`. Options that are further above that minimum than this choice is above that bound are in no better
    one, nor are partial choices. Of partial choices none is kept that costs more than another and saves less than its
    part of the gap.
    """
    loss = math.fsum(option.loss for option in chosen.values())
    price, bound = _bound(ladders, purchases, budget)
    gap = GAP * (bound if bound > 0 else loss)
    if loss - bound <= gap:
        return chosen
    beyond, part = loss - bound + gap, gap / len(ladders)
    cheapest = math.fsum(ladder.frontier[0].cost for ladder in ladders.values())
    costs, losses, least = numpy.zeros(1), numpy.zeros(1), 0.0
    steps: list[tuple[list[Option], NDArray[numpy.int64]]] = []
    tried = 0
    for ladder in ladders.values():
        priced = [option.loss + price * option.cost for option in ladder.frontier]
        lowest = min(priced)
        able = [o for o, value in zip(ladder.frontier, priced, strict=True) if value - lowest <= beyond]
        cheapest -= ladder.frontier[0].cost
        least += lowest
        tried += len(costs) * len(able)
        if tried > MOST:
            return chosen
        every_cost = (costs[:, None] + [option.cost for option in able]).ravel()
        every_loss = (losses[:, None] + [option.loss for option in able]).ravel()
        open_ = (every_loss + price * every_cost - least <= beyond) & (every_cost + cheapest <= budget)
        order = numpy.lexsort((every_loss, every_cost))
        order = order[open_[order]]
        better = every_loss[order] < numpy.minimum.accumulate(numpy.append(numpy.inf, every_loss[order]))[:-1]
        order = order[better]
        _, first = numpy.unique(-(every_loss[order] // part), return_index=True)
        order = order[first]
        costs, losses = every_cost[order], every_loss[order]
        steps.append((able, order))
    fitting = numpy.flatnonzero(costs >= min(_cost(chosen), enough))
    if not len(fitting) or losses[fitting[-1]] >= loss:
        return chosen
    found: dict[str, Option] = {}
    state = int(fitting[-1])
    for name, (able, order) in zip(reversed(list(ladders)), reversed(steps), strict=True):
        state, option = divmod(int(order[state]), len(able))
        found[name] = able[option]
    return found


def _bound(
    ladders: Mapping[str, _Ladder], purchases: Sequence[tuple[str, Option, Option]], budget: float
) -> tuple[float, float]:
    """The Lagrange multiplier of a budget, and the loss that no choice within it goes below."""
    left = budget - math.fsum(ladder.hull[0].cost for ladder in ladders.values())
    price = 0.0
    for _, before, after in purchases:
        left -= after.cost - before.cost
        if left < 0:
            price = _gain(before, after)
            break
    least = (min(option.loss + price * option.cost for option in ladder.hull) for ladder in ladders.values())
    return price, math.fsum(least) - price * budget


def _entry(matrix: Matrix, chosen: Option, options: Sequence[Option], ladder: _Ladder) -> Entry:
    if chosen.bits is not None:
        matrix = dataclasses.replace(matrix, bits=chosen.bits)
    if chosen.spec is None and any(isinstance(option.spec, Dense) for option in options):
        return Entry(matrix, None, IN_FLOATS)
    if _whole(chosen):
        smaller = [option for option in ladder.hull if option.cost < chosen.cost]
        if not smaller:
            return Entry.whole(matrix, f"{KEPT}: nothing else costs less")
        less = f"{smaller[-1].spec}{_width(smaller[-1], chosen)}"
        reason = f"{less} would lose more for what it saves than any size chosen"
        return Entry.whole(matrix, f"{KEPT}: {reason}")
    dense = next(option for option in options if option.spec is None)
    part = f"{matrix.role}: {chosen.cost / dense.cost:.1%} of its cost" if dense.cost else matrix.role
    return Entry(matrix, chosen.spec, f"{part}, {_runner_up(chosen, options)}")


def _runner_up(chosen: Option, options: Sequence[Option]) -> str:
    """The best option of another structure at no greater cost, and how much more it loses."""
    others = [option for option in options if option.spec is not None and option.kind != chosen.kind]
    if not others:
        return "the only structure tried"
    affordable = [option for option in others if option.cost <= chosen.cost]
    if not affordable:
        return f"where {' and '.join(sorted({option.kind for option in others}))} would cost more"
    best = min(affordable, key=lambda option: option.loss)
    times = f"{best.loss / chosen.loss:.2f} times the loss" if chosen.loss > 0 else "more"
    return f"where {best.kind}{_width(best, chosen)} would have {times}"


def _width(option: Option, chosen: Option) -> str:
    """The integers of an option, if those of the one that was chosen are others."""
    return "" if option.bits is None or option.bits == chosen.bits else f", int{option.bits},"
