"""`evaluate --against`: two sentence encoders side by side, on texts, classes and pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tests.cli.conftest import BAD, GOOD

import factorformer
from factorformer.hf.source import load_tokenizer

KEPT = ("embedding_cosine", "similarity_spearman", "neighbour_recall")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, texts with classes, and pairs with classes and with scores."""
    path, draw = tmp_path_factory.mktemp("files"), random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(["a", "the", "film", "book", "and", *GOOD, *BAD], k=draw.randint(1, 6)))

    texts = [text() for _ in range(40)]
    (path / "texts.txt").write_text("".join(f"{line}\n" for line in texts))
    rows = [{"text": line, "label": "plus" if any(w in line for w in GOOD) else "minus"} for line in texts]
    (path / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [f"{line}\t{draw.choice([line, text()])}\t{draw.randint(0, 1)}" for line in texts]
    (path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *pairs]) + "\n")
    scores = [f"{line}\t{text()}\t{draw.random():.3f}" for line in texts]
    (path / "scores.tsv").write_text("\n".join(["one\ttwo\tscore", *scores]) + "\n")
    return path


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder, a good part of it lost."""
    from typer.testing import CliRunner

    from factorformer.cli.app import app

    path = tmp_path_factory.mktemp("small") / "small"
    done = CliRunner().invoke(app, ["compress", str(base), str(path), "--ratio", "5"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return path


def metrics(done: Any) -> dict[str, float]:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["metrics"]


def test_three_files_are_measured_at_once(run: Any, base: Path, small: Path, files: Path) -> None:
    data = [part for name in ("texts.txt", "classes.jsonl", "pairs.tsv") for part in ("--data", files / name)]
    found = metrics(run("evaluate", small, "--against", base, *data, "--json"))
    for name in KEPT:
        assert found[f"texts_{name}_low"] <= found[f"texts_{name}"] <= found[f"texts_{name}_high"]
        assert 0 < found[f"texts_{name}"] < 1
        assert f"original_texts_{name}" not in found
        assert found[f"classes_{name}"] == pytest.approx(found[f"texts_{name}"])  # the same texts
    for name in ("classes_nearest_neighbour_accuracy", "classes_logistic_regression_accuracy", "pairs_pair_auc"):
        difference = found[name] - found[f"original_{name}"]
        assert found[f"difference_{name}"] == pytest.approx(difference)
        assert found[f"difference_{name}_low"] <= difference <= found[f"difference_{name}_high"]


def test_the_table_shows_intervals(
    run: Any, base: Path, small: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # which no cell has to be broken for
    done = run("evaluate", small, "--against", base, "--data", files / "pairs.tsv")
    (line,) = (line for line in done.stdout.splitlines() if "pairs pair auc" in line)
    assert line.count("[") == line.count(", ") == 3


def test_the_original_against_itself_loses_nothing(run: Any, base: Path, files: Path) -> None:
    data = ("--data", files / "classes.jsonl", "--data", files / "pairs.tsv")
    found = metrics(run("evaluate", base, "--against", base, *data, "--json"))
    assert [found[f"classes_{name}"] for name in KEPT] == pytest.approx([1, 1, 1])
    assert {value for name, value in found.items() if name.startswith("difference_")} == {0}


def test_the_area_is_that_of_the_pooling_of_the_directory(run: Any, base: Path, base_copy: Path, files: Path) -> None:
    config = base_copy / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
    found = metrics(run("evaluate", base_copy, "--against", base, "--data", files / "pairs.tsv", "--json"))
    model, tokenizer = factorformer.load(base_copy), load_tokenizer(base_copy)
    rows = [line.split("\t") for line in (files / "pairs.tsv").read_text().splitlines()[1:]]
    cosines = {"cls": [], "mean": []}
    with torch.inference_mode():
        for first, second, _ in rows:
            hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in (first, second)]
            for name, pool in (("cls", lambda h: h[0]), ("mean", lambda h: h.mean(0))):
                cosines[name].append(
                    float(torch.cosine_similarity(*(pool(h) for h in hidden), dim=0).double().round(decimals=6))
                )
    labels = [int(label) for _, _, label in rows]
    assert found["pairs_pair_auc"] == pytest.approx(roc_auc_score(labels, cosines["cls"]), abs=1e-6)
    assert found["original_pairs_pair_auc"] == pytest.approx(roc_auc_score(labels, cosines["mean"]), abs=1e-6)


def test_columns_of_other_names(run: Any, base: Path, small: Path, files: Path) -> None:
    scores = ("--data", files / "scores.tsv")
    done = run("evaluate", small, "--against", base, *scores)
    assert done.exit_code == 2
    assert "one, two, score" in done.stderr
    assert "--text" in done.stderr
    found = metrics(run("evaluate", small, "--against", base, *scores, "--text", "one", "--text", "two", "--json"))
    assert {"scores_pair_spearman", "original_scores_pair_spearman", "difference_scores_pair_spearman"} <= set(found)


def test_what_pairs_say_is_told(run: Any, base: Path, small: Path, files: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("sentence1\tsentence2\tlabel\n" + "a\ta\tequivalent\na\tbook\tnot_equivalent\n" * 4)
    done = run("evaluate", small, "--against", base, "--data", file, "--json")
    assert metrics(done)["pairs_pair_auc"] == 1
    assert "class 'equivalent' are taken to mean the same" in done.stderr
    scores = tmp_path / "texts.tsv"
    scores.write_text("text\tscore\n" + "".join(f"{text}\t{text}\n" for text in ("a", "book", "the film", "b")))
    assert set(metrics(run("evaluate", small, "--against", base, "--data", scores, "--json"))) >= {
        f"texts_{name}" for name in KEPT
    }
    (tmp_path / "scored.tsv").write_text("sentence1\tsentence2\tlabel\na\ta\t2\na\tb\t1\na\tbook\t0\n")
    given = ("--data", tmp_path / "scored.tsv", "--label", "label", "--json")
    assert metrics(run("evaluate", small, "--against", base, *given))["scored_pair_spearman"] > 0


def test_columns_that_are_not_measured(run: Any, base: Path, small: Path, tmp_path: Path) -> None:
    """What no one asked for does not stand in the way of what can be measured."""
    texts = [f"{word} {other}" for word in (*GOOD, *BAD) for other in ("film", "book")]
    rows = [{"text": text, "label": 0.1 * n, "id": "a" if n else 1} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("evaluate", small, "--against", base, "--data", tmp_path / "rows.jsonl", "--json")
    assert {name for name in metrics(done) if not name.endswith(("_low", "_high"))} == {f"rows_{name}" for name in KEPT}
    assert "column 'label' is left out" in done.stderr
    for label in (None, ["plus", "minus"]):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "label": label}) + "\n" for row in rows))
        done = run("evaluate", small, "--against", base, "--data", tmp_path / "rows.jsonl", "--json")
        assert f"rows_{KEPT[0]}" in metrics(done)
        assert "column 'label' is left out" in done.stderr
    (tmp_path / "none.json").write_text("[]")
    done = run("evaluate", small, "--against", base, "--data", tmp_path / "none.json")
    assert done.exit_code == 2
    assert "has no rows" in done.stderr


def test_what_cannot_be_measured_is_refused(
    run: Any, base: Path, trained: Path, small: Path, files: Path, tables: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\na\tb\nthe\tbook\n")
    lists = [{"sentence1": "a", "sentence2": "b", "label": [0, 1]}] * 3
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    scorer = run("evaluate", trained, "--against", trained, "--data", files / "pairs.tsv")
    assert scorer.exit_code == 2
    assert "has a head" in scorer.stderr
    (tmp_path / "single.tsv").write_text("text\tlabel\n" + "a film\tone\n" * 9 + "a book\tother\n")
    (tmp_path / "inference.tsv").write_text("premise\thypothesis\tlabel\na\tb\t0\nthe\tbook\t1\na\tbook\t2\n")
    for arguments, message in (
        (("--data", tables / "two.txt"), "2 rows"),
        (("--data", tmp_path / "pairs.tsv"), "--label"),
        (("--data", tmp_path / "single.tsv", "--label", "label"), "1 have 5 or more"),
        (("--data", tmp_path / "inference.tsv"), "--label label"),
        (("--data", tables / "train.jsonl", "--label", "none"), "none"),
        (("--data", files / "texts.txt", "--task", "classification"), "--task"),
        (("--data", tmp_path / "lists.jsonl"), "lists of labels"),
        (("--data", tmp_path / "absent.txt"), "absent.txt"),
    ):
        done = run("evaluate", small, "--against", base, *arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr, done.stderr
        assert done.stdout == ""
    several = run("evaluate", trained, "--data", tables / "train.jsonl", "--data", tables / "train.tsv")
    assert several.exit_code == 2
    assert "--against" in several.stderr
