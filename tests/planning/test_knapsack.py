"""Budgets are spent where they gain most: optimal wherever they are met exactly, and met where sizes allow."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from factorformer.errors import BudgetError
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, Option, Unit, knapsack
from factorformer.planning.allocate import TOLERANCE
from factorformer.planning.knapsack import GAP, by_loss
from factorformer.structures import Dense, KroneckerSum, LowRank, Structure


@pytest.fixture(autouse=True, scope="module")
def _without_shape_checks() -> Iterator[None]:
    """Annotations unchecked, as in `test_allocate`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def options_of(points: list[tuple[int, int]], dense: int) -> list[Option]:
    """Low rank at these costs and losses, and dense."""
    found = [Option(LowRank(rank), cost, loss) for rank, (cost, loss) in enumerate(points, 1)]
    return [*found, Option(None, dense, 0.0)]


def chosen(entries: tuple[Entry, ...], options: dict[str, list[Option]]) -> list[Option]:
    return [next(o for o in options[e.matrix.name] if o.spec == e.spec) for e in entries]


def brute_force(options: dict[str, list[Option]], budget: float, least: float = 0) -> float:
    """The smallest loss that any choice within the budget has, of those that cost something at least."""
    choices = itertools.product(*options.values())
    return min(sum(o.loss for o in c) for c in choices if least <= sum(o.cost for o in c) <= budget + 1e-9)


MODELS = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 100)), min_size=1, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=200)
@given(model=MODELS, ratio=st.floats(1, 8), rest=st.integers(0, 20))
def test_what_a_budget_buys_is_optimal_at_its_own_cost(
    model: list[list[tuple[int, int]]], ratio: float, rest: int
) -> None:
    options = {f"{i}": options_of(points, 64) for i, points in enumerate(model)}
    matrices = [Matrix(name, (16, 16)) for name in options]
    original = 64 * len(options) + rest
    try:
        entries = by_loss(matrices, options, ratio, rest)
    except BudgetError as error:
        (near,) = re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))
        ratio = float(near)
        entries = by_loss(matrices, options, ratio, rest)
    assert [entry.matrix for entry in entries] == matrices
    found = chosen(entries, options)
    cost = sum(option.cost for option in found) + rest
    assert cost * ratio == pytest.approx(original, rel=TOLERANCE * 1.001)
    budget = max(cost, original / ratio) - rest
    best = brute_force(options, budget, min(cost - rest, (1 - TOLERANCE / 2) * budget))
    assert best <= sum(option.loss for option in found) <= best * (1 + GAP)


@settings(max_examples=200)
@given(model=MODELS, steps=st.integers(0, 12))
def test_budgets_met_exactly_along_the_hull_are_spent_optimally(model: list[list[tuple[int, int]]], steps: int) -> None:
    options = {f"{i}": options_of(points, 64) for i, points in enumerate(model)}
    # The theorem, from outside: take the best choice for a Lagrangian price, and hand in what it costs as the budget.
    price = math.exp(steps / 2 - 3)
    priced = [min(os, key=lambda o: (o.loss + price * o.cost, o.cost)) for os in options.values()]
    cost = sum(option.cost for option in priced)
    entries = by_loss([Matrix(name, (16, 16)) for name in options], options, 64 * len(options) / cost, 0)
    found = chosen(entries, options)
    assert sum(option.cost for option in found) == cost
    assert sum(option.loss for option in found) == pytest.approx(sum(option.loss for option in priced))
    assert sum(option.loss for option in found) == pytest.approx(brute_force(options, cost))


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), unit=st.sampled_from(["bytes", "milliseconds"]))
def test_plans_are_optimal_to_a_thousandth(seed: int, unit: Unit) -> None:
    """Against the integer programme over all options, solved from its statement alone."""
    draw = random.Random(seed)
    options: dict[str, list[Option]] = {}
    for i in range(12):
        energy, base = math.exp(draw.gauss(0, 1.5)), draw.uniform(5, 40)
        spec: list[tuple[Structure, float]] = [(LowRank(r), r / 48 * draw.uniform(0.9, 1.1)) for r in range(1, 40, 3)]
        options[f"{i}"] = [
            *(Option(s, 100 * part + draw.random(), energy * math.exp(-part * base / 8)) for s, part in spec),
            Option(None, 100, 0.0),
        ]
    ratio = draw.uniform(1.3, 6)
    try:
        entries = by_loss([Matrix(name, (96, 96)) for name in options], options, ratio, 0, unit)
    except BudgetError:
        reject()  # of few and large steps, none may come near
    found = chosen(entries, options)
    budget = max(1200 / ratio, sum(option.cost for option in found))
    every = [(row, option) for row, some in enumerate(options.values()) for option in some]
    of_matrix = np.array([[float(row == at) for row, _ in every] for at in range(12)])
    exact = milp(
        [option.loss for _, option in every],
        integrality=np.ones(len(every)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(of_matrix, 1, 1),
            LinearConstraint([option.cost for _, option in every], budget * (1 - TOLERANCE / 2), budget),
        ],
    )
    assert sum(option.loss for option in found) <= exact.fun * (1 + GAP) + 1e-9


