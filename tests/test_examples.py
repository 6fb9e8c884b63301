"""The scripts in examples/ run from their first line to their last, on tiny models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import base, decoder, tables  # noqa: F401

import factorformer
from factorformer.hf.attachment import described

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object) -> None:
    """In the present directory, which is where examples write."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_encoder(base: Path, tables: Path, tmp_path: Path) -> None:  # noqa: F811
    run("encoder.py", base, tables / "texts.txt", 0.02)
    assert described(factorformer.load(tmp_path / "encoder").config) is not None
    assert (tmp_path / "encoder" / "modules.json").exists()


def test_classifier(base: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run("classifier.py", base, tables / "train.jsonl", 4)
    assert described(factorformer.load(tmp_path / "classifier").config) is not None
    assert "trained: " in capsys.readouterr().out


def test_decoder(decoder: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run("decoder.py", decoder, tables / "texts.txt", 0.02, 12)
    assert described(factorformer.load(tmp_path / "decoder").config) is not None
    assert "healed: {'original_perplexity'" in capsys.readouterr().out
