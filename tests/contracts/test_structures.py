"""Every structure keeps the contract. A new structure is a few cases more."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contracts.int8 import Int8Contract
from tests.contracts.structure import Case, StructureContract, never_dense  # noqa: F401

from factorformer.errors import ModelError
from factorformer.structures import STRUCTURES, DenseSparse, KroneckerSum, LowRank, factor_shapes, largest_rank

CASES = [
    Case(LowRank(rank), shape, smaller=LowRank(max(rank // 2, 1)), refused=(LowRank(rank + 1),))
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
    CASES.append(
        Case(
            KroneckerSum(rank, left, right),
            shape,
            smaller=KroneckerSum(1, left, right),
            refused=(KroneckerSum(rank + 1, left, right), KroneckerSum(1, (left[0] + 1, left[1]), right), LowRank(1)),
            listed=sides is None,
        )
    )
for shape, (atoms, nonzeros, side, group, blocks), listed in [
    ((48, 20), (16, 4, "rows", 1, 1), True),  # positions in one byte
    ((48, 24), (16, 5, "rows", 1, 1), False),  # a bitmap
    ((20, 48), (16, 4, "columns", 1, 1), True),  # wide
    ((20, 48), (8, 3, "rows", 1, 1), False),  # atoms along the longer dimension
    ((40, 22), (10, 4, "rows", 4, 1), False),  # groups share a support
    ((24, 40), (12, 6, "columns", 2, 3), False),  # 2:4, in groups
    ((64, 36), (40, 2, "rows", 1, 1), False),  # more atoms than the shorter side
    ((700, 330), (300, 6, "rows", 1, 1), False),  # positions in two bytes
    ((700, 330), (300, 6, "columns", 1, 2), False),  # and in one, inside of blocks
    ((9, 12), (3, 1, "columns", 1, 1), True),  # the smallest
]:
    spec = DenseSparse(atoms, nonzeros, side, group, blocks)
    CASES.append(
        Case(
            spec,
            shape,
            smaller=dataclasses.replace(spec, nonzeros=blocks),
            refused=(
                dataclasses.replace(
                    spec, nonzeros=1 if blocks == 1 else blocks, side="rows" if side == "columns" else "columns"
                ),
                dataclasses.replace(spec, atoms=atoms + blocks),
                LowRank(1),
            ),
            listed=listed,
        )
    )


@pytest.mark.parametrize("case", CASES, ids=str)
class TestStructures(StructureContract):
    pass


@pytest.mark.parametrize("case", CASES, ids=str)
class TestInt8(Int8Contract):
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
    with pytest.raises(ModelError, match=f"allowed: 1 to {rank}; keep the matrix dense"):
        LowRank(rank + 1).check(shape)


def test_layers_compile_and_export_in_one_graph() -> None:
    code = (
        "from tests.contracts.structure import check_graphs; from tests.contracts.test_structures import CASES\n"
        "for case in CASES: check_graphs(case)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
