"""Budgets are met, or the error names one that can be met."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import get_args

import jaxtyping
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from factorformer.errors import BudgetError
from factorformer.layers.matrix import Cost, Matrix, Role, total
from factorformer.planning import Cause, Entry
from factorformer.planning.allocate import (
    ALLOCATIONS,
    KEPT,
    RANKS,
    TOLERANCE,
    AllocationName,
    by_role,
    candidates_of,
    uniform,
)
from factorformer.structures import Dense, KroneckerSum, LowRank, Structure

BY_BYTES = {name: allocate for name, allocate in ALLOCATIONS.items() if allocate is not None}
SIDES = st.integers(16, 90)


@pytest.fixture(autouse=True, scope="module")
def _without_shape_checks() -> Iterator[None]:
    """Annotations unchecked: planning looks at thousands of sizes, which takes ten times as long with checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# A handful of matrices; some have to stay dense.
MODELS = st.lists(
    st.tuples(
        st.tuples(SIDES, SIDES),
        st.sampled_from(["float32", "float16"]),
        st.sampled_from([None, None, None, "excluded"]),
        st.sampled_from(get_args(Role)),
    ),
    min_size=1,
    max_size=6,
)


def bytes_of(matrices: list[Matrix], rest: Cost) -> int:
    return total(m.cost(None) for m in matrices).bytes + rest.bytes


def rank_of(entry: Entry) -> int:
    assert isinstance(entry.spec, (LowRank, KroneckerSum)), entry
    return entry.spec.rank


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
            if isinstance(entry.spec, LowRank):  # sums of Kronecker products can be slower than they are small
                assert entry.compressed.flops < entry.original.flops


@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
@pytest.mark.parametrize("allocation", BY_BYTES)
@settings(max_examples=50)
@given(model=MODELS, ratio=st.floats(1, 12), rest=st.integers(0, 2000))
def test_budgets_are_met_or_the_nearest_is_named(
    allocation: str,
    structure: type[Structure],
    model: list[tuple[tuple[int, int], str, str | None, Role]],
    ratio: float,
    rest: int,
) -> None:
    allocate = BY_BYTES[allocation]
    matrices = [
        Matrix(f"layer.{i}", shape, dtype, dense=dense, role=role)
        for i, (shape, dtype, dense, role) in enumerate(model)
    ]
    others = Cost(rest, 4 * rest, 0)
    try:
        entries = allocate(matrices, candidates_of(structure), ratio, others)
    except BudgetError as error:
        if "can be factorized" in str(error):
            assert all(matrix.dense is not None for matrix in matrices)
            return
        (near,) = re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))
        check(allocate(matrices, candidates_of(structure), float(near), others), matrices, float(near), others)
    else:
        check(entries, matrices, ratio, others)


@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
@pytest.mark.parametrize("ratio", [1.2, 2, 2.8, 5, 10, 20])
def test_a_transformer_meets_every_usual_ratio(ratio: float, structure: type[Structure]) -> None:
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    matrices = [Matrix(f"{i}.{j}", shape) for i in range(12) for j, shape in enumerate(shapes)]
    rest = Cost(100_000, 400_000, 0)
    entries = uniform(matrices, candidates_of(structure), ratio, rest)
    reached = total(entry.compressed for entry in entries).bytes + rest.bytes
    assert reached * ratio == pytest.approx(bytes_of(matrices, rest), rel=1e-3)
    # Uniform: every matrix keeps about the same fraction of its bytes.
    fractions = [entry.compressed.bytes / entry.original.bytes for entry in entries]
    assert max(fractions) - min(fractions) < 0.01


@pytest.mark.parametrize("allocation", BY_BYTES)
@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
def test_equal_matrices_differ_by_one_rank_at_most(structure: type[Structure], allocation: str) -> None:
    matrices = [Matrix(f"{i}", (64, 64)) for i in range(7)]
    ranks = [rank_of(entry) for entry in BY_BYTES[allocation](matrices, candidates_of(structure), 3, Cost())]
    assert len(ranks) == 7
    assert max(ranks) - min(ranks) <= 1


