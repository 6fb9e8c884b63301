"""Heads: kept, new, or refused by name, from the configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf

from factorformer.errors import DataError, ModelError
from factorformer.hf.source import read_config
from factorformer.tasks.classification import check_head, find_head, is_causal, labels_for, load_classifier
from factorformer.tasks.data import Labels

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TWO, TAGS = Labels("classification", ("LABEL_0", "LABEL_1")), Labels("tokens", ("LABEL_0", "LABEL_1"))
SEVERAL, SCORE = Labels("multi_label", ("LABEL_0", "LABEL_1")), Labels("regression")


def directory(path: Path, name: str | None, **options: Any) -> Path:
    """A directory without weights."""
    config = tf.BertConfig(**SIZES, vocab_size=50, architectures=None if name is None else [name], **options)
    config.save_pretrained(path)
    return path


def test_heads_by_task(tmp_path: Path) -> None:
    several = {"problem_type": "multi_label_classification"}
    for name, options, kept, replaced in (
        ("BertForSequenceClassification", {}, [TWO], [SCORE, Labels("classification", ("a", "b"))]),
        ("BertForSequenceClassification", {"num_labels": 1}, [SCORE], [TWO]),
        ("BertForSequenceClassification", several, [SEVERAL], [Labels("multi_label", ("a", "b"))]),
        ("BertForTokenClassification", {}, [TAGS], [Labels("tokens", ("a", "b"))]),
    ):
        path = directory(tmp_path / "head", name, **options)
        assert all(find_head(path, labels).trained for labels in kept)
        for labels in replaced:
            head = find_head(path, labels)
            assert not head.trained
            assert head.replaced is not None
        families = ({TWO, SCORE}, {TAGS}, {SEVERAL})
        for labels in set().union(*(family for family in families if not family & {*kept, *replaced})):
            with pytest.raises(ModelError, match=name):
                find_head(path, labels)
    for name in ("BertModel", "BertForMaskedLM", "BertForPreTraining", None):
        assert find_head(directory(tmp_path / "bare", name), TAGS).labels == TAGS
    for name in (
        "BertForQuestionAnswering",
        "BertLMHeadModel",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
    ):
        with pytest.raises(ModelError, match=name):
            find_head(directory(tmp_path / "other", name), TWO)


def test_architectures_without_such_heads(tmp_path: Path) -> None:
    tf.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"clip.*one label a text"):
        find_head(tmp_path, TWO)


def test_causal_language_models() -> None:
    for config, name, causal in (
        (tf.GPT2Config(), "GPT2LMHeadModel", True),
        (tf.LlamaConfig(), "LlamaForCausalLM", True),
        (tf.BertConfig(), "BertLMHeadModel", True),
        (tf.BertConfig(), "BertForMaskedLM", False),
        (tf.T5Config(), "T5ForConditionalGeneration", False),
        (tf.GPT2Config(), "GPT2Model", False),
    ):
        config.architectures = [name]
        assert is_causal(config) == causal, name


def test_labels_under_the_head_of_a_model(tmp_path: Path) -> None:
    path = directory(
        tmp_path, "BertForSequenceClassification", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    head = check_head(path, read_config(path))
    for values, ids in ((["yes", "no"], [1, 0]), ([1, 0], [1, 0]), (["1", "0"], [1, 0])):
        rows = datasets.Dataset.from_dict({"label": values})
        assert labels_for(head, rows, "label").ids(rows, "label") == ids
    for values, message in ((["maybe"], "maybe"), ([["yes"]], "a list"), ([2], "'2'")):
        with pytest.raises(DataError, match=message):
            labels_for(head, datasets.Dataset.from_dict({"label": values}), "label")


def test_a_new_head_leaves_the_callers_random_numbers(tmp_path: Path) -> None:
    tf.BertModel(tf.BertConfig(**SIZES, vocab_size=50, pad_token_id=0)).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    wanted = ((TWO, 1), (TWO, 1), (TWO, 2), (TAGS, 1))
    heads = [load_classifier(tmp_path, labels, seed).model for labels, seed in wanted]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [head.classifier.weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert type(heads[3]).__name__ == "BertForTokenClassification"


def test_a_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory(tmp_path, "BertModel")
    read, reads = tf.AutoConfig.from_pretrained, []
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda *a, **k: reads.append(a) or read(*a, **k))
    assert find_head(path, TWO, read_config(path)).labels == TWO
    assert len(reads) == 1
