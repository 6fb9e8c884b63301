"""No command replaces what it reads, what holds it, or what is not a model's; and each says so before its work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_errors import check

COMMANDS = (
    ("compress", "{base}", "{output}"),
    ("finetune", "{base}", "{output}", "--train", "{data}"),
    ("export", "{base}", "--output", "{output}"),
    ("train", "{output}", "--train", "{data}", "--config", "{base}"),
    ("plan", "{base}", "--calibration", "{data}", "--output", "{output}"),
    ("inspect", "{base}", "--ranks", "{output}"),
)


@pytest.fixture
def home(base: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a table and a text, in which nothing may change; no model can be loaded."""
    shutil.copytree(base, tmp_path / "home" / "model")
    shutil.copy(tables / "train.jsonl", tmp_path / "home" / "train.jsonl")
    (tmp_path / "home" / "thesis.txt").write_text("not a model")

    def late(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded before the output was looked at")

    monkeypatch.setattr("factorformer.hf.source.load_model", late)
    return tmp_path / "home"


def test_no_output_costs_other_files(run: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "web").mkdir()
    (home / "web" / "config.json").write_text(json.dumps({"port": 80}))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    places = (home, home / "model", home / "model" / "small", home / "web", Path.cwd(), Path("/"), Path.home())
    for command in COMMANDS:
        for place in places:
            values = {"base": home / "model", "data": home / "train.jsonl", "output": place}
            done = run(*(part.format(**values) for part in command), "--overwrite")
            assert done.exit_code == 2, (command, place)
            assert str(place) in done.stderr
            assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_files_that_cannot_be_written_are_found_before_the_work(run: Any, home: Path) -> None:
    for command in COMMANDS[-2:]:
        for place, message in (
            (home / "missing" / "file.svg", "no directory"),
            (home / "train.jsonl" / "file.svg", "not a directory"),
            (home / "model", "is a directory"),
        ):
            values = {"base": home / "model", "data": home / "train.jsonl", "output": place}
            check(run(*(part.format(**values) for part in command)), message)
