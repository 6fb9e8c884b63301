"""Plans by loss on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_errors import check

import factorformer

Content = dict[str, Any]


def content_of(done: Any) -> Content:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_a_plan_by_loss_predicts_its_error(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ("--method", "auto", "--ratio", 2, "--calibration", tables / "texts.txt", "--calibration-rows", 16)
    planned = content_of(run("plan", base, *options, "--output", file, "--json"))
    assert planned["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    assert planned["metrics"]["predicted_cosine_loss"] > 0
    assert planned["metrics"]["predicted_cosine_loss"] == factorformer.Plan.load(file).predicted
    changed = [layer for layer in planned["layers"] if layer["structure"] is not None]
    assert changed
    assert all(re.match(r"adds \S+ to 1 - cosine", layer["note"]) for layer in changed)
    # Carried out as it is.
    text = ("--calibration", tables / "texts.txt", "--calibration-rows", 16, "--json")
    carried = content_of(run("compress", base, tmp_path / "small", "--plan", file, *text))
    assert carried["bytes"] == planned["bytes"]
    assert carried["metrics"]["predicted_cosine_loss"] == planned["metrics"]["predicted_cosine_loss"]
    assert factorformer.load(tmp_path / "small").config.quantization_config is not None


def test_a_plan_by_loss_needs_no_text(run: Any, base: Path) -> None:
    planned = content_of(run("plan", base, "--method", "auto", "--ratio", 2, "--json"))
    assert planned["metrics"]["predicted_weight_error"] > 0
    table = run("plan", base, "--method", "fisher", "--ratio", 2)
    assert "predicted weight error" in table.stdout
    assert content_of(run("plan", base, "--ratio", 2, "--json"))["metrics"] == {}  # a uniform plan predicts nothing
    done = run("plan", base, "--ratio", 2, "--text", "text")
    assert "not used without --calibration: --text" in done.stderr


def test_labelled_tables_are_read_as_text(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    options = ("--method", "fisher", "--ratio", 2, "--calibration", tables / "train.tsv")
    assert content_of(run("plan", trained, *options, "--json"))["metrics"]["predicted_loss_rise"] > 0
    training = ("--train", tables / "train.tsv", "--label", "label", "--epochs", 1, "--json")
    content = content_of(run("compress", trained, tmp_path / "small", "--method", "auto", "--ratio", 2, *training))
    assert content["metrics"]["predicted_loss_rise"] > 0
    assert content["method"] == "auto"
    assert content["bytes"]["ratio"] == pytest.approx(2, rel=0.01)


def test_ranks_in_multiples(run: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    content_of(run("plan", base, "--ratio", 2, "--rank-multiple", 2, "--output", file, "--json"))
    ranks = [entry.spec.units for entry in factorformer.Plan.load(file).factorized if entry.spec is not None]
    assert ranks
    assert all(rank % 2 == 0 for rank in ranks)
    assert run("plan", base, "--rank-multiple", 0).exit_code == 2
    assert (
        "leave these options out" in run("compress", base, tmp_path / "s", "--plan", file, "--rank-multiple", 2).stderr
    )


def test_a_prediction_stands_beside_what_is_measured(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    texts = tables / "texts.txt"
    options = ("--ratio", 2, "--calibration", texts, "--eval", texts, "--json")
    metrics = content_of(run("compress", base, tmp_path / "small", *options))["metrics"]
    assert metrics["cosine_loss"] == pytest.approx(1 - metrics["embedding_cosine"])
    assert metrics["predicted_cosine_loss"] > 0
    # A head that is new predicts nothing yet: what is measured then is the model below it.
    training = ("--ratio", 2, "--train", tables / "train.tsv", "--label", "label", "--epochs", 1)
    done = run("compress", base, tmp_path / "classifier", *training)
    assert "predicted cosine loss (before training)" in done.stdout


def test_a_default_plan_is_carried_out_with_text_alone(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "plan.json", ("--calibration", tables / "texts.txt")
    done = run("plan", base, "--ratio", 2, *text, "--output", file)
    assert "method: fisher (the default with calibration data)" in done.stderr
    check(run("compress", base, tmp_path / "small", "--plan", file), r"'fisher' needs text.*--calibration")
    # A plan without text predicts the error of weights, which says nothing of a fit to text.
    assert run("plan", base, "--method", "fisher", "--ratio", 2, "--output", file, "--overwrite").exit_code == 0
    content = content_of(run("compress", base, tmp_path / "small", "--plan", file, *text, "--json"))
    assert "predicted_weight_error" not in content["metrics"]


def test_what_a_plan_does_not_do_is_told(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    text = ("--calibration", tables / "texts.txt")
    assert "'svd' measures nothing: --calibration" in run("plan", base, "--method", "svd", *text).stderr
    check(run("plan", base, "--method", "fwsvd", *text), "'fwsvd'.*labels.*compress --label")
    check(run("plan", base, "--method", "kronecker", "--rank-multiple", 8), "rank_multiple=8.*'kronecker' does not")
    check(run("compress", base, tmp_path / "s", "--int8", "--ratio", 1, *text), "ratio of 1,.*larger ratio")
    (tmp_path / "line.txt").write_text("\n\na film\n \n")
    done = run("plan", base, "--ratio", 2, "--calibration", tmp_path / "line.txt")
    assert "calibrated on 4 tokens, fewer than the 64" in done.stderr.replace("\n", " ")
    done = run("plan", base, "--int8", "--ratio", 2)
    assert "in place of 2: with all matrices in integers" in done.stderr.replace("\n", " ")


def test_other_budgets(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    options = ("--method", "auto", "--ratio", 2, "--budget", "flops", "--json")
    planned = content_of(run("plan", base, *options))
    assert planned["flops_per_token"]["ratio"] == pytest.approx(2, rel=0.01)
    text = ("--calibration", tables / "texts.txt", "--calibration-rows", 8)
    content = content_of(run("compress", base, tmp_path / "small", *options, *text))
    assert content["flops_per_token"]["ratio"] == pytest.approx(2, rel=0.01)
    timed = content_of(run("plan", base, "--method", "auto", "--ratio", 1, "--budget", "milliseconds", "--json"))
    assert timed["metrics"]["latency_products"] <= timed["metrics"]["original_latency_products"] * 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["plan", "--method", "svd", "--budget", "flops"], "flops.*method"),
        (["plan", "--method", "auto", "--calibration", "nothing.txt"], r"nothing\.txt"),
        (["plan", "--method", "auto", "--calibration", "train.jsonl", "--text", "txt"], r"train\.jsonl.*column 'txt'"),
        (["plan", "--method", "auto", "--max-length", "128", "--calibration", "long.txt"], r"long\.txt.* 42 tokens"),
        (["plan", "--method", "auto", "--ratio", "1000"], "ask for at most"),
        (["plan", "--method", "auto", "--share", "inputs"], "'auto'.*structure"),
        (["compress", "--method", "auto"], "'auto'.*text"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, run: Any, base: Path, tables: Path, tmp_path: Path
) -> None:
    command, *rest = (str(tables / o) if o.endswith((".txt", ".jsonl")) else o for o in options)
    places = [base] if command == "plan" else [base, tmp_path / "small"]
    done = run(command, *places, *rest)
    assert done.exit_code == 2
    assert re.search(message, done.stderr.replace("\n", " "))
    assert not (tmp_path / "small").exists()


def test_a_plan_takes_the_place_of_plans_alone(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    thesis, empty, plan = tmp_path / "thesis.txt", tmp_path / "empty.json", tmp_path / "plan.json"
    thesis.write_text("not a plan")
    empty.touch()
    check(run("plan", base, "--output", thesis, "--overwrite"), "thesis.txt")
    assert thesis.read_text() == "not a plan"
    for _ in range(2):
        for place in (empty, plan):
            assert run("plan", base, "--output", place, "--overwrite").exit_code == 0
    plan.write_text(plan.read_text().replace('"predicted": null', '"predicted": NaN'))
    check(run("compress", base, tmp_path / "small", "--plan", plan), "NaN")


@pytest.mark.parametrize("width", ["--int8", "--int4"])
def test_a_plan_in_integers_is_carried_out_in_them(
    width: str, run: Any, base: Path, tables: Path, tmp_path: Path
) -> None:
    file, text = tmp_path / "plan.json", ("--calibration", tables / "texts.txt")
    planned = content_of(run("plan", base, width, "--ratio", 9, *text, "--output", file, "--json"))
    carried = content_of(run("compress", base, tmp_path / "small", "--plan", file, *text, "--json"))
    assert carried["bytes"] == planned["bytes"]
