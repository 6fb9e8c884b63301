"""Every structure keeps the contract. A new structure is a few cases more."""

from __future__ import annotations

import pytest
from tests.contracts.integers import IntegersContract
from tests.contracts.structure import (
    Case,
    KindContract,
    StructureContract,
    check_graphs_elsewhere,
    never_dense,  # noqa: F401
)

from factorformer.errors import ModelError
from factorformer.structures import STRUCTURES, DenseSparse, KroneckerSum, LowRank, factor_shapes, largest_rank

CASES = [
    Case(LowRank(rank), shape)
    for rank, shape in [
        (1, (5, 7)),  # the smallest rank
        (4, (24, 16)),  # tall
        (4, (16, 24)),  # wide
        (9, (20, 20)),  # the largest rank below break-even
    ]
]
for shape, rank, sides in [
    ((24, 16), 3, None),  # tall
    ((16, 24), 5, None),  # wide
    ((5, 7), 1, None),  # nothing to take apart
    ((17, 19), 2, None),  # padded on both sides
    ((20, 20), 9, None),  # the largest rank below break-even
    ((20, 24), 2, ((5, 6), (4, 4))),  # right factors first
    ((20, 24), 3, ((2, 2), (10, 12))),  # left factors first
    ((23, 22), 1, ((3, 3), (8, 8))),  # left factors first, padded
    ((90, 100), 1, ((9, 10), (10, 10))),  # rows by gathering
    ((89, 97), 2, ((9, 10), (10, 10))),  # rows by gathering, padded
    ((32, 24), 2, ((1, 24), (32, 1))),  # outer products the other way round
]:
    left, right = sides or factor_shapes(shape)
    CASES.append(Case(KroneckerSum(rank, left, right), shape, listed=sides is None))
for shape, (atoms, nonzeros, side), listed in [
    ((48, 20), (16, 4, "rows"), True),  # positions in one byte
    ((48, 24), (16, 5, "rows"), False),  # a bitmap
    ((20, 48), (16, 4, "columns"), True),  # wide
    ((20, 48), (8, 3, "rows"), False),  # atoms along the longer dimension
    ((64, 36), (40, 2, "rows"), False),  # more atoms than the shorter side
    ((700, 330), (300, 6, "rows"), False),  # positions in two bytes
    ((9, 12), (3, 1, "columns"), True),  # the smallest
]:
    CASES.append(Case(DenseSparse(atoms, nonzeros, side), shape, listed))


PATHS = (1, 4, 7, 9, 11, 13, 15, 16, 17, 20)
"""Cases that take different paths through the code: one of low rank, Kronecker sums by order and padding, supports by
code and side."""


@pytest.mark.parametrize("case", CASES, ids=str)
class TestStructures(StructureContract):
    pass


@pytest.mark.parametrize("case", CASES, ids=str)
class TestInt8(IntegersContract):
    pass


@pytest.mark.parametrize("case", [CASES[place] for place in PATHS], ids=str)
class TestInt4(IntegersContract):
    bits = 4


@pytest.mark.parametrize("case", [CASES[place] for place in PATHS], ids=str)
class TestInt3(IntegersContract):
    bits = 3


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
class TestKinds(KindContract):
    pass


def test_every_structure_is_among_the_cases() -> None:
    assert {type(case.spec) for case in CASES} == set(STRUCTURES.values())


@pytest.mark.parametrize("shape", [(20, 20), (24, 16), (16, 24), (7, 3), (1, 9)], ids=str)
def test_break_even_rank_of_low_rank(shape: tuple[int, int]) -> None:
    rank, dense = largest_rank(shape), shape[0] * shape[1]
    if rank:
        LowRank(rank).check(shape)
        assert LowRank(rank).parameters(shape) < dense
    assert LowRank(rank + 1).parameters(shape) >= dense
    with pytest.raises(ModelError, match=f"allowed: 1 to {rank}; "):
        LowRank(rank + 1).check(shape)


@pytest.mark.slow
def test_layers_compile_and_export_in_one_graph() -> None:
    """And dense matrices in int8, and whole chains, compiled: all in one process, whose start takes longest.

    Three of the cases are twins of others in what is compiled.
    """
    check_graphs_elsewhere(
        "from tests.kernels import graph_worker\ngraph_worker.main()\n"
        "from factorformer.structures import Dense\nfrom tests.contracts.structure import Case\n"
        "from tests.contracts.test_structures import CASES, PATHS\n"
        "cases = [*(CASES[place] for place in PATHS if place not in (4, 16, 20)), Case(Dense(), (24, 16))]"
    )
