"""The embedded all-MiniLM-L6-v2: verified, compressed, and loaded by sentence-transformers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from factorformer.errors import CheckpointError, ModelError
from factorformer.hf import minilm as embedded
from factorformer.tasks.docstrings import stdlib_docstrings


def test_the_weights_are_those_of_the_original(minilm: Path) -> None:
    assert embedded.directory() == minilm


def test_without_the_package(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODULE", "no_such_package")
    with pytest.raises(ModelError, match=r"factorformer\[minilm\]"):
        embedded.directory()
    assert run("compress", "minilm", tmp_path / "small").exit_code == 2


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    spec = importlib.machinery.ModuleSpec("package", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match="incomplete"):
        embedded.directory()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="all-MiniLM-L6-v2"):
        embedded.directory()


def test_a_compressed_sentence_encoder_is_one_still(run: Any, minilm: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    output, text = tmp_path / "small", tmp_path / "calibration.jsonl"
    task, options = stdlib_docstrings(), ("--ratio", 2, "--calibration", text, "--max-length", 48, "--json")
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in task["train"]["text"][:60]))
    done = run("compress", "minilm", output, "--method", "whitened", *options)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    original, compressed = (
        sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(
            task["test"]["text"][:8], convert_to_tensor=True
        )
        for path in (minilm, output)
    )
    assert compressed.shape == (8, 384)
    assert torch.allclose(compressed.norm(dim=1), torch.ones(8), atol=1e-5)  # the Normalize module survived
    assert cosine_similarity(original, compressed).mean() > 0.6  # plain SVD: 0.34
