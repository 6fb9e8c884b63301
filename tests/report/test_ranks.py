"""Histories of ranks as tables and images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from factorformer.errors import OutputError
from factorformer.report.ranks import heat_map, ranks_table
from factorformer.training.rank_history import RankHistory


def history(removals: int = 9) -> RankHistory:
    found = RankHistory(["block.0.query", "block.0.[key]"], ["low_rank"] * 2, [40, 80])
    for number in range(removals):
        found.add(10 * (number + 1), [40 - 3 * number, 80 - 8 * number], [0.5, 0.25])
    return found


def shown(found: RankHistory) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(ranks_table(found))
    return capture.get()


def test_the_table_shows_the_way_and_the_end() -> None:
    lines = shown(history()).splitlines()
    header = next(line for line in lines if "matrix" in line)
    assert header.split() == ["matrix", "start", "10", "30", "40", "60", "70", "90", "of", "start", "score"]
    assert next(line for line in lines if "query" in line).split()[1:] == [
        *["40", "40", "34", "31", "25", "22", "16"],
        "40%",
        "0.5",
    ]
    assert "block.0.[key]" in shown(history())


@pytest.mark.parametrize("removals", [0, 1])
def test_short_histories(removals: int, tmp_path: Path) -> None:
    assert "100%" in shown(history(removals))
    heat_map(history(removals), tmp_path / "map.svg")


@pytest.mark.parametrize("name", ["map.svg", "map.png", "map.pdf"])
def test_an_image(name: str, tmp_path: Path) -> None:
    heat_map(history(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[name[-3:]])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"image.*\.svg, \.png, \.pdf"):
        heat_map(history(), tmp_path / "map.txt")
    with pytest.raises(OutputError, match="cannot write the image"):
        heat_map(history(), tmp_path / "missing" / "map.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"pip install 'factorformer.plot.'"):
        heat_map(history(), tmp_path / "map.svg")
