"""The card that the command line writes: what was done, what was measured, and whose model it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from factorformer.files import RESULT_FILE


def test_of_a_classifier(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    small, data = tmp_path / "small", tables / "train.jsonl"
    (trained / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-classification\n---\n# The original\n")
    arguments = ("--ratio", 2, "--train", data, "--eval", data, "--label", "label", "--epochs", 1)
    done = run("compress", trained, small, *arguments, "--json")
    (trained / "README.md").unlink()
    assert done.exit_code == 0, done.stderr
    card = (small / "README.md").read_text()
    metrics = json.loads((small / RESULT_FILE).read_text())["metrics"]
    assert metadata_load(small / "README.md") == {
        "library_name": "transformers",
        "tags": ["factorformer"],
        "license": "mit",
        "pipeline_tag": "text-classification",
        "metrics": [name for name in metrics if not name.startswith(("original_", "fitted_", "predicted_"))],
    }
    row = next(line for line in card.splitlines() if line.startswith("| accuracy"))
    cells = [float(cell) for cell in row.strip("| ").split("|")[1:]]
    expected = [metrics[f"{prefix}accuracy"] for prefix in ("original_", "fitted_", "")]
    assert cells == pytest.approx(expected, rel=1e-3)
    assert "BertForSequenceClassification.from_pretrained" in card
    assert (small / "README.original.md").read_text().endswith("# The original\n")
    assert "(README.original.md)" in card
    # A directory with both is one that --overwrite may replace.
    done = run("compress", trained, small, "--ratio", 3, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "was not measured" in (small / "README.md").read_text()
    assert not (small / "README.original.md").exists()


def test_of_a_sentence_encoder(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    done = run("compress", base, small, "--ratio", 2, "--calibration", tables / "texts.txt")
    assert done.exit_code == 0, done.stderr
    known = metadata_load(small / "README.md")
    assert known is not None
    assert known["library_name"] == "sentence-transformers"
    assert known["pipeline_tag"] == "sentence-similarity"
    assert (small / "README.original.md").read_text() == (base / "README.md").read_text()
    assert "was not measured" in (small / "README.md").read_text()  # what a plan predicts is no measurement


def test_of_what_is_made_block_by_block(run: Any, base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    done = run("compress", base, small, "--ratio", 2, "--stream", "--method", "svd")
    assert done.exit_code == 0, done.stderr
    assert "by its method `svd`" in (small / "README.md").read_text()
    assert (small / "README.original.md").exists()
