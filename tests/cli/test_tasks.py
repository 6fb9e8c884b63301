"""A model is trained and scored as what it is, or refused by name; precision and work are kept."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from tests.cli.conftest import BAD, GOOD, WORDS

import factorformer
from factorformer.cli import _measure
from factorformer.cli._jobs import finetune as finetuning
from factorformer.errors import ModelError

FAST = ("--epochs", 12, "--batch-size", 4, "--lr", 1e-2)
HEALED = ("--epochs", 4, "--batch-size", 4, "--lr", 5e-3)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tags(tmp_path: Path) -> Path:
    """Words with a tag each: good ones, bad ones, and others."""
    rows = [
        {"words": ["the", one, "film", "and", two, "book"], "tags": ["O", "GOOD", "O", "O", "BAD", "O"]}
        for one in GOOD
        for two in BAD
    ]
    return write(tmp_path / "tags.jsonl", rows)


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """Texts with any number of labels, from none to three."""
    rows = [
        {"text": f"{one} {two} {thing}", "label": [*["plus"] * (one in GOOD), *["minus"] * (two in BAD), *topic]}
        for one in ("good", "great", "a")
        for two in ("bad", "weak", "the")
        for thing, topic in (("film", ["cinema"]), ("and", []))
    ]
    return write(tmp_path / "topics.jsonl", rows)


def made(path: Path, base: Path, name: str, **options: Any) -> Path:
    """A model of this class with the tokenizer of `base`."""
    torch.manual_seed(0)
    config = tf.AutoConfig.from_pretrained(base, **options)
    getattr(tf, name)(config).save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def metrics(done: Any) -> dict[str, float]:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["metrics"]


def test_tagging_words(run: Any, base: Path, tags: Path, tmp_path: Path) -> None:
    data = ("--text", "words", "--label", "tags", "--task", "token-classification")
    training = ("--train", tags, "--eval", tags, *data, "--json")
    first = metrics(run("finetune", base, tmp_path / "dense", *training, *FAST))
    assert 0 < first["loss"] < 0.5
    assert first == pytest.approx({"accuracy": 1, "macro_f1": 1, "loss": first["loss"]})
    model = tf.AutoModelForTokenClassification.from_pretrained(tmp_path / "dense")
    assert type(model).__name__ == "BertForTokenClassification"
    assert model.config.id2label == {0: "BAD", 1: "GOOD", 2: "O"}
    assert metrics(run("evaluate", tmp_path / "dense", "--data", tags, *data, "--json")) == first
    training = (*training, *HEALED, "--distill", tmp_path / "dense")
    small = metrics(run("compress", tmp_path / "dense", tmp_path / "small", "--ratio", 2, *training))
    assert small["original_accuracy"] == 1
    assert small["accuracy"] > 0.9
    assert type(factorformer.load(tmp_path / "small")).__name__ == "BertForTokenClassification"
    # With labels for a fit; and with none at all, on text as well as on words.
    options = ("--ratio", 2, "--calibration", tags, "--json")
    metrics(run("compress", tmp_path / "dense", tmp_path / "fisher", "--method", "fwsvd", *options, *data))
    metrics(run("compress", tmp_path / "dense", tmp_path / "fit", *options, "--text", "words", *data[4:]))
    refused = run("evaluate", tmp_path / "dense", "--data", tags, *data[:4])
    assert refused.exit_code == 2
    assert "--task token-classification" in refused.stderr


def test_any_number_of_labels(run: Any, base: Path, topics: Path, tmp_path: Path) -> None:
    training = ("--train", topics, "--eval", topics, "--label", "label", "--json")
    first = metrics(run("finetune", base, tmp_path / "dense", *training, *FAST))
    assert set(first) == {"micro_f1", "macro_f1", "subset_accuracy"}
    assert first["subset_accuracy"] > 0.9
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[i] for i in range(3)] == ["cinema", "minus", "plus"]
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "dense")
    rows = [json.loads(line) for line in topics.read_text().splitlines()]
    with torch.inference_mode():
        chosen = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits > 0
    wanted = [[name in row["label"] for name in ("cinema", "minus", "plus")] for row in rows]
    assert first["micro_f1"] == pytest.approx(f1_score(wanted, chosen.numpy(), average="micro"))
    assert metrics(run("evaluate", tmp_path / "dense", "--data", topics, "--json")) == first
    training = (*training, *HEALED, "--distill", tmp_path / "dense")
    assert metrics(run("compress", tmp_path / "dense", tmp_path / "small", "--ratio", 2, *training))["micro_f1"] > 0.9


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Which word stands before the thing that is asked for? In some contexts longer than a window, in some nowhere."""
    rows = []
    for one in GOOD:
        for two in BAD:
            context = f"the {one} film and the {two} book"
            for thing, word in (("film", one), ("book", two)):
                rows.append((thing, context, [word]))
        rows.append(("book", f"the {one} film", []))
    data = [
        {"question": q, "context": c, "answers": {"text": a, "answer_start": [c.index(t) for t in a]}}
        for q, c, a in rows
    ]
    return write(tmp_path / "questions.jsonl", data)


