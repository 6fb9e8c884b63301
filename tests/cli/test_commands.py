"""Every subcommand does what its help says, and prints one JSON document when asked to."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import BAD, GOOD
from tests.cli.test_errors import check
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import factorformer
from factorformer import recipes
from factorformer.cli._jobs import stream
from factorformer.cli.compress import compress
from factorformer.cli.finetune import finetune
from factorformer.tasks import language_modelling
from factorformer.tasks.finetuning import TrainingSettings

SCHEMA = {
    "bytes",
    "parameters",
    "flops_per_token",
    "scope",
    "method",
    "metrics",
    "seconds",
    "seed",
    "versions",
    "output",
    "warnings",
}
MADE = {"command", "fits", "curve"}
"""What is known of a model that was compressed just now."""

COMMANDS = [
    "compress",
    "finetune",
    "evaluate",
    "export",
    "bench",
    "inspect",
    "report",
    "plan",
    "methods",
    "quickstart",
    "train",
]


def result_of(done: Any, layers: bool = False) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert set(content) - MADE == SCHEMA | ({"layers"} if layers else set())
    for cost in ("bytes", "parameters", "flops_per_token"):
        assert set(content[cost]) == {"original", "compressed", "ratio"}
        assert content[cost]["ratio"] == pytest.approx(content[cost]["original"] / content[cost]["compressed"])
    assert set(content["versions"]) == {"factorformer", "torch", "transformers", "python"}
    assert all(isinstance(value, int | float) for value in [*content["metrics"].values(), *content["seconds"].values()])
    return content


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Any, command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout or command in ("methods", "quickstart")


def test_the_main_help_names_all_commands(run: Any) -> None:
    help_text = run("--help").stdout
    assert all(command in help_text for command in COMMANDS)


def test_methods(run: Any) -> None:
    assert [method["name"] for method in json.loads(run("methods", "--json").stdout)] == list(recipes.RECIPES)
    assert all(name in run("methods").stdout for name in recipes.RECIPES)


def test_compress_without_data(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "small"
    done = run("compress", base, output, "--ratio", 2, "--json")
    content = result_of(done)
    assert content["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    assert (content["method"], content["scope"], content["seed"]) == ("svd", "blocks", None)
    assert content["output"] == str(output)
    assert re.search(r"svd \(.*default", done.stderr)
    assert json.loads((output / "factorformer.json").read_text()) == content
    assert type(factorformer.load(output)).__name__ == "BertModel"
    # Everything beside the weights is copied unchanged.
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    left = {"README.md", "onnx", "modules.json"} & {file.name for file in output.iterdir()}
    assert left == {"README.md", "modules.json"}
    assert (output / "README.md").read_bytes() != (base / "README.md").read_bytes()  # the card of another model
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode
    # What was compressed can be fine-tuned.
    tuned = result_of(
        run("finetune", output, tmp_path / "tuned", "--train", tables / "train.jsonl", "--epochs", 1, "--json")
    )
    assert tuned["bytes"]["ratio"] == pytest.approx(2, rel=0.01)


def test_calibration_text_makes_the_fit_data_aware(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    options = ("--calibration", tables / "texts.txt", "--eval", tables / "texts.txt", "--json")
    done = run("compress", base, tmp_path / "small", "--ratio", 2, *options)
    content = result_of(done)
    assert content["method"] == "fisher"
    assert re.search(r"fisher \(.*default", done.stderr)
    assert set(content["metrics"]) == {
        "embedding_cosine",
        "similarity_spearman",
        "neighbour_recall",
        "cosine_loss",
        "predicted_cosine_loss",
    }
    plain = result_of(run("compress", base, tmp_path / "plain", "--ratio", 2, "--method", "svd", *options))
    assert content["metrics"]["embedding_cosine"] > plain["metrics"]["embedding_cosine"]


def test_healing_without_labels(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    # At a ratio that leaves something to heal, and a rate that does not undo the fit.
    common = ("compress", base, "--ratio", 6, "--train", tables / "texts.txt", "--eval", tables / "texts.txt")
    scores = [
        result_of(run(*common[:2], tmp_path / name, *common[2:], "--distill", base, *rest, "--json"))["metrics"]
        for name, *rest in (("short", "--lr", 0), ("long", "--lr", 1e-3, "--epochs", 8))
    ]
    assert scores[1]["embedding_cosine"] > scores[0]["embedding_cosine"]
    assert (tmp_path / "long" / "modules.json").exists()


def test_text_is_held_out_where_no_eval_file_is_given(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    arguments = ("--ratio", 2, "--train", tables / "texts.txt", "--distill", base, "--epochs", 1)
    done = run("compress", base, tmp_path / "small", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "embedding cosine" in done.stdout


def test_finetune_compress_evaluate(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    data, output = tables / "train.jsonl", tmp_path / "small"
    training = ("--train", data, "--eval", data, "--label", "label", "--distill", trained, "--epochs", 2, "--lr", 3e-3)
    content = result_of(run("compress", trained, output, "--ratio", 2, *training, "--seed", 3, "--json"))
    assert content["seed"] == 3
    assert {"accuracy", "macro_f1", "matthews", "f1", "original_accuracy"} <= set(content["metrics"])
    assert content["metrics"]["original_accuracy"] > 0.9
    assert {"calibrate", "fit", "train", "total"} <= set(content["seconds"])
    again = result_of(run("evaluate", output, "--data", data, "--json"))
    assert again["bytes"] == content["bytes"]
    assert "fitted_accuracy" in content["metrics"]
    compared = ("original_", "fitted_", "predicted_", "loss_rise")
    assert again["metrics"] == {k: v for k, v in content["metrics"].items() if not k.startswith(compared)}
    rise = content["metrics"]["loss"] - content["metrics"]["original_loss"]
    assert content["metrics"]["loss_rise"] == pytest.approx(rise)
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "minus", 1: "plus"}
    assert AutoTokenizer.from_pretrained(output)("good film")["input_ids"]
    # What is reported is the compressed model's: one that learns the opposite is wrong.
    swapped = data.read_text().replace('"plus"', '"?"').replace('"minus"', '"plus"').replace('"?"', '"minus"')
    (tmp_path / "opposite.jsonl").write_text(swapped)
    training = ("--train", tmp_path / "opposite.jsonl", "--eval", data, "--label", "label", "--epochs", 10)
    options = ("--ratio", 2, "--batch-size", 4, "--lr", 3e-3, "--overwrite", "--json")
    found = result_of(run("compress", trained, output, *training, *options))["metrics"]
    assert found["accuracy"] <= 0.5 < found["original_accuracy"]


@pytest.mark.parametrize("method", ["dsformer", "dense_sparse", "cospadi"])
def test_dense_times_sparse(run: Any, trained: Path, tables: Path, tmp_path: Path, method: str) -> None:
    data, output = tables / "train.jsonl", tmp_path / "small"
    options = ["--ratio", 1.8, "--method", method, "--eval", data, "--label", "label", "--json"]
    source = ["--calibration", data] if method == "cospadi" else ["--train", data, "--epochs", 2, "--batch-size", 4]
    content = result_of(run("compress", trained, output, *options, *source, "--lr", 3e-3))
    assert content["method"] == method
    assert ("train" in content["seconds"]) == (method != "cospadi")
    assert content["bytes"]["ratio"] == pytest.approx(1.8, rel=0.01)
    model = factorformer.load(output)
    layers = [m for m in model.modules() if isinstance(m, factorformer.FactorizedLinear)]
    assert len(layers) == 12
    assert all(set(layer.factors) | {"bias"} == set(layer.state_dict()) for layer in layers)
    assert result_of(run("evaluate", output, "--data", data, "--json"))["metrics"].items() <= content["metrics"].items()


def test_a_plan_with_shared_dictionaries(run: Any, base: Path, trained: Path, tables: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    arguments = ("--method", "dense_sparse_plain", "--ratio", 1.8, "--share", "inputs", "--output", plan, "--json")
    planned = result_of(run("plan", base, *arguments), layers=True)
    assert planned["bytes"]["ratio"] == pytest.approx(1.8, rel=0.01)
    content = result_of(run("compress", base, tmp_path / "small", "--plan", plan, "--json"))
    assert content["bytes"] == planned["bytes"]
    model = factorformer.load(tmp_path / "small")
    block = model.encoder.layer[0].attention
    assert block.self.query.dictionary is block.self.key.dictionary is block.output.dense.dictionary
    # The same matrices under the names that they have in a model with a head.
    training = ("--train", tables / "train.jsonl", "--label", "label", "--epochs", 1)
    result_of(run("compress", trained, tmp_path / "head", "--plan", plan, *training, "--json"))
    block = factorformer.load(tmp_path / "head").bert.encoder.layer[1].attention
    assert block.self.value.dictionary is block.output.dense.dictionary
    direct = run("compress", base, tmp_path / "again", *arguments[:6], "--json")
    assert result_of(direct)["bytes"] == planned["bytes"]
    refused = run("compress", base, tmp_path / "none", "--method", "svd", "--share", "inputs")
    assert refused.exit_code == 2
    assert "share='inputs'" in refused.stderr
    assert "dense_sparse" in refused.stderr


def test_a_base_model_gets_a_new_head(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    arguments = ("--ratio", 2, "--train", tables / "train.tsv", "--eval", tables / "train.tsv", "--label", "label")
    content = result_of(run("compress", base, tmp_path / "small", *arguments, "--epochs", 1, "--json"))
    assert not any(name.startswith("original_") for name in content["metrics"])
    assert not (tmp_path / "small" / "modules.json").exists()
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_a_fitting_head_is_kept_and_its_order_of_labels_with_it(
    run: Any, trained: Path, tables: Path, tmp_path: Path
) -> None:
    flipped = tmp_path / "flipped"
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    model.config.id2label, model.config.label2id = {0: "plus", 1: "minus"}, {"plus": 0, "minus": 1}
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.save_pretrained(flipped)
    AutoTokenizer.from_pretrained(trained).save_pretrained(flipped)
    data = tables / "train.jsonl"
    expected = result_of(run("evaluate", trained, "--data", data, "--json"))["metrics"]["accuracy"]
    assert result_of(run("evaluate", flipped, "--data", data, "--json"))["metrics"]["accuracy"] == expected
    training = ("--train", data, "--eval", data, "--label", "label", "--lr", 0, "--method", "fwsvd")
    content = result_of(run("compress", flipped, tmp_path / "small", "--ratio", 2, *training, "--json"))
    assert content["metrics"]["original_accuracy"] == expected
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").config.id2label[0] == "plus"


def test_a_head_for_other_labels_is_replaced(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    data = ("--train", tables / "train.jsonl", "--eval", tables / "train.jsonl", "--epochs", 1)
    for label, outputs in (("other", len(GOOD + BAD)), ("score", 1)):
        output = tmp_path / label
        done = run("compress", trained, output, "--ratio", 2, *data, "--label", label, "--json")
        assert re.search(r"new head: .*\(minus, plus\)", done.stderr)
        result_of(done)
        assert AutoModelForSequenceClassification.from_pretrained(output).classifier.out_features == outputs


def test_a_decoder_without_a_head_learns_a_task(run: Any, decoder: Path, tables: Path, tmp_path: Path) -> None:
    data = ("--train", tables / "train.jsonl", "--eval", tables / "train.jsonl", "--epochs", 1, "--ratio", 2, "--json")
    refused = run("compress", decoder, tmp_path / "task", *data, "--label", "label")
    assert refused.exit_code == 2
    assert "GPT2LMHeadModel" in refused.stderr
    bare = tmp_path / "bare"
    factorformer.load(decoder).base_model.save_pretrained(bare)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(bare)
    result_of(run("compress", bare, tmp_path / "task", *data, "--label", "label"))
    healed = result_of(run("compress", decoder, tmp_path / "healed", *data, "--distill", decoder))
    assert {"perplexity", "original_perplexity", "next_token_agreement"} <= set(healed["metrics"])
    assert (tmp_path / "healed" / "generation_config.json").exists()


def test_a_language_model_is_measured_as_one(run: Any, decoder: Path, tables: Path, tmp_path: Path) -> None:
    texts, small = tables / "texts.txt", tmp_path / "small"
    options = ("--calibration", texts, "--eval", texts, "--json")
    done = run("compress", decoder, small, "--ratio", 4, *options)
    metrics = result_of(done)["metrics"]
    names = {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    protocol = {"tokens", "window", "stride"}
    apart = {"next_token_divergence", "next_token_agreement"}
    assert set(metrics) == names | {f"original_{name}" for name in names} | protocol | apart | {
        "loss_rise",
        "predicted_loss_rise",
    }
    alone = result_of(run("evaluate", small, "--data", texts, "--json"))["metrics"]
    assert alone == {name: metrics[name] for name in names | protocol}
    beside = result_of(run("evaluate", small, "--against", decoder, "--data", texts, "--json"))
    found = {f"original_{name}" for name in names} | names | protocol | apart
    assert beside["metrics"] == {name: metrics[name] for name in found}
    assert 3 < beside["bytes"]["ratio"] < 4  # of the whole model: embeddings stay as they are
    # By hand, window by window of the file as a whole: the loss that the model itself reports.
    model, tokenizer = factorformer.load(small), AutoTokenizer.from_pretrained(small)
    ids = tokenizer(texts.read_text().removesuffix("\n"))["input_ids"]
    assert f"{len(ids)} tokens in {math.ceil(len(ids) / 24)} windows of 24" in done.stderr
    windows = [torch.tensor([ids[start : start + 24]]) for start in range(0, len(ids), 24)]
    with torch.inference_mode():
        losses = [(float(model(x, labels=x).loss), x.shape[1] - 1) for x in windows]
        likely = [[m(x).logits[0, :-1].argmax(-1) for x in windows] for m in (model, factorformer.load(decoder))]
    tokens = sum(count for _, count in losses)
    mean = sum(loss * count for loss, count in losses) / tokens
    assert metrics["loss"] == pytest.approx(mean, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert (metrics["tokens"], metrics["window"], metrics["stride"]) == (tokens, 24, 24)
    agree = torch.cat(likely[0]) == torch.cat(likely[1])
    assert metrics["next_token_agreement"] == pytest.approx(float(agree.float().mean()), abs=1e-6)
    assert 0 < metrics["next_token_agreement"] < 1
    assert metrics["next_token_divergence"] > 0
    (tmp_path / "one.txt").write_text("film\n")
    refused = run("compress", decoder, tmp_path / "none", "--eval", tmp_path / "one.txt")
    assert refused.exit_code == 2
    assert "two tokens" in refused.stderr


def test_a_language_model_heals_without_labels(run: Any, decoder: Path, tables: Path, tmp_path: Path) -> None:
    text, seen = tmp_path / "text.txt", tmp_path / "seen.txt"
    lines = [f"{a} {b} {c}" for a in GOOD for b in BAD for c in ("film", "book", "and")]
    text.write_text("\n".join(lines * 3) + "\n")
    seen.write_text("\n".join(lines[::2]) + "\n")
    data = ("--train", text, "--eval", seen, "--ratio", 4, "--json")
    plain = result_of(run("compress", decoder, tmp_path / "fitted", "--calibration", text, *data[2:]))["metrics"]
    taught, alone = (
        run("compress", decoder, tmp_path / name, *data, *more, "--epochs", 16, "--lr", 3e-3)
        for name, more in (("taught", ("--distill", decoder)), ("alone", ()))
    )
    assert "next token divergence" in taught.stderr
    assert "perplexity" in alone.stderr
    assert "divergence" not in alone.stderr
    taught, alone = result_of(taught)["metrics"], result_of(alone)["metrics"]
    assert taught["next_token_divergence"] < 0.8 * plain["next_token_divergence"]
    assert alone["perplexity"] < 0.7 * min(plain["perplexity"], plain["original_perplexity"])
    timed = run("compress", decoder, tmp_path / "timed", *data, "--minutes", 0.03)
    assert timed.exit_code == 0, timed.stderr
    held = result_of(
        run("compress", decoder, tmp_path / "held", "--train", text, "--ratio", 4, "--epochs", 1, "--json")
    )
    assert held["metrics"]["tokens"] < 24 * 3


def test_texts_of_language_models(run: Any, decoder: Path, tables: Path, tmp_path: Path) -> None:
    short = ("--sequence-length", 8)
    files = ("--data", tables / "texts.txt", "--data", tables / "train.jsonl")
    content = result_of(run("evaluate", decoder, *files, *short, "--json"))["metrics"]
    assert {"texts_perplexity", "train_perplexity", "texts_tokens"} <= set(content)
    assert content["texts_window"] == content["train_window"] == 8
    talks = [[{"role": "user", "content": "a good film"}, {"role": "assistant", "content": "and the book"}]] * 4
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    spoken = ("--data", tmp_path / "talks.jsonl", "--text", "messages", "--json")
    refused = run("evaluate", decoder, *spoken)
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} [SEP] {% endfor %}"
    tokenizer.save_pretrained(decoder)
    # Six words and two ends for each.
    assert result_of(run("evaluate", decoder, *spoken, *short))["metrics"]["tokens"] == 4 * 8 - 4
    long = run("evaluate", decoder, *files, "--sequence-length", 25)
    assert long.exit_code == 2
    assert "--sequence-length 25: the model reads 24 tokens" in long.stderr
    encoder, wider = tmp_path / "encoder", tmp_path / "wider"
    model = factorformer.load(decoder)
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        encoder
    )
    model.resize_token_embeddings(40)
    for path in (encoder, wider):
        model.save_pretrained(wider)
        tokenizer.save_pretrained(path)
    others = tmp_path / "others"
    shutil.copytree(decoder, others)
    described = json.loads((others / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["film"], vocabulary["book"] = vocabulary["book"], vocabulary["film"]
    (others / "tokenizer.json").write_text(json.dumps(described))
    for original, message in (
        (encoder, "is no causal language model"),
        (wider, "has 40 tokens, and the model 18"),
        (others, "has other tokens"),
    ):
        for command in (
            ("evaluate", decoder, "--against", original, *files),
            ("compress", decoder, tmp_path / "x", "--train", tables / "texts.txt", "--distill", original),
        ):
            refused = run(*command)
            assert refused.exit_code == 2
            assert message in refused.stderr


def test_language_models_in_tables(run: Any, decoder: Path, tables: Path) -> None:
    printed = run("evaluate", decoder, "--against", decoder, "--data", tables / "texts.txt").stdout
    (line,) = [line.split() for line in printed.splitlines() if line.strip().startswith("perplexity")]
    assert line[1] == line[2]  # of the original, and of the model
    assert "before training" not in printed


def test_options_that_do_not_fit_the_model_are_named(
    run: Any, decoder: Path, base: Path, tables: Path, tmp_path: Path
) -> None:
    text = ("--calibration", tables / "texts.txt", "--ratio", 2)
    for command, target in (("compress", (tmp_path / "a",)), ("plan", ())):
        done = run(command, decoder, *target, *text, "--max-length", 9)
        assert "not used of language models: --max-length" in done.stderr
        done = run(command, base, *(path.with_name("b") for path in target), *text, "--sequence-length", 9)
        assert "not used but for causal language models: --sequence-length" in done.stderr


def test_an_interrupted_language_model_goes_on(
    run: Any, decoder: Path, tables: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    data = ("--train", tables / "texts.txt", "--eval", tables / "texts.txt", "--distill", decoder, "--ratio", 3)
    options = (*data, "--epochs", 6, "--batch-size", 2, "--json")
    whole = result_of(run("compress", decoder, tmp_path / "whole", *options))["metrics"]
    own, seen = language_modelling.predict, []

    def stopping(*arguments: Any, **others: Any) -> Any:
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return own(*arguments, **others)

    monkeypatch.setattr(language_modelling, "predict", stopping)
    assert run("compress", decoder, tmp_path / "parts", *options).exit_code == 130
    monkeypatch.undo()
    done = run("compress", decoder, tmp_path / "parts", *options, "--resume")
    parts = result_of(done)["metrics"]
    assert parts["next_token_divergence"] == pytest.approx(whole["next_token_divergence"], rel=1e-4)


@pytest.mark.parametrize("method", ["rankdyna", "dsformer"])
def test_what_moves_in_language_models(run: Any, decoder: Path, tables: Path, tmp_path: Path, method: str) -> None:
    data = ("--train", tables / "texts.txt", "--eval", tables / "texts.txt", "--distill", decoder, "--ratio", 2)
    metrics = result_of(run("compress", decoder, tmp_path / "out", "--method", method, *data, "--epochs", 4, "--json"))
    assert metrics["metrics"]["next_token_divergence"] > 0


def test_a_small_vocabulary_reads_its_text_alike(run: Any, decoder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a good film\nthe book\n" * 8)
    options = ("--trim-vocabulary", text, "--eval", text, "--method", "svd", "--ratio", 2, "--scope", "all", "--json")
    done = run("compress", decoder, tmp_path / "small", *options)
    assert "measured without the other tokens" in done.stderr
    result_of(done)
    small, whole = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "small", decoder))
    ids = small(text.read_text())["input_ids"]
    assert small.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(whole(text.read_text())["input_ids"])
    assert len(small) < len(whole)


def test_labels_may_be_given_by_number(run: Any, trained: Path, tables: Path) -> None:
    by_name, by_number = (
        result_of(run("evaluate", trained, "--data", tables / name, "--json"))["metrics"]
        for name in ("train.jsonl", "numbered.jsonl")
    )
    assert by_name == by_number


def test_regression_on_pairs(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    data = ("--text", "text", "--text", "other", "--label", "score")
    training = ("--train", tables / "train.jsonl", "--eval", tables / "train.jsonl", "--epochs", 15, "--lr", 1e-2)
    content = result_of(run("finetune", base, tmp_path / "dense", *data, *training, "--json"))
    assert set(content["metrics"]) == {"pearson", "spearman", "mse"}
    assert content["metrics"]["pearson"] > 0.5
    assert content["bytes"]["ratio"] == 1
    again = result_of(run("evaluate", tmp_path / "dense", *data, "--data", tables / "train.jsonl", "--json"))
    assert again["metrics"] == content["metrics"]


def test_a_plan_is_carried_out_as_it_was_printed(run: Any, base: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ("--ratio", 2, "--exclude", "*.query", "--output", file, "--json")
    planned = result_of(run("plan", base, *options), layers=True)
    assert planned["output"] == str(file)
    assert {layer["note"] for layer in planned["layers"] if layer["name"].endswith(".query")} == {"excluded"}
    content = result_of(run("compress", base, tmp_path / "small", "--plan", file, "--json"))
    assert content["bytes"] == planned["bytes"]
    found = result_of(run("inspect", tmp_path / "small", "--scope", "blocks", "--json"), layers=True)
    assert found["bytes"] == planned["bytes"]
    assert [(x["name"], x["structure"]) for x in found["layers"]] == [
        (x["name"], x["structure"]) for x in planned["layers"]
    ]
    refused = run("compress", base, tmp_path / "none", "--plan", file, "--ratio", 2)
    assert refused.exit_code == 2
    assert "leave these options out" in refused.stderr
    # The same blocks under a task head have other names.
    assert result_of(run("compress", trained, tmp_path / "head", "--plan", file, "--json"))["bytes"] == planned["bytes"]


def test_plans_and_models_print_as_tables(run: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist and some terminals set it
    done = run("plan", base, "--ratio", 2, "--scope", "all")
    assert "embeddings.word_embeddings" in done.stdout
    assert "whole model" in done.stdout
    assert "FLOPs per token" in done.stdout.split("Cost of")[0]
    done = run("inspect", base)
    row = next(line.split() for line in done.stdout.splitlines() if "encoder.layer.1.output.dense" in line)
    assert row == ["encoder.layer.1.output.dense", "32x64", "dense", "2,048", "8,192", "1.00x", "4,096"]
    assert "dense" in done.stdout
    assert "encoder.layer.1.output.dense" in done.stdout


def test_an_existing_output_is_replaced_only_on_demand(run: Any, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    assert run("compress", base, output, "--ratio", 3).exit_code == 0
    before = (output / "model.safetensors").read_bytes()
    done = run("compress", base, output, "--ratio", 2)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr
    (output / "precious").touch()
    done = run("compress", base, output, "--ratio", 2, "--overwrite")
    assert done.exit_code == 2
    assert "precious" in done.stderr
    assert (output / "model.safetensors").read_bytes() == before
    (output / "precious").unlink()
    assert run("compress", base, output, "--ratio", 2, "--overwrite").exit_code == 0
    assert (output / "model.safetensors").read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("command", [compress, finetune])
def test_default_settings_are_those_of_the_library(command: Callable[..., None]) -> None:
    settings, options = TrainingSettings(), inspect.signature(command).parameters
    for name, option in (("epochs", "epochs"), ("learning_rate", "lr"), ("batch_size", "batch_size"), ("seed", "seed")):
        left_open = command is compress and option in ("lr", "batch_size")  # which the task decides
        assert options[option].default == (None if left_open else getattr(settings, name))
    assert options["freeze_embeddings"].default is settings.freeze_embeddings


@pytest.mark.parametrize("method", ["rankdyna", "rankdyna_plain", "dynamic_kronecker", "dynamic_dense_sparse"])
def test_ranks_that_are_found_in_training(run: Any, trained: Path, tables: Path, tmp_path: Path, method: str) -> None:
    data, output = tables / "train.jsonl", tmp_path / "small"
    options = ["--method", method, "--ratio", 2, "--train", data, "--eval", data, "--label", "label", "--json"]
    content = result_of(run("compress", trained, output, *options, "--epochs", 3, "--batch-size", 4, "--lr", 3e-3))
    assert content["method"] == method
    assert content["bytes"]["ratio"] == pytest.approx(2, rel=0.03)  # one unit of these matrices is more than a percent
    assert {"start", "train", "total"} <= set(content["seconds"])
    assert result_of(run("evaluate", output, "--data", data, "--json"))["metrics"].items() <= content["metrics"].items()
    shown = json.loads(run("inspect", output, "--scope", "blocks", "--json").stdout)
    assert shown["bytes"] == content["bytes"]
    history = shown["rank_history"]
    layers = {layer["name"]: layer["structure"] for layer in shown["layers"]}
    for name, left in zip(history["layers"], history["ranks"][-1], strict=True):
        if layers[name] is not None:  # or else factors of so many units would be larger than the matrix
            assert left == (layers[name].get("rank") or layers[name]["atoms"])
    assert "Units left after so many steps" in run("inspect", output).stdout


def test_ranks_as_an_image(run: Any, trained: Path, tables: Path, tmp_path: Path) -> None:
    data, output, image = tables / "train.jsonl", tmp_path / "small", tmp_path / "ranks.svg"
    training = ["--train", data, "--label", "label", "--epochs", 2, "--batch-size", 4]
    assert run("compress", trained, output, "--method", "rankdyna", "--ratio", 2, *training).exit_code == 0
    refused = run("inspect", output, "--ranks", tmp_path / "ranks.txt")
    assert refused.exit_code != 0
    assert "not the name of an image" in refused.stderr
    done = run("inspect", output, "--ranks", image)
    assert done.exit_code == 0, done.stderr
    assert "<svg" in image.read_text()
    assert "exists already" in run("inspect", output, "--ranks", image).stderr
    assert "has no history of ranks" in run("inspect", trained, "--ranks", tmp_path / "none.svg").stderr
    # A model that is made of this one has another history.
    again = tmp_path / "again"
    assert run("finetune", output, again, "--train", data, "--label", "label", "--epochs", 1).exit_code == 0
    assert not (again / "factorformer_ranks.json").exists()


def test_without_training_a_dynamic_method_shrinks_all_alike(
    run: Any, base: Path, tables: Path, tmp_path: Path
) -> None:
    options = ["--method", "rankdyna", "--ratio", 2, "--calibration", tables / "train.jsonl", "--json"]
    done = run("compress", base, tmp_path / "small", *options)
    assert "without --train" in done.stderr
    assert result_of(done)["bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    assert not (tmp_path / "small" / "factorformer_ranks.json").exists()


def test_streaming(run: Any, base: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directory as without, of a model that is held block by block; asked for, or as memory wants it."""
    options = ("--method", "whitened", "--ratio", 2, "--calibration", tables / "texts.txt")
    result_of(run("compress", base, tmp_path / "whole", *options, "--json"))
    content = result_of(run("compress", base, tmp_path / "asked", *options, "--stream", "--json"))
    assert content["method"] == "whitened"
    assert content["bytes"]["ratio"] == pytest.approx(2, rel=0.02)
    monkeypatch.setattr(stream, "TOO_MUCH", 0.0)
    done = run("compress", base, tmp_path / "by-loss", *options[2:], "--json")
    assert "compressed block by block" in done.stderr
    assert "'fisher' keeps about" in done.stderr
    content = result_of(done)
    assert content["method"] == "fisher"
    assert content["metrics"]["predicted_cosine_loss"] > 0
    monkeypatch.setattr(stream, "ROOM", 0.0)
    done = run("compress", base, tmp_path / "large", *options[2:], "--json")
    assert "'whitened' reads inputs alone" in done.stderr
    assert result_of(done)["method"] == "whitened"
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2]])}
    whole, *others = (factorformer.load(tmp_path / name) for name in ("whole", "asked", "large"))
    for model in others:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)
    assert (tmp_path / "asked" / "1_Pooling").is_dir()
    assert json.loads((tmp_path / "asked" / "factorformer.json").read_text())["output"] == str(tmp_path / "asked")
    done = run("compress", base, tmp_path / "kept", *options[2:], "--no-stream", "--json")
    assert result_of(done)["method"] == "fisher"
    check(run("compress", base, tmp_path / "no", "--stream", "--scope", "all"), "--stream .* --scope all")
    check(run("compress", base, tmp_path / "no", "--stream", "--method", "rankdyna"), "--stream .* --method rankdyna")
