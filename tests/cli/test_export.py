"""`factorformer export` writes a directory that runs without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import transformers
from tests.cli.conftest import WORDS
from tests.cli.test_commands import result_of
from tests.cli.test_errors import check
from tests.export.once import translate_once
from transformers import AutoTokenizer

import factorformer
from factorformer.bench.candidates import load, parse
from factorformer.export import openvino as openvino_export
from factorformer.export.sentence import find_layout
from factorformer.export.subject import check_exportable
from factorformer.files import check_output


@pytest.fixture(autouse=True)
def _timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorformer.cli.export.SECONDS", 0.01)


def test_a_compressed_sentence_encoder(run: Any, base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert run("compress", base, small, "--ratio", 2).exit_code == 0
    content = result_of(run("export", small, "--to", "onnx", "--json"))
    output = tmp_path / "small-onnx"
    assert content["output"] == str(output)
    assert content["metrics"]["file_bytes"] == (output / "model.onnx").stat().st_size
    assert content["metrics"]["deviation"] < 1e-5
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == 24
    inputs = tokenizer(["a good film", "the book"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = factorformer.load(small)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    session = onnxruntime.InferenceSession(output / "model.onnx")
    found = session.run(["sentence_embedding"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    assert np.allclose(found, ((hidden * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)


def test_a_classifier_in_int8(run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has neither torch nor transformers nor this package."""
    translate_once(monkeypatch)
    output = tmp_path / "exported"
    content = result_of(run("export", trained, "--output", output, "--int8", "--json"))
    assert content["metrics"]["deviation"] < 0.2
    check(run("export", trained, "--output", output), "exists already")
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "factorformer"]))
import json, numpy, onnxruntime, tokenizers
tokenizer = tokenizers.Tokenizer.from_file("{output}/tokenizer.json")
session = onnxruntime.InferenceSession("{output}/model.onnx")
labels = json.load(open("{output}/config.json"))["id2label"]
for text in ("good film", "awful book"):
    read = tokenizer.encode(text)
    values = {{"input_ids": read.ids, "attention_mask": read.attention_mask, "token_type_ids": read.type_ids}}
    inputs = {{value.name: numpy.array([values[value.name]], numpy.int64) for value in session.get_inputs()}}
    print(labels[str(session.run(["logits"], inputs)[0].argmax())])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["plus", "minus"], done.stderr
    assert run("export", trained, "--output", output, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["--to", "pickle"], "'--to'"),
    ],
)
def test_mistakes(run: Any, base: Path, arguments: list[str], message: str) -> None:
    done = run("export", *([base] if arguments[0].startswith("--") else []), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_directory_without_a_tokenizer(run: Any, base_copy: Path, tmp_path: Path) -> None:
    for file in base_copy.glob("tokenizer*"):
        file.unlink()
    check(run("export", base_copy, "--output", tmp_path / "out"), "has no tokenizer")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_before_weights_are_read(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = transformers.T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(translator).save_pretrained(tmp_path / "t5")
    bert = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    # Trained heads of this class cannot be exported; a file without them holds a model that can.
    body = transformers.BertModel(bert)
    body.config.architectures = ["BertForPreTraining"]
    body.save_pretrained(tmp_path / "bert")
    check_exportable(find_layout(str(tmp_path / "bert")))
    monkeypatch.setattr("factorformer.hf.source.load", lambda *_, **__: pytest.fail("weights were read"))
    check(run("export", tmp_path / "t5"), "T5ForConditionalGeneration.*generates")


def test_plain_layers(run: Any, base: Path, tmp_path: Path) -> None:
    small, plain = tmp_path / "small", tmp_path / "small-linear"
    assert run("compress", base, small, "--method", "svd", "--ratio", 2).exit_code == 0
    done = run("export", small, "--to", "linear", "--json")
    assert done.exit_code == 0, done.output
    assert {"config.json", "model.safetensors", "modeling_low_rank.py", "modules.json", "1_Pooling"} <= {
        file.name for file in plain.iterdir()
    }
    assert not (plain / "README.md").exists()
    found = json.loads(done.stdout)
    assert found["metrics"]["file_bytes"] == (plain / "model.safetensors").stat().st_size
    assert found["metrics"]["deviation"] < 1e-4
    assert found["output"] == str(plain)
    assert run("export", small, "--to", "linear").exit_code == 2
    assert run("export", small, "--to", "linear", "--overwrite").exit_code == 0
    refused = run("export", small, "--to", "linear", "--int8", "--overwrite")
    assert refused.exit_code == 2
    assert "are for files" in refused.stderr


BRIEF = ("--shape", "2x8", "--rounds", 1)


@pytest.mark.usefixtures("forked_footprints")
def test_where_other_programs_look(run: Any, base_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate_once(monkeypatch)
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\nthe book\nthe awful film and the poor book\na fine book\n")
    (base_copy / "onnx" / "other.onnx").write_text("stays")
    before = {file: file.read_bytes() for file in base_copy.rglob("*") if file.is_file()}
    inputs = AutoTokenizer.from_pretrained(base_copy)(["a good film", "the book"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(base_copy)(**inputs).last_hidden_state.numpy()
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    for to, options, most in (("onnx", (), 1e-5), ("openvino", (), 0.01), ("openvino", ("--int8",), 0.2)):
        calibration = ("--calibration", texts) if options else ()
        done = run("export", base_copy, "--to", to, "--inside", *options, *calibration, "--overwrite", "--json")
        content = result_of(done)
        ways = ("torch", "fused", "fused_int8", "file", *(("onnx_inside",) if to == "openvino" else ()))
        assert f"fastest of {len(ways)} ways here" in done.stderr
        file = base_copy / to / ("model.onnx" if to == "onnx" else "openvino_model.xml")
        assert content["output"] == str(file.parent)
        if to == "onnx":
            found = onnxruntime.InferenceSession(file).run(["last_hidden_state"], feed)[0]
        else:
            found = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0]
        real = inputs["attention_mask"].numpy() > 0
        apart = np.linalg.norm((found - hidden)[real]) / np.linalg.norm(hidden[real])
        assert apart < most
        assert content["metrics"]["deviation"] < most
        assert content["metrics"]["cosine"] > 1 - most
        times = {name for name in content["metrics"] if name.startswith("milliseconds_")}
        assert times == {f"milliseconds_{way}" for way in ways}
    after = {file: file.read_bytes() for file in base_copy.rglob("*") if file.is_file()}
    del before[base_copy / "onnx" / "model.onnx"]
    assert {file: after[file] for file in before} == before
    assert sorted(str(file.relative_to(base_copy)) for file in after.keys() - before.keys()) == [
        *("onnx/model.onnx", "openvino/openvino_model.bin", "openvino/openvino_model.xml")
    ]
    check(run("export", base_copy, "--inside"), "model.onnx' exists already")
    benched = run("bench", f"openvino:{base_copy}", "--against", f"onnx:{base_copy}", *BRIEF, "--json")
    content = json.loads(benched.stdout)
    assert [candidate["route"] for candidate in content["candidates"]] == ["onnxruntime", "openvino"]
    assert {"onnxruntime", "openvino"} <= content["versions"].keys()
    # A model that is compressed from here has no part of it.
    assert run("compress", base_copy, tmp_path / "small", "--method", "svd", "--ratio", 2).exit_code == 0
    assert not (tmp_path / "small" / "onnx").exists()
    (base_copy / "onnx" / "other.onnx").unlink()
    check_output(base_copy, overwrite=True)  # nothing of it is anybody else's


def test_ways_that_a_model_does_not_have_are_left_out(
    run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of a kind that does not run in one call; and a file beside that is there already is one way more."""
    translate_once(monkeypatch)
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64, hidden_act="relu"))
    model.save_pretrained(tmp_path / "relu")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "relu")
    for ways, options in ((3, ()), (4, ("--int8",)), (3, ("--int8", "--overwrite"))):
        done = run("export", tmp_path / "relu", *options, "--json")
        if ways == 4:
            os.utime(tmp_path / "relu" / "model.safetensors")  # what was exported before is of other weights now
        times = {name for name in json.loads(done.stdout)["metrics"] if name.startswith("milliseconds_")}
        more = {"milliseconds_onnx"} if ways == 4 else set()
        assert times == {"milliseconds_torch", "milliseconds_fused", "milliseconds_file"} | more, done.stderr
        assert f"fastest of {ways} ways here" in done.stderr


def test_files_inside_lie_where_the_transformer_does(run: Any, base: Path, tmp_path: Path) -> None:
    whole, inner = tmp_path / "whole", tmp_path / "whole" / "0_Transformer"
    shutil.copytree(base, inner, ignore=shutil.ignore_patterns("onnx", "modules.json", "1_Pooling"))
    shutil.copytree(base / "1_Pooling", whole / "1_Pooling")
    modules = json.loads((base / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    modules.append({"idx": 2, "name": "2", "path": "2_Other", "type": "somewhere.Unknown"})  # which a file has not
    (whole / "modules.json").write_text(json.dumps(modules))
    content = result_of(run("export", whole, "--inside", "--no-timing", "--json"))
    assert (inner / "onnx" / "model.onnx").is_file()
    assert not [name for name in content["metrics"] if name.startswith("milliseconds")]
    assert load(parse(f"onnx:{whole}"), 1, torch.device("cpu")).vocabulary == len(WORDS)
    check(run("export", "minilm", "--inside"), "'minilm' is no directory of yours")
    check(run("export", whole, "--inside", "--output", tmp_path / "x"), "leave one out")
    check(run("export", base, "--to", "openvino", "--int8"), "--calibration FILE")


def test_an_export_that_cannot_be_timed_is_done(run: Any, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    translate_once(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("factorformer.cli.export.LARGEST", 1000)
        done = run("export", base, "--output", tmp_path / "out", "--json")
    assert "milliseconds_file" not in result_of(done)["metrics"]
    assert "not timed" in done.stderr
    monkeypatch.setattr("factorformer.bench.comparison.compare", lambda *_, **__: 1 / 0)
    done = run("export", base, "--output", tmp_path / "other", "--json")
    assert "milliseconds_file" not in result_of(done)["metrics"]
    assert "not timed: division by zero" in done.stderr


def test_pairs_are_read_as_pairs(run: Any, trained: Path, tables: Path, tmp_path: Path, monkeypatch: Any) -> None:
    read: list[Any] = []
    own = openvino_export.export
    monkeypatch.setattr(openvino_export, "export", lambda *a, **k: read.append(k["texts"]) or own(*a, **k))
    calibration = ("--calibration", tables / "train.jsonl", "--text", "text", "--text", "other")
    options = ("--to", "openvino", "--int8", *calibration, "--no-timing", "--json")
    result_of(run("export", trained, "--output", tmp_path / "out", *options))
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in read[0])