def in_int8(rounding: dict[str, float]) -> dict[str, list[Option]]:
    """Dense in floats, in int8 and of rank 1, of matrices that rounding harms more or less."""
    return {
        name: [Option(LowRank(1), 6, 1.0, 8), Option(Dense(), 25, loss, 8), Option(None, 100, 0.0)]
        for name, loss in rounding.items()
    }


def test_what_int8_leaves_of_a_budget_keeps_floats_where_rounding_harms_most() -> None:
    options = in_int8({"a": 0.01, "b": 0.03, "c": 0.02})
    matrices = [Matrix(name, (16, 16), bits=8) for name in options]
    specs = [entry.spec for entry in by_loss(matrices, options, 2, 0)]
    assert specs == [Dense(), None, Dense()]
    assert [entry.values for entry in by_loss(matrices, options, 2, 0)] == ["int8", "float32", "int8"]
    assert [entry.spec for entry in by_loss(matrices, options, 1, 0)] == [None] * 3
    for ratio in (4, 5.36):  # what is left is no reason for floats
        assert None not in [entry.spec for entry in by_loss(matrices, options, ratio, 0)]
    assert [entry.spec for entry in by_loss(matrices, options, 4, 0)] == [Dense()] * 3
    # Products in int8 are as many: there is no budget that floats would spend.
    same = {name: [dataclasses.replace(o, cost=min(o.cost * 4, 100)) for o in some] for name, some in options.items()}
    assert [entry.spec for entry in by_loss(matrices, same, 1, 0, "flops")] == [Dense()] * 3


def test_the_wider_of_two_integers_is_for_those_that_rounding_harms_most() -> None:
    harm = {"a": 0.01, "b": 0.03, "c": 0.02}
    options = {name: [Option(Dense(), 13, 50 * harm[name], 4), *found[1:]] for name, found in in_int8(harm).items()}
    matrices = [Matrix(name, (16, 16), bits=4) for name in options]

    def values(ratio: float) -> list[str]:
        return [entry.values for entry in by_loss(matrices, options, ratio, 0)]

    assert values(7.69) == ["int4"] * 3
    assert values(5.9) == ["int4", "int8", "int4"]
    assert values(4) == ["int8"] * 3
    assert values(2) == ["int8", "float32", "int8"]


def test_many_matrices_meet_their_budget_closely() -> None:
    matrices = [Matrix(f"{i}", (384, 384)) for i in range(24)]
    options = {
        m.name: [
            *(Option(LowRank(r), m.cost(LowRank(r)).bytes, (1 + i) * math.exp(-r / (20 + i))) for r in range(1, 192)),
            Option(None, m.cost(None).bytes, 0.0),
        ]
        for i, m in enumerate(matrices)
    }
    for ratio in (1.1, 1.5, 2, 3, 5, 10, 30):
        entries = by_loss(matrices, options, ratio, 1000)
        cost = sum(entry.compressed.bytes for entry in entries) + 1000
        original = sum(entry.original.bytes for entry in entries) + 1000
        assert original / ratio * 0.995 <= cost <= original / ratio * 1.0001


def test_others_do_with_less_for_the_large_step_of_one() -> None:
    """Such as that of a table, which is half of a model, from 3 bits to 4."""
    options = {f"small{i}": options_of([(cost, 10 - cost) for cost in range(1, 10)], 10) for i in range(4)}
    options["large"] = options_of([(40, 1)], 60)
    matrices = [Matrix(name, (64, 64)) for name in options]
    found = chosen(by_loss(matrices, options, ratio=100 / 88, rest=0), options)
    assert sum(option.cost for option in found) == pytest.approx(88, rel=TOLERANCE)
    assert found[-1].cost == 60


