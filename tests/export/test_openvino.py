"""Exported files compute in OpenVINO what torch computes, for batches of any shape."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import openvino
import pytest
import torch
from tests.export.once import translate_once
from tests.export.test_onnx import SHAPES, batch, structured
from tests.tiny import VOCABULARY
from transformers import BertTokenizer

from factorformer.errors import DataError, ExportError
from factorformer.export import openvino as exporter
from factorformer.export.openvino import export
from factorformer.layers.nn import FactorizedMatrix


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*marks, *WORDS])})


WORDS = [f"w{i}" for i in range(VOCABULARY - 5)]
DRAWS = random.Random(0)
TEXTS, OTHERS = ([" ".join(DRAWS.choices(WORDS, k=1 + i % 20)) for i in range(n)] for n in (60, 30))


DRAWN = [batch(*shape) for shape in SHAPES]


def deviation(
    directory: Path, model: Callable[..., torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]
) -> float:
    """The largest difference between OpenVINO, which computes in float32, and torch, relative to torch's output."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    running = openvino.Core().compile_model(directory / "openvino_model.xml", "CPU", settings)
    found = []
    for inputs in batches:
        with torch.inference_mode():
            expected = model(**inputs)
        got = torch.from_numpy(running({name: tensor.numpy() for name, tensor in inputs.items()})[0])
        assert got.shape == expected.shape
        found.append(float((got - expected).norm() / expected.norm()))
    return max(found)


@pytest.mark.parametrize("kind", ["low_rank", "dense_sparse"])
def test_all_structures(kind: str, tokenizer: BertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    model = structured(kind, blocks=1)
    size = sum(p.numel() for p in model.parameters())
    done = export(model, tmp_path / "out", tokenizer=tokenizer)
    assert (done.inputs, done.output) == (("input_ids", "attention_mask", "token_type_ids"), "logits")
    assert 1e-7 < done.deviation < 0.03  # in bfloat16, where the processor has it
    assert done.cosine > 0.999
    assert deviation(tmp_path / "out", lambda **x: model(**x).logits, DRAWN) < 2e-3
    files = [tmp_path / "out" / name for name in ("openvino_model.xml", "openvino_model.bin")]
    assert done.file_bytes == sum(file.stat().st_size for file in files)
    small = export(model, tmp_path / "int8", int8=True, tokenizer=tokenizer, texts=TEXTS)
    assert 1e-3 < small.deviation < 0.2
    assert small.cosine > 0.97
    spoken = [tokenizer(part, padding=True, return_tensors="pt") for part in (OTHERS[:4], OTHERS[4:11], OTHERS[11:])]
    assert deviation(tmp_path / "int8", lambda **x: model(**x).logits, spoken) < 0.2
    weights = (tmp_path / "int8" / "openvino_model.bin").stat().st_size
    assert weights < 0.7 * files[1].stat().st_size
    if kind == "low_rank":  # in its factors, and not in their product
        assert files[1].stat().st_size < 2.1 * size
    assert sorted(file.name for file in (tmp_path / "int8").iterdir()) == [
        *("config.json", "openvino_model.bin", "openvino_model.xml", "tokenizer.json", "tokenizer_config.json"),
    ]


def test_factors_that_are_stored_in_integers(
    tokenizer: BertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translate_once(monkeypatch)
    model = structured("dense_sparse", blocks=1)
    for module in model.modules():
        if isinstance(module, FactorizedMatrix):
            module.quantize()
    export(model, tmp_path / "out")
    assert deviation(tmp_path / "out", lambda **x: model(**x).logits, DRAWN) < 0.05  # torch multiplies in int8
    assert export(model, tmp_path / "int8", int8=True, tokenizer=tokenizer, texts=TEXTS).deviation < 0.2
    weights = [(tmp_path / name / "openvino_model.bin").stat().st_size for name in ("out", "int8")]
    assert weights[1] < 0.7 * weights[0]


def test_what_is_missing_is_said(tokenizer: BertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = structured("low_rank")
    with pytest.raises(DataError, match="give text"):
        export(model, tmp_path / "out", int8=True, tokenizer=tokenizer)
    with pytest.raises(ExportError, match="no tokenizer"):
        export(model, tmp_path / "out", int8=True, texts=TEXTS)
    with pytest.raises(ExportError, match=r"in memory .*'openvino'"):
        export(model, None)
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(ExportError, match=r"nncf: pip install 'factorformer\[openvino\]'"):
        export(model, tmp_path / "out", int8=True, tokenizer=tokenizer, texts=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = structured("low_rank")
    right = exporter._converted

    def mistaken(subject: object) -> object:
        for p in subject.task.model.parameters():  # type: ignore[attr-defined]
            p.data.mul_(1.01)
        return right(subject)  # type: ignore[arg-type]

    monkeypatch.setattr(exporter, "_converted", mistaken)
    with pytest.raises(ExportError, match=r"OpenVINO deviates from torch by .* more than the 0\.0001 allowed"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
