"""`compress --train --distill` without labels: an encoder that learns from its original, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_commands import result_of

import factorformer
from factorformer.cli._jobs import compress as job

OPTIONS = ("--ratio", 3, "--int8", "--scope", "all", "--batch-size", 4, "--lr", 5e-3, "--json")


@pytest.fixture
def command(base: Path, tables: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("compress", base, tmp_path / "small", "--train", tables / "texts.txt", "--distill", base, *OPTIONS)


def test_time_is_kept_and_the_way_is_shown(run: Any, command: tuple[Any, ...], tmp_path: Path) -> None:
    done = run(*command, "--minutes", 0.05)
    content = result_of(done)
    assert done.stderr.count("neighbour recall") >= 1
    assert content["seconds"]["train"] >= 3
    assert {"embedding_cosine", "similarity_spearman", "neighbour_recall"} <= set(content["metrics"])
    assert factorformer.load(tmp_path / "small").config.model_type == "bert"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]  # nothing of the run is left


def test_an_interrupted_run_goes_on(
    run: Any, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = result_of(run(*command, "--epochs", 4))["metrics"]
    lines = []

    def interrupting(line: str) -> None:
        lines.append(line)
        if len([line for line in lines if "neighbour recall" in line]) == 3:
            raise KeyboardInterrupt

    again = ("--epochs", 4, "--overwrite")
    with monkeypatch.context() as patched:
        patched.setattr(job, "note", interrupting)
        stopped = run(*command, *again)
    assert stopped.exit_code == 130
    assert "add --resume" in stopped.stderr
    assert (tmp_path / ".small.training" / "plan.json").exists()
    refused = run(*command, "--epochs", 4)
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    for changed in (("--epochs", 5), ("--epochs", 4, "--seed", 1)):
        refused = run(*command, *changed, "--overwrite", "--resume")
        assert refused.exit_code == 2
        assert "the interrupted run had other options" in refused.stderr
    monkeypatch.setattr(job.compression, "plan", lambda *_, **__: pytest.fail("planned again"))
    resumed = run(*command, *again, "--resume")
    assert "resumed from step" in resumed.stderr
    assert result_of(resumed)["metrics"]["embedding_cosine"] == pytest.approx(once["embedding_cosine"], abs=0.01)
    assert not (tmp_path / ".small.training").exists()


def test_a_cross_encoder_learns_its_own_scores(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    rows = tables / "train.jsonl"
    scorer = ("finetune", base, tmp_path / "scorer", "--train", rows, "--text", "text", "--text", "other")
    done = run(*scorer, "--label", "score", "--regression", "--epochs", 8, "--batch-size", 4, "--lr", 3e-3)
    assert done.exit_code == 0, done.stderr
    pairs = ("--train", rows, "--text", "text", "--text", "other", "--distill", tmp_path / "scorer")
    arguments = (
        "compress",
        tmp_path / "scorer",
        tmp_path / "small",
        *pairs,
        "--ratio",
        3,
        "--int8",
        "--epochs",
        6,
        "--eval",
        rows,
    )
    done = run(*arguments, "--batch-size", 4, "--lr", 3e-3, "--json")
    content = result_of(done)
    assert "score spearman" in done.stderr
    assert {"score_spearman", "score_pearson"} <= set(content["metrics"])
    assert "embedding_cosine" not in content["metrics"]
    assert type(factorformer.load(tmp_path / "small")).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("method", ["dsformer", "rankdyna"])
def test_supports_and_ranks_move_by_time(run: Any, command: tuple[Any, ...], tmp_path: Path, method: str) -> None:
    arguments = [part for part in command if part not in ("--int8", "--scope", "all")]
    content = result_of(run(*arguments, "--method", method, "--minutes", 0.05))
    assert content["method"] == method
    assert content["bytes"]["ratio"] == pytest.approx(3, rel=0.05)
    factorformer.load(tmp_path / "small")


def test_what_time_and_checkpoints_are_not_for(
    run: Any, base: Path, trained: Path, tables: Path, tmp_path: Path
) -> None:
    labelled = ("compress", trained, tmp_path / "small", "--train", tables / "train.jsonl", "--label", "label")
    plain = ("compress", base, tmp_path / "small", "--calibration", tables / "texts.txt")
    for arguments, message in (
        ((*labelled, "--minutes", 1), "--minutes"),
        ((*labelled, "--resume"), "--resume"),
        ((*plain, "--resume"), "--resume"),
        (
            ("compress", base, tmp_path / "small", "--train", tables / "texts.txt", "--distill", base, "--resume"),
            "no inter",
        ),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr
    done = run(*plain, "--minutes", 1, "--ratio", 2)
    assert done.exit_code == 0
    assert "not used without --train: --minutes" in done.stderr
