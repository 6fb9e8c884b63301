"""Memory, load time and file size, in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import MODELS
from transformers import BertConfig, BertModel

from factorformer.bench.candidates import Candidate, parse
from factorformer.bench.comparison import Shape
from factorformer.bench.footprint import footprint, measure
from factorformer.errors import ModelError


def test_memory_follows_the_model_and_not_what_was_imported(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, vocab_size=100
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    ballast = torch.zeros(2**28, dtype=torch.uint8) + 1  # this process's memory is none of the other's
    found = footprint(parse(str(tmp_path / "model")), Shape(1, 4), threads=1)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert found.file_bytes == size > 75e6
    assert size < found.peak_bytes < 2.5 * size < ballast.numel()
    assert found.load_milliseconds > 0
    assert found.import_bytes > 100e6
    assert found.gpu_peak_bytes is None


def test_a_variant_without_a_file_is_saved_to_be_weighed(tmp_path: Path) -> None:
    MODELS["bert"].build().save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    candidate = parse(f"bf16:{tmp_path / 'model'}")
    found = measure(candidate, Shape(1, 4), torch.get_num_threads(), torch.device("cpu"), seed=0, vocabulary=None)
    assert 0 < found.file_bytes < size


@pytest.mark.usefixtures("forked_footprints")
def test_a_process_that_fails_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="/gone'"):
        footprint(Candidate(str(tmp_path / "gone"), tmp_path / "gone"), Shape(1, 4), threads=1)