def test_every_allocation_is_registered() -> None:
    assert set(ALLOCATIONS) == set(get_args(AllocationName))


def in_int8(*matrices: Matrix) -> list[Matrix]:
    return [dataclasses.replace(matrix, bits=8 if matrix.dense is None else None) for matrix in matrices]


@pytest.mark.parametrize("allocation", BY_BYTES)
def test_what_stays_dense_is_dense_in_int8(allocation: str) -> None:
    excluded = Matrix("x", (64, 64), dense="excluded")
    matrices = in_int8(*(Matrix(f"{i}", (256, 256)) for i in range(4)), Matrix("thin", (1, 64)), excluded)
    for ratio in (1, 2, 3, 3.7, 3.75):
        entries = BY_BYTES[allocation](matrices, candidates_of(LowRank), ratio, Cost())
        assert [entry.spec for entry in entries] == [Dense()] * 5 + [None]
        assert {entry.values for entry in entries[:-1]} == {"int8"}
        assert [entry.cause for entry in entries[-2:]] == [Cause.UNABLE, Cause.PATTERNS]
    entries = BY_BYTES[allocation](matrices, candidates_of(LowRank), 6, Cost())
    assert bytes_of(matrices, Cost()) / sum(e.compressed.bytes for e in entries) == pytest.approx(6, rel=0.01)
    assert {entry.values for entry in entries[:-1]} == {"int8"}
    assert isinstance(entries[0].spec, LowRank)
    assert all(entry.compressed.bytes <= 256 * 256 + 4 * 256 for entry in entries[:4])


def test_ratio_one_keeps_everything() -> None:
    matrices = [Matrix(f"{i}", (64, 32)) for i in range(3)]
    entries = uniform(matrices, candidates_of(LowRank), 1, Cost())
    assert [entry.spec for entry in entries] == [None] * 3
    assert {entry.reason for entry in entries} == {KEPT}


@pytest.mark.parametrize("ratio", [0.99, 0, -1, float("nan")])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        uniform([Matrix("a", (64, 32))], candidates_of(LowRank), ratio, Cost())


@pytest.mark.parametrize("ratio", [1e3, float("inf")])
def test_an_impossible_ratio_names_the_largest(ratio: float) -> None:
    matrices = [Matrix("a", (64, 64)), Matrix("b", (64, 64), dense="excluded")]
    with pytest.raises(BudgetError, match=r"16,384 of 32,768 bytes .*at most 1\.939"):
        uniform(matrices, candidates_of(LowRank), ratio, Cost())
    uniform(matrices, candidates_of(LowRank), 1.939, Cost())


def test_a_ratio_between_two_sizes_names_the_nearest() -> None:
    matrices = [Matrix("a", (16, 16))]  # rank 1 to 7: an eighth of the bytes each
    with pytest.raises(BudgetError, match=r"within 1% in bytes.*nearest.* 2\.667"):
        uniform(matrices, candidates_of(LowRank), 2.5, Cost())
    assert uniform(matrices, candidates_of(LowRank), 2.667, Cost())[0].spec == LowRank(3)


def test_nothing_to_factorize() -> None:
    for matrices in ([], [Matrix("a", (64, 64), dense="excluded")]):
        with pytest.raises(BudgetError, match="no matrix"):
            uniform(matrices, candidates_of(LowRank), 2, Cost())


# Ranks by role


def transformer(width: int, blocks: int, vocabulary: int, positions: int) -> list[Matrix]:
    """The matrices of an encoder."""
    sizes = {"words": vocabulary, "positions": positions}
    matrices = [Matrix(name, (size, width), role="embedding") for name, size in sizes.items()]
    for i in range(blocks):
        matrices += [Matrix(f"{i}.attention.{name}", (width, width), role="attention") for name in "qkvo"]
        matrices += [Matrix(f"{i}.up", (4 * width, width)), Matrix(f"{i}.down", (width, 4 * width))]
    return matrices


