"""`factorformer bench` measures what it is given, in one JSON document or in tables; mistakes are one line."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.bench.onnx_file import write_onnx
from tests.cli.conftest import WORDS

from factorformer.bench import layers

QUICK = ("--shape", "1x4", "--shape", "2x6", "--rounds", 2, "--threads", 1)


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from factorformer.cli.app import app

    path = tmp_path_factory.mktemp("compressed") / "small"
    done = CliRunner().invoke(app, ["compress", str(base), str(path), "--ratio", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return path


@pytest.mark.usefixtures("forked_footprints")
def test_a_model_against_another(run: Any, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file = write_onnx(tmp_path / "small.onnx", words=len(WORDS))
    done = run("bench", small, "--against", file, *QUICK, "--seed", 5, "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    names = [str(file), str(small)]
    assert content["baseline"] == names[0]
    assert [candidate["name"] for candidate in content["candidates"]] == names
    assert [candidate["route"] for candidate in content["candidates"]] == ["onnxruntime", "torch"]
    assert [c["file_bytes"] for c in content["candidates"]] == [
        f.stat().st_size for f in (file, small / "model.safetensors")
    ]
    assert [(s["batch"], s["tokens"], s["rounds"]) for s in content["shapes"]] == [(1, 4, 2), (2, 6, 2)]
    for shape in content["shapes"]:
        assert [result["name"] for result in shape["results"]] == names
        assert shape["results"][0]["speedup"] == {"low": 1, "median": 1, "high": 1}
        for result in shape["results"]:
            spread = result["milliseconds"]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert (content["settings"]["threads"], content["settings"]["seed"]) == (1, 5)
    assert "onnxruntime" in content["versions"]


@pytest.mark.usefixtures("forked_footprints")
def test_generation(run: Any, decoder: Path, small: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller"
    assert run("compress", decoder, smaller, "--ratio", 2).exit_code == 0
    options = ("--generate", "8+4", "--generate", "5+2", "--rounds", 2, "--threads", 1)
    done = run("bench", smaller, "--against", decoder, *options, "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["shapes"] == []
    assert [(g["prompt"], g["tokens"], g["rounds"]) for g in content["generations"]] == [(8, 4, 2), (5, 2, 2)]
    for generation in content["generations"]:
        assert [result["name"] for result in generation["results"]] == [str(decoder), str(smaller)]
        for part, tokens in (("prefill", generation["prompt"]), ("decode", 1)):
            assert generation["results"][0][f"{part}_speedup"] == {"low": 1, "median": 1, "high": 1}
            for result in generation["results"]:
                spread = result[f"{part}_milliseconds"]
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
                assert result[f"{part}_tokens_per_second"] == pytest.approx(1000 * tokens / spread["median"])
    printed = run("bench", decoder, "--generate", "8+4", "--rounds", 1, "--threads", 1)
    assert "4 tokens behind a prompt of 8" in printed.stdout
    assert "while it generates" in " ".join(printed.stdout.split())
    assert (content["settings"]["warm_up"], content["settings"]["settle"]) == (1, 0)
    for model, wish, message in (
        (decoder, "20+5", "25 tokens.*24 positions"),
        (decoder, "20", "PROMPT"),
        (decoder, "8+1", "PROMPT"),
        (small, "8+4", "only causal language models generate"),
        (f"compile:{decoder}", "8+4", "compile for every token"),
    ):
        refused = run("bench", model, "--generate", wish)
        assert refused.exit_code == 2
        assert re.search(message, refused.stderr)


def test_break_even_of_layers(run: Any, small: Path) -> None:
    done = run("bench", small, "--layers", "--tokens", 4, "--tokens", 32, "--seconds", 0.01, "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["candidates"] == content["shapes"] == []
    assert sum(len(layer["names"]) for layer in content["layers"]) == 12
    assert all([timing["tokens"] for timing in layer["tokens"]] == [4, 32] for layer in content["layers"])
    table = run("bench", small, "--layers", "--tokens", 4, "--seconds", 0.01)
    assert "low_rank(rank=" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "--shape", "8"], "write BATCHxTOKENS"),
        (["BASE", "--shape", "1x25"], "at most 1x24"),
        (["BASE", "--against", "in8:BASE"], "'in8'.*'int8'"),
        (["SMALL", "--against", "int8:SMALL"], "query.*factors"),
        (["BASE/nothing"], "/nothing'"),
        (["BASE/nothing.onnx"], r"nothing\.onnx'"),
        (["BASE", "--layers"], "no factorized"),
        (["int8:BASE", "--layers"], "--layers.*directory"),
        (["SMALL", "--layers", "--shape", "1x4", "--rounds", "2"], "leave out --shape, --rounds"),
        (["SMALL", "--tokens", "4"], "--tokens.*--layers"),
        (["SMALL", "--rounds", "4", "--seconds", "1"], "leave one out"),
    ],
)
def test_mistakes(run: Any, base: Path, small: Path, arguments: list[str], message: str) -> None:
    done = run("bench", *(a.replace("BASE", str(base)).replace("SMALL", str(small)) for a in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)


def test_no_gpu(run: Any, base: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("bench", base, "--device", "cuda")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "torch finds no CUDA GPU here" in done.stderr


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_factors_that_do_not_pay_are_named(
    run: Any, base: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = [tmp_path / "small"] if command == "compress" else []

    def warnings() -> list[str]:
        done = run(command, base, *output, "--ratio", 2, "--json", *(["--overwrite"] if output else []))
        assert done.exit_code == 0, done.stderr
        told = [line.removeprefix("slower: ") for line in done.stderr.splitlines() if line.startswith("slower: ")]
        assert json.loads(done.stdout)["warnings"] == told
        return told

    patient = functools.partial(layers.slower_than_dense, seconds=math.inf)
    for module in ("factorformer.bench.layers", "factorformer.cli._jobs.compress"):
        monkeypatch.setattr(f"{module}.slower_than_dense", patient)
    monkeypatch.setattr(layers, "SLOWDOWN_THRESHOLD", 0.0)
    lines = warnings()
    assert sum(int(line.partition(" ")[0]) for line in lines) == 12
    assert all(" 128 tokens" in line for line in lines)
    monkeypatch.setattr(layers, "SLOWDOWN_THRESHOLD", 1e9)
    assert warnings() == []
