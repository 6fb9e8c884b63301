"""Every structure keeps the contract. A new structure is a few cases more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.contracts.structure import Case, StructureContract, never_dense  # noqa: F401

from factorformer.errors import ModelError
from factorformer.structures import STRUCTURES, LowRank, largest_rank

CASES = [
    Case(LowRank(rank), shape, smaller=LowRank(max(rank // 2, 1)), refused=(LowRank(rank + 1),))
    for rank, shape in [
        (1, (5, 7)),  # the smallest rank
        (4, (24, 16)),  # tall
        (4, (16, 24)),  # wide
        (9, (20, 20)),  # the largest rank below break-even
    ]
]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestStructures(StructureContract):
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