def test_questions_are_answered_from_contexts(run: Any, base: Path, questions: Path, tmp_path: Path) -> None:
    columns = ("--text", "question", "--text", "context", "--label", "answers", "--max-length", 9)
    training = ("--train", questions, "--eval", questions, *columns, "--json")
    done = run("finetune", base, tmp_path / "dense", *training, *FAST[2:], "--epochs", 25)
    first = metrics(done)
    assert "windows of at most 9 tokens" in done.stderr
    assert set(first) == {"exact_match", "f1", "loss"}
    assert first["exact_match"] > 0.9
    model = tf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "dense")
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert metrics(run("evaluate", tmp_path / "dense", "--data", questions, *columns, "--json")) == first
    training = (*training, *HEALED, "--distill", tmp_path / "dense")
    small = metrics(run("compress", tmp_path / "dense", tmp_path / "small", "--ratio", 2, *training))
    assert small["original_f1"] == first["f1"]
    assert small["f1"] > 0.7
    assert type(factorformer.load(tmp_path / "small")).__name__ == "BertForQuestionAnswering"
    options = ("--ratio", 2, "--calibration", questions, "--json")
    metrics(run("compress", tmp_path / "dense", tmp_path / "fisher", "--method", "fwsvd", *options, *columns))
    # Answers that are texts are looked for in the context.
    table = [json.loads(line) for line in questions.read_text().splitlines()]
    plain = [{**row, "answers": row["answers"]["text"][0]} for row in table if row["answers"]["text"]]
    found = metrics(
        run("evaluate", tmp_path / "dense", "--data", write(tmp_path / "p.jsonl", plain), *columns, "--json")
    )
    assert found["exact_match"] > 0.9
    wrong = write(tmp_path / "wrong.jsonl", [{**plain[0], "answers": "nowhere"}])
    refused = run("evaluate", tmp_path / "dense", "--data", wrong, *columns)
    assert refused.exit_code == 2
    assert "line 1: the answer 'nowhere' is not in the context" in refused.stderr


def test_heads_for_another_task_are_refused(
    run: Any, base: Path, trained: Path, tags: Path, topics: Path, tables: Path, tmp_path: Path
) -> None:
    labelled = tables / "train.jsonl"
    several = made(
        tmp_path / "several",
        base,
        "BertForSequenceClassification",
        num_labels=3,
        problem_type="multi_label_classification",
    )
    tagger = made(tmp_path / "tagger", base, "BertForTokenClassification", num_labels=3)
    answers = made(tmp_path / "answers", base, "BertForQuestionAnswering")
    decoder = made(tmp_path / "decoder", base, "BertLMHeadModel", is_decoder=True)
    one_label = ("--train", labelled, "--label", "label")
    words = ("--train", tags, "--text", "words", "--label", "tags", "--task", "token-classification")
    for model, options, offender in (
        (several, one_label, "multi-label"),
        (tagger, one_label, "BertForTokenClassification"),
        (trained, ("--train", topics, "--label", "label"), "multi-label"),
        (trained, words, "every word"),
        (answers, one_label, "--text question"),
        (decoder, one_label, "BertLMHeadModel"),
    ):
        for command in ("finetune", "compress"):
            done = run(command, model, tmp_path / "out", *options)
            assert done.exit_code == 2
            assert offender in done.stderr.splitlines()[-1]
    for model, offender in ((several, "multi-label"), (tagger, "every word"), (answers, "--text question")):
        done = run("evaluate", model, "--data", labelled)
        assert done.exit_code == 2
        assert offender in done.stderr
    assert not (tmp_path / "out").exists()
    masked = made(tmp_path / "masked", base, "BertForMaskedLM")
    assert run("finetune", masked, tmp_path / "out", *one_label, "--epochs", 1).exit_code == 0


