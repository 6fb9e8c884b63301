"""The benchmark of sentence encoders: other models are no larger, nothing that judges is learned, and the picture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.conftest import ROOT

import factorformer


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """The benchmark, and its texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("encoders"), importlib.import_module("sentences")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "original"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 128}
    tf.BertModel(tf.BertConfig(**sizes, vocab_size=99), add_pooling_layer=False).save_pretrained(path)
    return path


def test_a_student_of_fewer_layers_is_no_larger(scripts: tuple[Any, Any], original: Path, tmp_path: Path) -> None:
    encoders, _ = scripts
    sizes = {}
    for layers in (4, 3, 1):
        model = tf.AutoModel.from_pretrained(original)
        model.encoder.layer = model.encoder.layer[:layers]
        sizes[layers] = encoders.in_int8(model) + encoders.HEADER
    for layers, size in sizes.items():
        assert encoders.fewer_layers(original, tmp_path / f"{layers}", size) == layers
        student, whole = (tf.AutoModel.from_pretrained(path) for path in (tmp_path / f"{layers}", original))
        assert student.config.num_hidden_layers == len(student.encoder.layer) == layers
        kept = [0, 4] if layers > 1 else [0]
        for place, of in zip((0, -1), kept, strict=False):
            expected = whole.encoder.layer[of].output.dense.weight
            assert torch.equal(student.encoder.layer[place].output.dense.weight, expected)
        factorformer.compress(student, factorformer.plan(student, "svd", 3.7, "all", int8=True))
        student.save_pretrained(tmp_path / f"{layers}-int8")
        assert size - encoders.HEADER < encoders.weight_bytes(tmp_path / f"{layers}-int8") <= size
    assert encoders.fewer_layers(original, tmp_path / "most", 10**9) == 4
    assert encoders.fewer_layers(original, tmp_path / "none", sizes[1] - 10**4) == 0


def test_what_is_done_is_not_done_again(
    scripts: tuple[Any, Any], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders, _ = scripts
    output, record = tmp_path / "small", tmp_path / "small-run.json"
    said = [str(part) for part in (encoders.FACTORFORMER, "compress", original, output, "--ratio", 2, "--scope", "all")]
    # As after an interruption without a checkpoint, from which nothing goes on.
    record.write_text(json.dumps({"command": [*said, "--method", "svd"], "seconds": 1e6}))
    made = encoders.compressed(original, output, 2, "--method", "svd")
    assert made["before"] == 0
    assert encoders.weight_bytes(output) < encoders.weight_bytes(original) / 1.9
    run = json.loads(record.read_text())
    assert 1e5 > run["seconds"] >= made["seconds"]["total"]
    monkeypatch.setattr(encoders.subprocess, "Popen", None)
    again = encoders.compressed(original, output, 2, "--method", "svd")
    assert again == {**made, "before": run["seconds"]}


def test_nothing_that_is_judged_by_is_learned(scripts: tuple[Any, Any], data: Path) -> None:
    _, sentences = scripts
    learned, judged = sentences.split(data)
    bare = set(map(sentences.bare, judged))
    assert len(learned) > 100_000
    assert len(judged) == sentences.JUDGED
    for name in ("mrpc", "banking77", "sst2"):
        table = sentences.data.read(data / name / "test.tsv")
        bare |= {sentences.bare(text) for column in sentences.TASKS[name].text for text in table[column]}
    assert not [text for text in learned if sentences.bare(text) in bare]
    fewer, same = sentences.split(data, ["banking77"])
    assert same == judged
    questions = set(sentences.data.read(data / "banking77" / "train.tsv")["text"])
    assert questions & set(learned)
    assert not questions & set(fewer)
    passages = sentences.passages(data)
    assert len(passages) == sentences.PASSAGES
    assert all(100 <= len(text.split()) <= 200 for text in passages)


def test_embeddings_of_other_dimensions_are_measured(scripts: tuple[Any, Any]) -> None:
    """As those that static embeddings of fewer bytes have."""
    encoders, _ = scripts
    torch.manual_seed(0)
    names = {"corpus": 40, "passages": 12, "first": 30, "second": 30, "banking77": 30, "sst2": 30}
    judge = encoders.Judge.__new__(encoders.Judge)
    judge.wanted = {name: torch.randn(count, 16) for name, count in names.items()}
    judge.texts = {name: [str(place) for place in range(count)] for name, count in names.items()}
    judge.same = [place % 2 for place in range(30)]
    judge.classes = {name: ([], [place % 2 for place in range(30)]) for name in ("banking77", "sst2")}
    for width, more in ((16, {"embedding_cosine", "passage_cosine"}), (8, set())):
        found = judge.measure(lambda texts, width=width: torch.randn(len(texts), width))
        assert {name for name in found if name.endswith("_cosine")} == more
        assert 0 <= found["neighbour_recall"]["value"] < 0.7
        assert "difference_value" in found["mrpc_auc"]


def test_rivals_have_as_many_bytes_as_ours(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    encoders, _ = scripts
    row = {"contestant": "factorformer", "model": "m", "ratio": 10.0, "bytes": 90}
    rows = [{**row, "values": "int8"}, {**row, "values": "int4", "bytes": 80}, {**row, "values": "int4", "ratio": 20.0}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    assert encoders._limit(tmp_path / "rows.jsonl", "m", 10.0) == 80
    assert encoders._limit(tmp_path / "rows.jsonl", "m", 4.0) is None


def test_a_picture_has_one_point_for_each_size(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    encoders, _ = scripts

    lines: list[tuple[str, list[float], list[float]]] = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **k: lines.append((k["label"], x, y)) or plot(self, x, y, *a, **k)
    )

    def row(contestant: str, ratio: float, size: int, minutes: float, recall: float, **more: Any) -> dict[str, Any]:
        uses = {"neighbour_recall": {"value": recall}, "mrpc_auc": {"value": 0.8, "difference_value": recall - 1}}
        return {"contestant": contestant, "ratio": ratio, "bytes": size, "minutes": minutes, "uses": uses, **more}

    rows = [
        row("factorformer", 20, 4_500_100, 30, 0.7, values="int4"),
        row("factorformer", 20, 4_500_000, 10, 0.6, values="int4"),
        row("factorformer", 10, 9_000_000, 10, 0.8, values="int4"),
        row("int8", 4, 22_000_000, 0, 0.9),
    ]
    encoders.draw(rows, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert lines[0] == ("factorformer int4", [4.5001, 9.0], [0.7, 0.8])
    assert lines[1][2] == pytest.approx([-30, -20])
    assert lines[2] == ("int8", [22.0], [0.9])
