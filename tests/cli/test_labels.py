"""What `compress` and `finetune` make of labels, heads, and data that is split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.cli.conftest import BAD, GOOD
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from factorformer.cli import _measure
from factorformer.cli._jobs import compress as pipeline
from factorformer.errors import DataError
from factorformer.tasks.data import check_lengths


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def three(base: Path, tmp_path: Path) -> Path:
    """A model whose head knows three classes."""
    names = ("minus", "neither", "plus")
    model = BertForSequenceClassification.from_pretrained(
        base, num_labels=3, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "three")
    return tmp_path / "three"


@pytest.mark.parametrize("method", [(), ("--method", "svd")])
def test_a_label_that_nothing_reads_is_not_used(
    method: tuple[str, ...], run: Any, base: Path, tables: Path, tmp_path: Path
) -> None:
    data = ("--calibration", tables / "train.tsv", "--label", "label")
    done = run("compress", base, tmp_path / "small", "--ratio", 2, *data, *method)
    assert done.exit_code == 0, done.stderr
    assert "--label is not used" in done.stderr


@pytest.mark.parametrize("named", [True, False])
def test_a_head_that_knows_more_labels_is_kept(
    named: bool, run: Any, three: Path, tables: Path, tmp_path: Path
) -> None:
    data = tables / "train.jsonl"
    if not named:  # the names that transformers gives to classes without any
        config = json.loads((three / "config.json").read_text())
        config |= {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
        (three / "config.json").write_text(json.dumps(config))
        data = tables / "numbered.jsonl"
    training = ("--train", data, "--eval", data, "--label", "label", "--lr", 0, "--epochs", 1)
    done = run("compress", three, tmp_path / "small", "--ratio", 2, *training, "--json")
    assert done.exit_code == 0, done.stderr
    assert "new head" not in done.stderr
    assert "original_accuracy" in json.loads(done.stdout)["metrics"]
    before, after = (AutoModelForSequenceClassification.from_pretrained(path) for path in (three, tmp_path / "small"))
    assert torch.equal(before.classifier.weight, after.classifier.weight)
    assert after.config.id2label == before.config.id2label


def test_numbers_that_are_not_all_of_a_named_head_get_a_new_one(
    run: Any, three: Path, tables: Path, tmp_path: Path
) -> None:
    done = run("finetune", three, tmp_path / "tuned", "--train", tables / "numbered.jsonl", "--epochs", 1)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"new head: .*\(minus, neither, plus\).*\(0, 1\)", done.stderr)


def test_a_new_head_on_a_base_model_goes_without_saying(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    done = run("finetune", base, tmp_path / "tuned", "--train", tables / "train.jsonl", "--epochs", 1)
    assert done.exit_code == 0, done.stderr
    assert "new head" not in done.stderr


def test_a_compressed_classifier_learns_another_task(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    small, training = tmp_path / "small", ("--train", tables / "train.jsonl", "--epochs", 1, "--json")
    assert run("compress", trained, small, "--ratio", 2).exit_code == 0
    for label, outputs in (("other", len(GOOD + BAD)), ("score", 1)):
        tuned = tmp_path / label
        done = run("finetune", small, tuned, "--label", label, *training)
        assert done.exit_code == 0, done.stderr
        assert re.search(r"new head: .*\(minus, plus\)", done.stderr)
        assert json.loads(done.stdout)["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
        assert AutoModelForSequenceClassification.from_pretrained(tuned).classifier.out_features == outputs


@pytest.mark.parametrize("command", ["compress", "finetune"])
def test_whole_numbers_are_scores_on_demand(command: str, run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    data = ("--train", tables / "numbered.jsonl", "--eval", tables / "numbered.jsonl", "--label", "label")
    ratio = ("--ratio", 2) if command == "compress" else ()
    done = run(command, base, tmp_path / "out", *ratio, *data, "--task", "regression", "--epochs", 1, "--json")
    assert done.exit_code == 0, done.stderr
    assert {"pearson", "spearman", "mse"} <= set(json.loads(done.stdout)["metrics"])


def test_rows_that_are_held_out_are_not_calibrated_on(
    run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{one} {two}\n" for one in GOOD + BAD for two in GOOD + BAD))
    seen: dict[str, set[tuple[int, ...]]] = {}

    def spy(name: str, function: Any) -> Any:
        def called(*rest: Any, **options: Any) -> Any:
            (data,) = (given for given in rest if isinstance(given, datasets.Dataset))
            seen[name] = {tuple(ids) for ids in data["input_ids"]}
            return function(*rest, **options)

        return called

    for name, module in (("heal", pipeline), ("read_all", _measure), ("calibration_batches", pipeline)):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    done = run("compress", base, tmp_path / "small", "--ratio", 2, "--train", texts, "--distill", base, "--epochs", 1)
    assert done.exit_code == 0, done.stderr
    assert len(seen["read_all"]) == 6
    assert len(seen["heal"] | seen["read_all"]) == 64
    assert seen["calibration_batches"] == seen["heal"]
    assert not seen["calibration_batches"] & seen["read_all"]


def test_what_stays_dense_is_told(run: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = MixtralConfig(**sizes, vocab_size=18, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    done = run("compress", tmp_path / "moe", tmp_path / "small", "--ratio", 1.05)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"left dense: .*: 4 matrices, 196,608 of ", done.stderr)
    assert " bytes in scope" in done.stderr


def test_texts_have_to_fit_positions_and_vocabulary() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = RobertaModel(RobertaConfig(**sizes, vocab_size=18, max_position_embeddings=24, pad_token_id=1))
    # RoBERTa counts positions from behind the padding.
    check_lengths(model, datasets.Dataset.from_dict({"length": [3, 22], "input_ids": [[1], [17]]}))
    model(torch.full((1, 22), 5))
    with pytest.raises(DataError, match=r"23 tokens.*22 positions"):
        check_lengths(model, datasets.Dataset.from_dict({"length": [3, 23], "input_ids": [[1], [17]]}))
    with pytest.raises(DataError, match=r"token 18.* 18 "):
        check_lengths(model, datasets.Dataset.from_dict({"length": [3, 1], "input_ids": [[1, 2, 18], [17]]}))
