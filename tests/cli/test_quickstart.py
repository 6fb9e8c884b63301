"""The whole demonstration on a tiny model and a tiny task; the real one takes minutes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.cli.conftest import BAD, GOOD

from factorformer.cli._jobs import quickstart as demonstration

TEXTS = [f"{word} {word} {thing}" for thing in ("film", "book") for word in (*GOOD, *BAD)] * 4
LABELS = (["plus"] * 4 + ["minus"] * 4) * 8


@pytest.fixture(autouse=True)
def small(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "MODEL", str(base))
    monkeypatch.setattr(demonstration, "RATIO", 2.0)
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    monkeypatch.setattr(demonstration, "stdlib_docstrings", lambda: {"train": rows, "test": rows})


def test_quickstart(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("quickstart", "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["output"] == "factorformer-quickstart"
    assert content["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    measured = {"accuracy", "latency_ms_batch_1", "latency_ms_batch_32", "file_bytes"}
    assert {*measured, *(f"original_{name}" for name in measured), "majority_accuracy"} <= set(content["metrics"])
    assert content["metrics"]["original_file_bytes"] > content["metrics"]["file_bytes"]
    assert re.search("64 docstrings .*64 .*2 classes", done.stderr)
    assert "identical, bit for bit" in done.stderr
    again = run(
        "evaluate", "factorformer-quickstart/compressed", "--data", "factorformer-quickstart/test.jsonl", "--json"
    )
    assert json.loads(again.stdout)["metrics"]["accuracy"] == content["metrics"]["accuracy"]
    monkeypatch.setattr(demonstration, "_check_reload", lambda *_: None)  # done above
    shown = run("quickstart")
    assert shown.exit_code == 0
    (row,) = (line.split() for line in shown.stdout.splitlines() if "majority" in line)
    assert row == ["majority", "accuracy", "0.5000", "0.5000"]
    assert (tmp_path / "factorformer-quickstart-2").is_dir()


def test_the_encoder(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "ENCODER_RATIO", 4.0)
    monkeypatch.setattr(demonstration, "ENCODER_MINUTES", 0.02)
    done = run("quickstart", "--encoder", "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    metrics = content["metrics"]
    assert metrics["original_file_bytes"] > 2 * metrics["file_bytes"]
    assert 0 < metrics["test_embedding_cosine"] <= 1
    assert {"test_neighbour_recall", "test_nearest_neighbour_accuracy", "test_logistic_regression_accuracy"} <= set(
        metrics
    )
    assert content["bytes"]["ratio"] == pytest.approx(4, rel=0.01)
    assert {"train.jsonl", "test.jsonl", "compressed"} <= {path.name for path in (tmp_path / "out").iterdir()}
    shown = run("quickstart", "--encoder", "--output", tmp_path / "again")
    assert shown.exit_code == 0
    assert "--against minilm" in shown.stderr
    inner = json.loads((tmp_path / "again" / "compressed" / "factorformer.json").read_text())
    assert inner["output"] == str(tmp_path / "again" / "compressed")
    assert (tmp_path / "again" / "compressed" / "modules.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_that_reloads_differently_is_not_left_behind(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (
        "import sys, numpy; from safetensors.numpy import save_file; "
        f"save_file({{{{'logits': numpy.ones(({demonstration.CHECKED_ROWS}, 2), 'float32')}}}}, sys.argv[3])"
    )
    monkeypatch.setattr(demonstration, "RELOAD", other)
    done = run("quickstart", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "other logits" in done.stderr
    monkeypatch.setattr(demonstration, "RELOAD", "raise SystemExit('no way')")
    done = run("quickstart", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "no way" in done.stderr
    assert list(tmp_path.iterdir()) == []