def parts(entries: tuple[Entry, ...], rest: Cost) -> tuple[int, int]:
    """Bytes of the embeddings, and of everything else."""
    embeddings = sum(entry.compressed.bytes for entry in entries if entry.matrix.role == "embedding")
    others = sum(entry.compressed.bytes for entry in entries if entry.matrix.role != "embedding")
    return embeddings, others + rest.bytes


@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
@settings(max_examples=60, phases=set(Phase) - {Phase.shrink})
@given(
    width=st.sampled_from([64, 96, 128]),
    blocks=st.integers(1, 4),
    vocabulary=st.integers(40, 3000),
    ratio=st.floats(3, 15),
    rest=st.integers(0, 2000),
)
def test_small_ranks_for_attention_and_larger_ones_for_embeddings(
    structure: type[Structure], width: int, blocks: int, vocabulary: int, ratio: float, rest: int
) -> None:
    matrices, others = transformer(width, blocks, vocabulary, positions=32), Cost(rest, 4 * rest, 0)
    try:
        entries = by_role(matrices, candidates_of(structure), ratio, others)
    except BudgetError:
        assume(False)
    check(entries, matrices, ratio, others)
    sizes = {shape: list(structure.candidates(shape, torch.float32)) for shape in {m.shape for m in matrices}}
    ranks: dict[Role, list[int]] = {"attention": [], "feed_forward": [], "embedding": []}
    for entry in entries:
        if entry.spec is not None and entry.spec != sizes[entry.matrix.shape][-1]:  # others cannot grow with their role
            ranks[entry.matrix.role].append(rank_of(entry))
    for of_role in ranks.values():
        assert max(of_role, default=0) - min(of_role, default=0) <= 1
    attention, feed_forward, embedding = (ranks[role] for role in ("attention", "feed_forward", "embedding"))
    # What rounding leaves over is one step at most.
    if attention and feed_forward:
        assert max(attention) <= min(feed_forward) + 1
        assert max(feed_forward) <= RANKS["feed_forward"] / RANKS["attention"] * (min(attention) + 1) + 1
    embeddings, remainder = parts(entries, others)
    if max(embedding, default=1) > 1 and any(e.spec for e in entries if e.matrix.role != "embedding"):
        assert embeddings < remainder
    if embedding and feed_forward and min(embedding) < max(feed_forward) - 1:
        # One step more for each embedding, and together they would not be smaller than the rest, which may have got two
        # steps for each matrix after that was decided.
        steps = {True: 0, False: 0}
        for entry in entries:
            if entry.spec is not None:
                larger = [*sizes[entry.matrix.shape][rank_of(entry) :], None][0]
                step = entry.matrix.cost(larger).bytes - entry.compressed.bytes
                steps[entry.matrix.role == "embedding"] += step
        assert embeddings + steps[True] >= remainder - 2 * steps[False]


@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
def test_ranks_stand_in_the_relation_of_their_roles(structure: type[Structure]) -> None:
    matrices = transformer(512, blocks=6, vocabulary=2000, positions=512)
    entries = by_role(matrices, candidates_of(structure), 10, Cost())
    ranks = {entry.matrix.name: rank_of(entry) for entry in entries}
    smallest = ranks["0.attention.q"]
    assert smallest > 3
    for entry in entries:
        expected = RANKS[entry.matrix.role] / RANKS["attention"] * smallest
        assert ranks[entry.matrix.name] == pytest.approx(expected, abs=RANKS[entry.matrix.role] + 1)
        assert entry.reason.startswith(f"{entry.matrix.role}: ")


@pytest.mark.parametrize("structure", [LowRank, KroneckerSum])
def test_large_embeddings_stay_smaller_than_the_rest(structure: type[Structure]) -> None:
    matrices, rest = transformer(256, blocks=6, vocabulary=30_000, positions=512), Cost(1000, 4000, 0)
    entries = by_role(matrices, candidates_of(structure), 12, rest)
    embeddings, others = parts(entries, rest)
    assert 0.9 * others < embeddings < others  # as large as they may be
    equal = uniform(matrices, candidates_of(structure), 12, rest)
    assert parts(equal, rest)[0] > parts(equal, rest)[1]  # which takes a rule