@pytest.fixture
def translator(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, ends: bool = True) -> Path:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(WORDS)}
        config = tf.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=3 if ends else 17, num_labels=2)
        torch.manual_seed(0)
        getattr(tf, name)(config).save_pretrained(tmp_path / name)
        tf.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_texts_are_written_for_texts(run: Any, translator: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    source = translator("T5ForConditionalGeneration")
    tf.AutoTokenizer.from_pretrained(source, eos_token="[SEP]").save_pretrained(source)
    rows = [{"text": f"{a} {b}", "other": f"{b} {a} {b}"} for a in (*GOOD, *BAD) for b in ("film", "book")]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    training = ("--train", pairs, "--eval", pairs, "--label", "other", "--json")
    first = metrics(run("finetune", source, tmp_path / "dense", *training, *FAST[2:], "--epochs", 40))
    assert set(first) == {"loss", "perplexity", "token_accuracy", "bleu", "chrf"}
    assert first["chrf"] > 90
    assert metrics(run("evaluate", tmp_path / "dense", "--data", pairs, "--label", "other", "--json")) == first
    training = (*training, *HEALED, "--distill", tmp_path / "dense")
    small = metrics(run("compress", tmp_path / "dense", tmp_path / "small", "--ratio", 2, *training))
    assert small["original_chrf"] == pytest.approx(first["chrf"])
    assert small["chrf"] > 50
    assert type(factorformer.load(tmp_path / "small")).__name__ == "T5ForConditionalGeneration"
    # The same in two files, line by line.
    lines = {}
    for option, column in (("source", "text"), ("target", "other")):
        lines[option] = tmp_path / f"{option}.txt"
        lines[option].write_text("".join(f"{row[column]}\n" for row in rows))
    two = ("--source", lines["source"], "--target", lines["target"])
    assert metrics(run("evaluate", tmp_path / "dense", *two, "--json")) == first
    briefly = (*FAST[2:], "--epochs", 1)
    once = metrics(run("finetune", source, tmp_path / "once", *training[:7], *briefly))
    training = (*two, "--eval-source", lines["source"], "--eval-target", lines["target"], "--json")
    assert metrics(run("finetune", source, tmp_path / "again", *training, *briefly)) == once
    training = (*training, *HEALED, "--distill", tmp_path / "dense")
    again = metrics(run("compress", tmp_path / "dense", tmp_path / "two", "--ratio", 2, *training))
    assert again == small
    for command in ("finetune", "compress"):
        refused = run(command, base, tmp_path / "out", *two)
        assert refused.exit_code == 2
        assert "writes no texts" in refused.stderr
    for command, options, message in (
        ("finetune", ("--train", pairs, "--text", "text", "--text", "other"), "column 'label'"),
        ("finetune", two[:2], "--source alone.*--target"),
        ("finetune", (*two, "--train", pairs), "the one or the others"),
        ("finetune", (*two, "--eval-target", pairs), "--eval-target alone.*--eval-source"),
        ("finetune", (*two, "--task", "classification"), "leave one out"),
        ("compress", ("--train", pairs, *training[4:8]), "without --label"),
        ("finetune", (), "--train, or --source"),
        ("compress", ("--task", "text-to-text", "--train", pairs, "--distill", source), "--label, or give --source"),
        ("evaluate", (), "--data, or --source"),
        ("evaluate", (*two, "--against", source), "leave --task, --source"),
    ):
        output = () if command == "evaluate" else (tmp_path / "out",)
        refused = run(command, source, *output, *options)
        assert refused.exit_code == 2
        assert re.search(message, refused.stderr), refused.stderr
    assert not (tmp_path / "out").exists()


def test_encoder_decoders(run: Any, translator: Callable[..., Path], tables: Path, tmp_path: Path) -> None:
    options = ("--ratio", 2, "--calibration", tables / "texts.txt", "--json")
    source = translator("T5ForConditionalGeneration")
    errors = {}
    for method in ("whitened", "svd"):
        metrics(run("compress", source, tmp_path / method, *options, "--method", method))
        inputs = {"input_ids": torch.tensor([[2, 5, 9, 7, 3]]), "decoder_input_ids": torch.tensor([[0, 2, 5, 9, 7]])}
        with torch.inference_mode():
            first, second = (factorformer.load(path)(**inputs).logits for path in (source, tmp_path / method))
        errors[method] = float((first - second).norm())
    assert errors["whitened"] < errors["svd"]
    assert run("plan", source, *options).exit_code == 0
    done = run("compress", source, tmp_path / "out", "--ratio", 2, "--eval", tables / "texts.txt")
    assert done.exit_code == 2
    assert "decoder" in done.stderr
    training = ("--train", tables / "train.jsonl", "--eval", tables / "train.jsonl", "--epochs", 1)
    assert run("finetune", translator("T5ForSequenceClassification"), tmp_path / "tuned", *training).exit_code == 0
    done = run("finetune", translator("T5ForSequenceClassification", ends=False), tmp_path / "none", *training)
    assert done.exit_code == 2
    assert "end token (id 17)" in done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_precision_of_the_output_is_that_of_the_input(
    dtype: torch.dtype, run: Any, trained: Path, tables: Path, tmp_path: Path
) -> None:
    factorformer.load(trained).to(dtype).save_pretrained(tmp_path / "low")
    tf.AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "low")
    data = (
        "--train",
        tables / "train.jsonl",
        "--eval",
        tables / "train.jsonl",
        "--label",
        "label",
        "--epochs",
        1,
        "--json",
    )
    sizes = {
        "--ratio": ("--ratio", 2),
        "--int8": ("--int8", "--ratio", 4),
        "rankdyna": ("--method", "rankdyna", "--ratio", 2),
    }
    for name, options in sizes.items():
        done = run("compress", tmp_path / "low", tmp_path / name, *options, *data)
        assert done.exit_code == 0, done.stderr
        content = json.loads(done.stdout)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
        blocks = {key: t for key, t in stored.items() if ".layer." in key}
        assert content["bytes"]["compressed"] == sum(tensor.nbytes for tensor in blocks.values())
        dense = load_file(tmp_path / "low" / "model.safetensors")
        assert content["bytes"]["original"] == sum(t.nbytes for key, t in dense.items() if ".layer." in key)
        again = metrics(run("evaluate", tmp_path / name, "--data", tables / "train.jsonl", "--json"))
        assert again.items() <= content["metrics"].items()
    for source in ("low", "--int8"):
        run("finetune", tmp_path / source, tmp_path / "tuned", *data, "--overwrite", "--batch-size", 4, "--lr", 5e-3)
        before, after = (load_file(tmp_path / path / "model.safetensors") for path in (source, "tuned"))
        assert {key: t.dtype for key, t in before.items()} == {key: t.dtype for key, t in after.items()}
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_what_was_made_is_saved_before_it_is_measured(
    run: Any, trained: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--train", tables / "train.jsonl", "--eval", tables / "train.jsonl", "--label", "label", "--epochs", 1)
    real = _measure.evaluate

    def fails(error: BaseException) -> Callable[..., Any]:
        def evaluate(model: Any, tokenizer: Any, rows: Any, labels: Any, progress: Any, phase: str = "evaluate") -> Any:
            if phase in ("evaluate original", "evaluate before training"):
                return real(model, tokenizer, rows, labels, progress, phase)
            raise error

        return evaluate

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # One way of handling errors is shared by both commands.
    for command, error, code in (
        ("compress", ModelError("no number"), 2),
        ("finetune", full, 2),
        ("compress", KeyboardInterrupt(), 130),
        ("finetune", RuntimeError("bug"), None),
    ):
        monkeypatch.setattr(_measure, "evaluate", fails(error))
        monkeypatch.setattr(finetuning, "evaluate", fails(error))
        output = tmp_path / f"{command} {type(error).__name__}"
        arguments = (command, trained, output, *data, *(("--ratio", 2) if command == "compress" else ()))
        if code is None:
            with pytest.raises(RuntimeError, match="bug"):
                run(*arguments)
        else:
            done = run(*arguments)
            assert done.exit_code == code
            assert f"complete in '{output}'" in done.stderr.splitlines()[-1]
        assert factorformer.load(output).config.num_labels == 2
        assert tf.AutoTokenizer.from_pretrained(output)("good film")["input_ids"]
        found = json.loads((output / "factorformer.json").read_text())
        assert not {name for name in found["metrics"] if not name.startswith(("original_", "fitted_", "predicted_"))}
        assert found["seconds"]["train"] > 0


def test_everything_is_checked_before_weights_are_read(
    run: Any,
    base: Path,
    trained: Path,
    tables: Path,
    topics: Path,
    tags: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    other = made(tmp_path / "other", base, "BertForSequenceClassification", hidden_size=64)
    answers = made(tmp_path / "answers", base, "BertForQuestionAnswering")
    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", weights)
    monkeypatch.chdir(tables)
    train, label = ("--train", "train.jsonl"), ("--label", "label")
    (tmp_path / "file").touch()
    both: list[tuple[Path, tuple[Any, ...], str]] = [
        (base, (*train, "--label", "nothing"), "no column 'nothing'"),
        (base, (*train, *label, "--text", "nothing"), "no column 'nothing'"),
        (base, (*train, *label, "--eval", "nothing.tsv"), "nothing.tsv"),
        (base, (*train, *label, "--eval", "unseen.jsonl"), "'unseen.jsonl': column 'label'"),
        (base, (*train, *label, "--eval", "texts.txt"), "no column"),
        (base, ("--train", "long.txt", *label), "no column 'label'"),
        (base, ("--train", "nulls.jsonl", *label), "no column 'label'"),
        (base, (*train, *label, "--distill", "nowhere/else"), "nowhere/else"),
        (base, (*train, *label, "--distill", base), "no sequence-classification head"),
        (trained, (*train, *label, "--distill", other), "hidden_size is 64"),
        (answers, (*train, *label), "--text question"),
        (trained, ("--train", topics, *label), "multi-label"),
        (trained, (*train, *label, "--task", "multi-label"), "a list belongs here"),
        (trained, (*train, *label, "--task", "text-to-text"), "writes no texts"),
        (base, (*train, *label, "--task", "question-answering"), "answers"),
        (
            trained,
            ("--train", tags, "--text", "words", "--label", "tags", "--task", "token-classification"),
            "every word",
        ),
        (base, (*train, *label, "--epochs", "inf"), "epochs"),
        (base, ("--train", "broken.jsonl", *label), "line 2, column 2"),
    ]
    texts = ("--train", "texts.txt", "--distill", base)
    compressing: list[tuple[Path, tuple[Any, ...], str]] = [
        (base, ("--calibration", "long.txt", "--max-length", 64), "42 tokens"),
        (base, (*texts, "--eval", "two.txt"), "at least 3"),
        (base, (*texts, "--eval", "nulls.jsonl"), "line 2, column 'text'"),
        (base, ("--train", "two.txt", "--distill", base), "--eval"),
        (base, ("--method", "fwsvd", *train, *label), "finetune"),
        (base, ("--share", "inputs"), "share"),
        (base, ("--ratio", "inf"), "ratio"),
        (base, ("--budget", "flops"), "flops"),
        (base, ("--plan", "train.jsonl"), "plan"),
        (base, ("--method", "shapeshifter", "--calibration", "texts.txt"), "factorformer train"),
        (base, ("--method", "wihtened"), "whitened"),
        (base, ("--calibration", "texts.txt", "--eval", "train.jsonl", *label), "no classification head"),
    ]
    evaluating: list[tuple[Path, tuple[Any, ...], str]] = [
        (base, ("--data", "train.jsonl"), "no classification head"),
        (trained, ("--data", "unseen.jsonl"), "never"),
        (trained, ("--data", "train.jsonl", "--text", "nothing"), "nothing"),
        (trained, ("--data", "nulls.jsonl"), "no column 'label'"),
        (answers, ("--data", "train.jsonl"), "--text question"),
    ]
    output = tmp_path / "out"
    calls = [(command, *case) for command in ("finetune", "compress") for case in both]
    calls += [("compress", *case) for case in compressing] + [("evaluate", *case) for case in evaluating]
    for command, model, options, offender in calls:
        done = run(command, model, *(() if command == "evaluate" else (output,)), *options)
        assert done.exit_code == 2, (command, options, done.stderr)
        assert offender in done.stderr, (command, options, done.stderr)
    assert not output.exists()
    assert "weights were read" in run("finetune", trained, output, *train, *label).stderr  # by one without a fault