def test_what_matters_more_gets_more() -> None:
    matrices = [Matrix(name, (64, 64)) for name in ("little", "much")]
    options = {
        m.name: [
            *(Option(LowRank(r), m.cost(LowRank(r)).bytes, weight * math.exp(-r / 8)) for r in range(1, 32)),
            Option(None, m.cost(None).bytes, 0.0),
        ]
        for m, weight in zip(matrices, (1, 20), strict=True)
    }
    entries = {entry.matrix.name: entry for entry in by_loss(matrices, options, 3.2, 0)}
    assert entries["much"].compressed.bytes > 2 * entries["little"].compressed.bytes


def test_reasons_name_the_runner_up() -> None:
    shape, kronecker = (16, 16), KroneckerSum.of((16, 16), 2)

    def reason(*others: Option, ratio: float = 2) -> str:
        (entry,) = by_loss([Matrix("a", shape)], {"a": [*others, Option(None, 10, 0)]}, ratio, 0)
        return entry.reason

    assert "kronecker_sum would have 3.00 times" in reason(Option(LowRank(2), 5, 1), Option(kronecker, 5, 3))
    assert "kronecker_sum would cost more" in reason(Option(LowRank(2), 5, 2), Option(kronecker, 8, 3))
    assert reason(Option(LowRank(2), 5, 2)).endswith("the only structure tried")
    assert reason(Option(LowRank(2), 5, 2), ratio=1).partition(": ")[2].startswith("low_rank(rank=2)")
    assert reason(Option(LowRank(2), 12, 2), ratio=1).endswith("nothing else costs less")
    (entry,) = by_loss([Matrix("a", shape, dense="excluded")], {"a": [Option(None, 10, 0)]}, 1, 0)
    assert entry.reason == "excluded"


def test_a_free_look_up_stays_dense() -> None:
    words = Matrix("words", (64, 16), products=0, lookups=1, role="embedding")
    layer = Matrix("layer", (16, 16))
    options = {
        "words": [Option(LowRank(2), 64, 0.1), Option(None, 0, 0.0)],
        "layer": [Option(LowRank(4), 256, 0.5), Option(None, 512, 0.0)],
    }
    entries = by_loss([words, layer], options, 2, 0, "flops")
    assert [entry.spec for entry in entries] == [None, LowRank(4)]


@pytest.mark.parametrize("ratio", [0.99, 0, float("nan")])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        by_loss([Matrix("a", (16, 16))], {"a": options_of([(5, 1)], 10)}, ratio, 0)


def test_an_impossible_ratio_names_the_largest() -> None:
    options = {"a": options_of([(5, 1)], 20)}
    with pytest.raises(BudgetError, match=r" 0 of 20 flops .*at most 4"):
        by_loss([Matrix("a", (16, 16))], options, 5, 0, "flops")
    with pytest.raises(BudgetError, match=r" 1 of 21 milliseconds .*at most 3\.5"):
        by_loss([Matrix("a", (16, 16))], options, 5, 1.0, "milliseconds")
    assert by_loss([Matrix("a", (16, 16))], options, 4, 0)[0].spec == LowRank(1)


def test_a_ratio_between_two_sizes_names_the_nearest() -> None:
    options = {"a": options_of([(5, 3), (8, 1)], 20)}
    with pytest.raises(BudgetError, match=r"within 1% in bytes.*nearest.* 4"):
        by_loss([Matrix("a", (16, 16))], options, 3.5, 0)
    assert by_loss([Matrix("a", (16, 16))], options, 4, 0)[0].spec == LowRank(1)


def test_nothing_to_factorize() -> None:
    with pytest.raises(BudgetError, match=r"ratio is 1, .*at most 1"):
        by_loss([Matrix("a", (16, 16), dense="excluded")], {"a": [Option(None, 10, 0)]}, 2, 0)


def test_plans_that_would_take_too_long_are_those_of_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at has a bound, and without it a plan is within what the price says."""
    draw = random.Random(0)
    matrices = [Matrix(f"m{i}", (64, 64)) for i in range(12)]
    options = {
        m.name: options_of([(i * 100 + draw.randrange(50), 1000 / i + draw.random()) for i in range(1, 9)], 2000)
        for m in matrices
    }
    best = by_loss(matrices, options, 4.0, 0)
    monkeypatch.setattr(knapsack, "MOST", 10)
    quick = by_loss(matrices, options, 4.0, 0)
    losses = [sum(o.loss for o in chosen(entries, options)) for entries in (best, quick)]
    assert losses[0] <= losses[1] <= 1.1 * losses[0]
