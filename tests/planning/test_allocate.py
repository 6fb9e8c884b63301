"""Budgets are met, or the error names one that can be met."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorformer.errors import BudgetError
from factorformer.planning import Cost, Entry, Matrix, total
from factorformer.planning.allocate import TOLERANCE, uniform
from factorformer.structures import LowRank

SIDES = st.integers(16, 90)


# A handful of matrices; some have to stay dense.
MODELS = st.lists(
    st.tuples(
        st.tuples(SIDES, SIDES),
        st.sampled_from(["float32", "float16"]),
        st.sampled_from([None, None, None, "excluded"]),
    ),
    min_size=1,
    max_size=6,
)


def bytes_of(matrices: list[Matrix], rest: Cost) -> int:
    return total(m.cost(None) for m in matrices).bytes + rest.bytes


def check(entries: tuple[Entry, ...], matrices: list[Matrix], ratio: float, rest: Cost) -> None:
    assert [entry.matrix for entry in entries] == matrices
    reached = total(entry.compressed for entry in entries).bytes + rest.bytes
    assert reached * ratio == pytest.approx(bytes_of(matrices, rest), rel=TOLERANCE * 1.0001)
    for entry in entries:
        assert entry.compressed.bytes <= entry.original.bytes
        assert entry.reason
        if entry.spec is not None:
            assert entry.matrix.dense is None
            assert entry.compressed.bytes < entry.original.bytes
            assert entry.compressed.flops < entry.original.flops


@settings(max_examples=100)
@given(model=MODELS, ratio=st.floats(1, 12), rest=st.integers(0, 2000))
def test_budgets_are_met_or_the_nearest_is_named(
    model: list[tuple[tuple[int, int], str, str | None]], ratio: float, rest: int
) -> None:
    matrices = [Matrix(f"layer.{i}", shape, dtype, dense=dense) for i, (shape, dtype, dense) in enumerate(model)]
    others = Cost(rest, 4 * rest, 0)
    try:
        entries = uniform(matrices, LowRank, ratio, others)
    except BudgetError as error:
        if "can be factorized" in str(error):
            assert all(matrix.dense is not None for matrix in matrices)
            return
        (near,) = re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))
        check(uniform(matrices, LowRank, float(near), others), matrices, float(near), others)
    else:
        check(entries, matrices, ratio, others)


@pytest.mark.parametrize("ratio", [1.2, 1.5, 2, 2.8, 3, 5, 8])
def test_a_transformer_meets_every_usual_ratio(ratio: float) -> None:
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    matrices = [Matrix(f"{i}.{j}", shape) for i in range(12) for j, shape in enumerate(shapes)]
    rest = Cost(100_000, 400_000, 0)
    entries = uniform(matrices, LowRank, ratio, rest)
    reached = total(entry.compressed for entry in entries).bytes + rest.bytes
    assert reached * ratio == pytest.approx(bytes_of(matrices, rest), rel=1e-3)
    # Uniform: every matrix keeps about the same fraction of its bytes.
    fractions = [entry.compressed.bytes / entry.original.bytes for entry in entries]
    assert max(fractions) - min(fractions) < 0.01


def test_equal_matrices_differ_by_one_rank_at_most() -> None:
    matrices = [Matrix(f"{i}", (64, 64)) for i in range(7)]
    ranks = [entry.spec.rank for entry in uniform(matrices, LowRank, 3, Cost()) if isinstance(entry.spec, LowRank)]
    assert len(ranks) == 7
    assert max(ranks) - min(ranks) <= 1


def test_ratio_one_keeps_everything() -> None:
    matrices = [Matrix(f"{i}", (64, 32)) for i in range(3)]
    entries = uniform(matrices, LowRank, 1, Cost())
    assert [entry.spec for entry in entries] == [None] * 3
    assert {entry.reason for entry in entries} == {"the budget allows the dense matrix"}


@pytest.mark.parametrize("ratio", [0.99, 0, -1, float("nan")])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        uniform([Matrix("a", (64, 32))], LowRank, ratio, Cost())


@pytest.mark.parametrize("ratio", [1e3, float("inf")])
def test_an_impossible_ratio_names_the_largest(ratio: float) -> None:
    matrices = [Matrix("a", (64, 64)), Matrix("b", (64, 64), dense="excluded")]
    with pytest.raises(
        BudgetError, match=r"cannot be met.*16,384 of 32,768 bytes in scope stay.*ask for at most 1.939"
    ):
        uniform(matrices, LowRank, ratio, Cost())
    uniform(matrices, LowRank, 1.939, Cost())


def test_a_ratio_between_two_sizes_names_the_nearest() -> None:
    matrices = [Matrix("a", (16, 16))]  # rank 1 to 7: an eighth of the bytes each
    with pytest.raises(BudgetError, match=r"within 1% in bytes; the nearest is 2.667"):
        uniform(matrices, LowRank, 2.5, Cost())
    assert uniform(matrices, LowRank, 2.667, Cost())[0].spec == LowRank(3)


def test_nothing_to_factorize() -> None:
    for matrices in ([], [Matrix("a", (64, 64), dense="excluded")]):
        with pytest.raises(BudgetError, match="no matrix in scope can be factorized"):
            uniform(matrices, LowRank, 2, Cost())
