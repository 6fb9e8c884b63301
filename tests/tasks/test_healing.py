"""Healing of compressed encoders: closer to the original, in the time that there is, and on from where it stopped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from torch import Tensor

import factorformer
from factorformer.errors import DivergedError
from factorformer.layers.quantization import quantize
from factorformer.tasks.evaluation import compare_embeddings, embed
from factorformer.tasks.healing import HealingSettings, heal
from factorformer.training.distillation import mean_pool

Make = Callable[..., tf.PreTrainedModel]
FAST = HealingSettings(epochs=12, learning_rate=5e-3, batch_size=8, points=3)


@pytest.fixture
def teacher(make_classifier: Make) -> tf.PreTrainedModel:
    model = make_classifier().bert
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(10)  # texts that differ
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    return model


def compressed(teacher: tf.PreTrainedModel, *, int8: bool = False) -> tf.PreTrainedModel:
    model = copy.deepcopy(teacher)
    plan = factorformer.plan(model, "svd", ratio=10 if int8 else 2.5, int8=int8)
    factorformer.compress(model, plan, hold_floats=True)
    return model


@pytest.mark.parametrize("int8", [False, True])
def test_embeddings_get_closer(
    int8: bool,
    teacher: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    plain: datasets.Dataset,
    tmp_path: Path,
) -> None:
    student, lines, steps = compressed(teacher, int8=int8), [], []
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    original = embed(teacher, tokenizer, plain)
    before = compare_embeddings(original, embed(student, tokenizer, plain))
    curve = heal(
        student,
        tokenizer,
        plain,
        plain,
        FAST,
        tmp_path,
        teacher=teacher,
        pool=mean_pool,
        report=lines.append,
        progress=lambda *step: steps.append(step),
    )
    quantize(student)
    after = compare_embeddings(original, embed(student, tokenizer, plain))
    assert 1 - after["embedding_cosine"] < 0.7 * (1 - before["embedding_cosine"])
    assert after["similarity_spearman"] > before["similarity_spearman"]
    assert [row["step"] for row in curve] == [step * steps[-1][2] // 3 for step in (1, 2, 3)]
    assert curve[-1]["embedding_cosine"] == pytest.approx(after["embedding_cosine"], abs=1e-3)
    assert len(lines) == 3
    assert "neighbour recall" in lines[0]
    assert steps[-1] == ("train", steps[-1][2], steps[-1][2])
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert not student.training


def test_the_teacher_is_asked_once_for_each_text(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    student, read = compressed(teacher), []
    held = plain.select(range(4))
    teacher.register_forward_pre_hook(lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True)
    heal(student, tokenizer, plain, held, FAST, tmp_path, teacher=teacher, pool=mean_pool)
    assert sum(read) <= len(plain) + len(held) + FAST.batch_size * len(read) // 2
    assert sum(read) < 3 * len(plain)  # of twelve epochs


def test_what_is_pooled_is_what_is_learned(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    def few(hidden: Tensor, mask: Tensor) -> Tensor:
        return mean_pool(hidden, mask)[:, :6]

    found = {}
    for name, pool in (("few", few), ("mean", mean_pool)):
        student = compressed(teacher)
        heal(student, tokenizer, plain, plain, FAST, tmp_path / name, teacher=teacher, pool=pool)
        pairs = (embed(model, tokenizer, plain, pool=few) for model in (teacher, student))
        found[name] = compare_embeddings(*pairs)["embedding_cosine"]
    assert found["few"] > found["mean"]


def test_time_ends_a_training(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    seconds = []
    settings = dataclasses.replace(FAST, epochs=1e-3, minutes=0.03)
    curve = heal(
        compressed(teacher),
        tokenizer,
        plain,
        plain,
        settings,
        tmp_path,
        teacher=teacher,
        pool=mean_pool,
        progress=lambda phase, done, total: seconds.append((done, total)),
    )
    assert curve[-1]["seconds"] >= 1.8
    assert curve[-1]["step"] > len(plain) / FAST.batch_size  # more than the thousandth of an epoch
    assert {total for _, total in seconds} == {1}
    assert max(done for done, _ in seconds) == 1
    assert len(curve) <= FAST.points


def test_a_run_goes_on_as_if_it_had_not_stopped(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    start, lines = compressed(teacher), []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    options = {"teacher": teacher, "pool": mean_pool}
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    expected = heal(whole, tokenizer, plain, plain, FAST, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        heal(parts, tokenizer, plain, plain, FAST, tmp_path / "parts", **options, report=stop)
    again = copy.deepcopy(start)
    curve = heal(again, tokenizer, plain, plain, FAST, tmp_path / "parts", **options)
    assert [row["step"] for row in curve] == [row["step"] for row in expected]
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], atol=1e-5), name
    # One that had ended is as it was.
    ended = copy.deepcopy(start)
    assert heal(ended, tokenizer, plain, plain, FAST, tmp_path / "parts", **options) == curve
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ended.state_dict().items())


def test_divergence_is_said(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    settings = dataclasses.replace(FAST, learning_rate=1e30)
    with pytest.raises(DivergedError, match="learning rate 1e"):
        heal(compressed(teacher), tokenizer, plain, plain, settings, tmp_path, teacher=teacher, pool=mean_pool)
