"""Models of many layers are listed by role, and nothing of them is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from factorformer.layers.matrix import Cost, Matrix, total
from factorformer.planning import Entry
from factorformer.report import Result
from factorformer.report.groups import grouped, ranges, spread
from factorformer.report.tables import show
from factorformer.structures import DenseSparse, LowRank, Structure


def entry(name: str, spec: Structure | None, reason: str = "", shape: tuple[int, int] = (64, 32)) -> Entry:
    return Entry(Matrix(name, shape), spec, reason)


def test_roles_of_all_layers() -> None:
    entries = [
        entry("embed", None, "not in the plan", (99, 32)),
        *(entry(f"layers.{i}.attn.q", LowRank(5 + i), f"reason {i}") for i in range(12)),
        *(entry(f"layers.{i}.mlp.up", LowRank(8), "the same") for i in range(12)),
    ]
    groups = grouped(entries)
    assert [(g.name, g.count, g.form, g.note) for g in groups] == [
        ("embed", 1, "dense", "not in the plan"),
        ("layers.*.attn.q", 12, "low_rank(rank=5 to 16)", ""),
        ("layers.*.mlp.up", 12, "low_rank(rank=8)", "the same"),
    ]
    assert [g.shape for g in groups] == [(99, 32), (64, 32), (64, 32)]
    for side in ("original", "compressed"):
        assert total(getattr(g, side) for g in groups) == total(getattr(e, side) for e in entries)


def test_layers_that_are_stored_otherwise() -> None:
    kinds = [None if i in (0, 4, 5) else DenseSparse(16, 4) if i == 9 else LowRank(5) for i in range(10)]
    groups = grouped([entry(f"m.layers.{i}.up", kind) for i, kind in enumerate(kinds)])
    assert [(g.name, g.form) for g in groups] == [
        ("m.layers.[0,4-5].up", "dense"),
        ("m.layers.[1-3,6-8].up", "low_rank(rank=5)"),
        ("m.layers.9.up", "dense_sparse(atoms=16, nonzeros=4, side=rows)"),
    ]


def test_experts_of_all_layers() -> None:
    groups = grouped([entry(f"layers.{i}.experts.{j}.up", LowRank(3 + j)) for i in range(3) for j in range(4)])
    assert [(g.name, g.count, g.form) for g in groups] == [("layers.*.experts.*.up", 12, "low_rank(rank=3 to 6)")]


@pytest.mark.parametrize(
    ("numbers", "expected"), [([3], "3"), ([0, 1], "0-1"), ([5, 1, 2, 3, 9], "1-3,5,9"), (range(100), "0-99")]
)
def test_ranges(numbers: list[int], expected: str) -> None:
    assert ranges(numbers) == expected


def test_numbers_are_compared_as_such() -> None:
    assert spread(["a9b10", "a11b2", "a10b2"]) == "a9 to 11b2 to 10"
    assert spread(["none", "none"]) == "none"


def test_long_tables_are_short_unless_asked() -> None:
    entries = [entry(f"layers.{i}.{name}", LowRank(4)) for i in range(60) for name in ("up", "down")]
    result = Result(Cost(8, 32, 16), Cost(4, 16, 8), "blocks", layers=entries)
    lines = {}
    for each in (False, True):
        console = Console(file=io.StringIO(), width=160)
        show(result, console, each=each)
        assert isinstance(console.file, io.StringIO)
        lines[each] = [line for line in console.file.getvalue().splitlines() if "layers." in line]
    assert [len(lines[each]) for each in (False, True)] == [2, 120]
    assert lines[False][0].split()[:2] == ["layers.*.up", "60"]
