"""Predictions keep the order of rows, and metrics are those of scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tests.tasks.test_finetuning import compressed, sentences

from factorformer.errors import DataError, ModelError
from factorformer.tasks.data import Columns, Labels, encode
from factorformer.tasks.evaluation import (
    compare_embeddings,
    correlation,
    embed,
    evaluate,
    predict,
    predict_words,
    rank_correlation,
    score,
)

Make = Callable[..., tf.PreTrainedModel]


@pytest.fixture
def labelled(tokenizer: tf.PreTrainedTokenizerBase) -> datasets.Dataset:
    rows = sentences()
    return encode(tokenizer, rows, Columns(("text",), "label"), Labels.of(rows, "label"))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_predictions_keep_the_order_of_rows(
    size: int, tokenizer: tf.PreTrainedTokenizerBase, labelled: datasets.Dataset, make_classifier: Make
) -> None:
    model = compressed(make_classifier(labels=3))
    seen = []
    found = predict(model.train(), tokenizer, labelled, batch_size=size, progress=lambda *step: seen.append(step))
    assert not model.training
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in labelled["input_ids"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    assert seen[-1] == ("evaluate", len(labelled), len(labelled))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_embeddings_keep_the_order_of_rows(
    size: int, tokenizer: tf.PreTrainedTokenizerBase, labelled: datasets.Dataset, make_classifier: Make
) -> None:
    model = make_classifier()
    with torch.inference_mode():
        expected = [model.bert(input_ids=torch.tensor([ids]))[0][0].mean(0) for ids in labelled["input_ids"]]
    for encoder in (model, model.bert):
        torch.testing.assert_close(embed(encoder, tokenizer, labelled, size), torch.stack(expected), rtol=0, atol=1e-5)


def test_predictions_of_half_precision_models_are_float32(
    tokenizer: tf.PreTrainedTokenizerBase, labelled: datasets.Dataset, make_classifier: Make
) -> None:
    model = make_classifier().to(torch.bfloat16)
    assert predict(model, tokenizer, labelled).dtype == np.float32
    assert embed(model, tokenizer, labelled).dtype == torch.float32


def test_predictions_that_are_not_finite_are_an_error(
    tokenizer: tf.PreTrainedTokenizerBase, labelled: datasets.Dataset, make_classifier: Make
) -> None:
    model = make_classifier()
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        evaluate(model, tokenizer, labelled, Labels("classification", ("0", "1")))


def test_no_rows_to_evaluate_on(
    tokenizer: tf.PreTrainedTokenizerBase, labelled: datasets.Dataset, make_classifier: Make
) -> None:
    with pytest.raises(DataError, match="no rows"):
        predict(make_classifier(), tokenizer, labelled.select([]))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_metrics_are_those_of_sklearn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    logits, references = generator.normal(size=(40, classes)), generator.integers(0, classes, 40)
    found = score(logits, references, Labels("classification", tuple(map(str, range(classes)))))
    predicted = logits.argmax(-1)
    assert found["accuracy"] == np.mean(predicted == references)
    assert found["macro_f1"] == pytest.approx(f1_score(references, predicted, average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(references, predicted))
    assert ("f1" in found) == (classes == 2)
    if classes == 2:
        assert found["f1"] == pytest.approx(f1_score(references, predicted))


def test_a_perfect_classifier_scores_one() -> None:
    references = np.array([0, 1, 1, 0])
    found = score(np.eye(2)[references], references, Labels("classification", ("no", "yes")))
    loss = -math.log(math.e / (math.e + 1))  # logits of 0 and 1
    assert found == {"accuracy": 1, "macro_f1": 1, "matthews": 1, "f1": 1, "loss": pytest.approx(loss)}


def test_regression_metrics_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    logits, references = generator.normal(size=(40, 1)), generator.normal(size=40).round(1)  # with ties
    found = score(logits, references, Labels("regression"))
    assert found["pearson"] == pytest.approx(pearsonr(logits[:, 0], references).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(logits[:, 0], references).statistic)
    assert found["mse"] == pytest.approx(np.mean((logits[:, 0] - references) ** 2))
    assert rank_correlation(references, -(references**3)) == pytest.approx(-1)


def test_equal_embeddings_compare_as_equal() -> None:
    embeddings = torch.randn(12, 5)
    found = compare_embeddings(embeddings, 3 * embeddings)
    assert found["embedding_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["similarity_spearman"] == pytest.approx(1, abs=1e-6)
    # A rotation keeps all similarities, though not the embeddings.
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    found = compare_embeddings(embeddings, embeddings @ rotation)
    assert found["embedding_cosine"] < 0.9
    assert found["similarity_spearman"] > 0.999


def test_what_is_not_defined_is_not_a_number() -> None:
    """Not zero, which would mean that there is no correlation."""
    constant, values = np.ones(5), np.arange(5.0)
    for measure in (correlation, rank_correlation):
        assert measure(values, -values) == pytest.approx(-1)
        for a, b in ((constant, values), (values, constant), (values[:1], values[:1]), (values[:0], values[:0])):
            assert np.isnan(measure(a, b))
    assert np.isnan(score(np.eye(2)[[0, 1]], np.array([1, 1]), Labels("classification", ("a", "b")))["matthews"])
    for rows in (1, 2):
        found = compare_embeddings(torch.randn(rows, 4), torch.randn(rows, 4))
        assert np.isfinite(found["embedding_cosine"])
        assert np.isnan(found["similarity_spearman"])
    one = score(np.array([[0.5]]), np.array([1.0]), Labels("regression"))
    assert one["mse"] == pytest.approx(0.25)
    assert np.isnan(one["pearson"])


def test_any_number_of_labels_is_scored_by_sets() -> None:
    labels = Labels("multi_label", ("a", "b", "c"))
    logits = np.array([[1, -1, 2], [-1, -1, -1], [1, 1, -1]], np.float32)
    wanted = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]], np.float32)
    found = score(logits, wanted, labels)
    assert found["subset_accuracy"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1))
    assert found["macro_f1"] == pytest.approx((1 + 0 + 1) / 3)


def test_words_are_scored_one_by_one(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    rows = datasets.Dataset.from_dict(
        {"words": [["w1", "w2"], ["w3"], ["w4", "w5", "w6"]], "tags": [[0, 1], [1], [0, 0, 1]]}
    )
    columns, labels = Columns(("words",), "tags", words=True), Labels("tokens", ("0", "1"))
    data = encode(tokenizer, rows, columns, labels)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = tf.BertForTokenClassification(tf.BertConfig(**sizes, vocab_size=64, initializer_range=0.5)).eval()
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([ids])).logits[0, 1:-1] for ids in data["input_ids"]]).numpy()
    tags = np.array([tag for row in rows["tags"] for tag in row])
    assert evaluate(model, tokenizer, data, labels)["accuracy"] == pytest.approx(np.mean(alone.argmax(-1) == tags))
    found, references = predict_words(model, tokenizer, data)
    for tag in (0, 1):  # whatever the order of the words
        np.testing.assert_allclose(np.sort(found[references == tag, 0]), np.sort(alone[tags == tag, 0]), rtol=1e-4)
