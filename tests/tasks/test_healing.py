"""Healing of compressed encoders: closer to the original, in the time that there is, and on from where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from torch import Tensor

import factorformer
from factorformer.errors import DataError, DivergedError, ModelError, OutputError
from factorformer.layers.quantization import quantize
from factorformer.tasks import healing, healing_trainer, language_modelling
from factorformer.tasks.evaluation import compare_embeddings, embed
from factorformer.tasks.healing import HealingSettings, Reading, heal
from factorformer.tasks.healing_trainer import HealingTrainer
from factorformer.tasks.targets import Embeddings, NextTokens, Predictions
from factorformer.training.distillation import mean_pool

Make = Callable[..., tf.PreTrainedModel]
FAST = HealingSettings(epochs=12, learning_rate=5e-3, batch_size=8, points=3)
BRIEF = dataclasses.replace(FAST, epochs=3)
"""For trainings of which it does not matter what is learned."""


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
        teacher,
        plain,
        FAST,
        tokenizer=tokenizer,
        held=plain,
        output=tmp_path,
        report=lines.append,
        progress=lambda *step: steps.append(step),
    )
    quantize(student)
    after = compare_embeddings(original, embed(student, tokenizer, plain))
    assert 1 - after["embedding_cosine"] < 0.7 * (1 - before["embedding_cosine"])
    assert after["similarity_spearman"] > before["similarity_spearman"]
    assert [row["step"] for row in curve] == [step * steps[-1][2] // 3 for step in (1, 2, 3)]
    assert curve[-1]["embedding_cosine"] == pytest.approx(after["embedding_cosine"], abs=1e-3)
    assert len(lines) == 4  # before, and at three points
    assert "neighbour recall" in lines[0]
    assert steps[-1] == ("train", steps[-1][2], steps[-1][2])
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert not student.training


def test_long_texts_go_forward_in_parts(
    teacher: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    plain: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which changes nothing but the memory."""
    learned, calls, settings = [], [], dataclasses.replace(FAST, epochs=1, learning_rate=1e-4)
    for most in (10**6, 20):
        monkeypatch.setattr(healing_trainer, "AT_ONCE", most)
        student = compressed(teacher)
        count = student.register_forward_hook(lambda *_, most=most: calls.append(most))
        heal(student, teacher, plain, settings, tokenizer=tokenizer, held=plain)
        count.remove()
        learned.append(embed(student, tokenizer, plain))
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-3)
    assert calls.count(20) > 1.5 * calls.count(10**6)


def test_few_steps_reach_their_rate(
    teacher: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    plain: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    step = HealingTrainer.training_step

    def watched(self: HealingTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.optimizer is not None
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HealingTrainer, "training_step", watched)
    settings = dataclasses.replace(FAST, batch_size=math.ceil(len(plain) / 2), epochs=4, learning_rate=1e-3)
    heal(compressed(teacher), teacher, plain, settings, tokenizer=tokenizer, held=plain)
    assert len(rates) == 8
    assert max(rates) > 0.8e-3


def test_a_training_that_harms_is_undone(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    student, lines = copy.deepcopy(teacher), []
    factorformer.compress(student, factorformer.plan(student, "svd", ratio=2, int8=True), hold_floats=True)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    settings = dataclasses.replace(FAST, learning_rate=0.5, epochs=4)
    curve = heal(student, teacher, plain, settings, tokenizer=tokenizer, held=plain, report=lines.append)
    assert "undone" in lines[-1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    found = compare_embeddings(*(embed(model, tokenizer, plain) for model in (teacher, student)))
    assert curve[-1]["step"] == 0
    assert curve[-1]["embedding_cosine"] == pytest.approx(found["embedding_cosine"], abs=1e-4)
    assert curve[-2]["embedding_cosine"] < found["embedding_cosine"]


class Scripted(Embeddings):
    """Embeddings whose cosines are told beforehand."""

    def __init__(self, model: tf.PreTrainedModel, cosines: list[float]) -> None:
        super().__init__()
        self.__dict__.update(model=model, cosines=cosines, seen=[], last=0.0)

    def compare(self, wanted: Tensor, found: Tensor) -> dict[str, float]:
        self.seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        self.__dict__["last"] = self.cosines.pop(0)
        return {"embedding_cosine": self.last}

    def loss(self, found: Tensor, wanted: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        return super().loss(found, wanted, inputs) if found.requires_grad else torch.tensor(1 - self.last)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_closest_point_is_kept(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    student, lines = compressed(teacher), []
    target = Scripted(student, [0.5, 0.7, 0.9, 0.8])
    curve = heal(student, teacher, plain, BRIEF, tokenizer=tokenizer, held=plain, target=target, report=lines.append)
    assert [row["embedding_cosine"] for row in curve] == [0.7, 0.9, 0.8, 0.9]
    assert curve[-1]["step"] == curve[1]["step"]
    assert f"undone from step {curve[1]['step']} on" in lines[-1]
    assert same(student.state_dict(), target.seen[2])
    assert not same(student.state_dict(), target.seen[3])
    student, lines = compressed(teacher), []
    target = Scripted(student, [0.5, 0.7, 0.9, 0.8999])  # which is noise
    assert len(heal(student, teacher, plain, BRIEF, tokenizer=tokenizer, held=plain, target=target)) == 3
    assert same(student.state_dict(), target.seen[3])


def test_the_closest_point_outlasts_an_interruption(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    settings, lines = dataclasses.replace(BRIEF, learning_rate=None), []

    def stopping(line: str) -> None:
        lines.append(line)
        if "neighbour" not in line and "minutes" in line and len(lines) == 4:
            raise KeyboardInterrupt

    rest = {"tokenizer": tokenizer, "held": plain, "output": tmp_path}
    student = compressed(teacher)
    target = Scripted(student, [0.95, 0.99, 0.97])
    with pytest.raises(KeyboardInterrupt):
        heal(student, teacher, plain, settings, target=target, report=stopping, **rest)
    best = target.seen[1]
    resumed, said = compressed(teacher), []
    curve = heal(resumed, teacher, plain, settings, target=Scripted(resumed, [0.96, 0.97]), report=said.append, **rest)
    assert [row["embedding_cosine"] for row in curve] == [0.99, 0.96, 0.97, 0.99]
    assert same(resumed.state_dict(), best)
    assert said[0] == lines[1] == "train: learning rate 0.00035"


def test_an_end_that_cannot_be_told_is_undone(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    """As that of a scorer whose scores are not finite."""
    for target in (Embeddings(), Predictions()):
        assert math.isnan(target.distance(torch.full((4, 1), torch.nan), torch.ones(4, 1)))
    for end in (-math.inf, math.nan):
        student = compressed(teacher)
        target = Scripted(student, [0.5, 0.7, 0.6, end])
        heal(student, teacher, plain, BRIEF, tokenizer=tokenizer, held=plain, target=target)
        assert same(student.state_dict(), target.seen[1])


@pytest.mark.parametrize(
    ("cosine", "width", "depth", "rate"),
    [(0.4, 32, 2, 5e-4), (0.975, 32, 2, 2.5e-4), (0.4, 768, 2, 2.5e-4), (0.4, 32, 24, 2.5e-4), (1.0, 32, 2, 0.0)],
)
def test_near_and_large_models_learn_slowly(
    cosine: float,
    width: int,
    depth: int,
    rate: float,
    teacher: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    plain: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, finish = [], healing.finish
    monkeypatch.setattr(healing, "finish", lambda t, *args: found.append(t.args.learning_rate) or finish(t, *args))
    settings = dataclasses.replace(FAST, learning_rate=None, epochs=1)
    student = compressed(teacher)
    student.config.hidden_size, student.config.num_hidden_layers = width, depth
    target = Scripted(student, [cosine, 0.98, 0.98, 0.99])
    heal(student, teacher, plain, settings, tokenizer=tokenizer, held=plain, target=target)
    assert found == [pytest.approx(rate)]


def test_distances_are_of_one_scale() -> None:
    torch.manual_seed(0)
    wanted, noise = torch.randn(5000, 3), torch.randn(5000, 3)
    for target in (Predictions(), Predictions(independent=True)):
        assert target.distance(wanted, wanted) == 0
        assert target.distance(wanted + 0.5 * noise, wanted) == pytest.approx(0.125, rel=0.1)
        assert target.distance(7 * wanted + 3.5 * noise, 7 * wanted) == pytest.approx(0.125, rel=0.1)
    assert Predictions().distance(wanted + 5, wanted) < 1e-6  # of classes that exclude each other
    assert Predictions(independent=True).distance(wanted + 5, wanted) > 1
    assert Predictions().distance(wanted[:, :1] + 5, wanted[:, :1]) > 1  # and of scores
    unit, near = torch.nn.functional.normalize(wanted), torch.nn.functional.normalize(wanted + 0.1 * noise)
    assert Embeddings().distance(near, unit) == pytest.approx(float((near - unit).square().sum(1).mean()) / 2, rel=1e-3)


def test_what_cannot_be_trained_is_said(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    with pytest.raises(DataError, match=r"give the tokenizer of the model \(tokenizer=\)"):
        heal(compressed(teacher), teacher, plain, FAST, held=plain)
    student = copy.deepcopy(teacher)
    factorformer.compress(student, factorformer.plan(student, "svd", ratio=2, int8=True))
    with pytest.raises(
        ModelError, match=r"stored in int8 and cannot be trained: call factorformer\.hold_floats\(model\)"
    ):
        heal(student, teacher, plain, FAST, tokenizer=tokenizer, held=plain)


def test_a_teacher_with_more_words(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    """It is given the rows as it reads them, each beside the same row of the model."""
    theirs = plain.map(lambda row: {"input_ids": row["input_ids"][::-1]})
    both: list[tuple[list[Any], list[Any]]] = []

    class Noting(Embeddings):
        def read(self, model: Any, inputs: Any) -> Tensor:
            self.__dict__["ours"] = rows_of(inputs)
            return super().read(model, inputs)

        def read_teacher(self, model: Any, inputs: Any) -> Tensor:
            if "ours" in self.__dict__:
                both.append((self.__dict__.pop("ours"), rows_of(inputs)))
            return super().read_teacher(model, inputs)

    student, reading = compressed(teacher), Reading(tokenizer, theirs, theirs)
    heal(student, teacher, plain, BRIEF, tokenizer=tokenizer, held=plain, target=Noting(), reading=reading)
    assert sum(len(ours) for ours, _ in both) >= len(plain)
    assert all([row[::-1] for row in ours] == read for ours, read in both)
    other = Reading(tokenizer, theirs.select([0]), theirs)
    with pytest.raises(DataError, match="other rows"):
        heal(student, teacher, plain, FAST, tokenizer=tokenizer, held=plain, reading=other)
    long = Reading(tokenizer, theirs.map(lambda row: {"length": 10**4}), theirs)
    with pytest.raises(DataError, match="what the teacher reads"):
        heal(student, teacher, plain, FAST, tokenizer=tokenizer, held=plain, reading=long)


def rows_of(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [row[mask].tolist() for row, mask in pairs]


def test_the_teacher_is_asked_once_for_each_text(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    student, read = compressed(teacher), []
    held = plain.select(range(4))
    teacher.register_forward_pre_hook(lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True)
    heal(student, teacher, plain, FAST, tokenizer=tokenizer, held=held, output=tmp_path)
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
        heal(student, teacher, plain, FAST, tokenizer=tokenizer, held=plain, target=Embeddings(pool))
        pairs = (embed(model, tokenizer, plain, pool=few) for model in (teacher, student))
        found[name] = compare_embeddings(*pairs)["embedding_cosine"]
    assert found["few"] > found["mean"]


def test_time_ends_a_training(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    seconds = []
    settings = dataclasses.replace(FAST, epochs=1e-3, minutes=0.02)
    curve = heal(
        compressed(teacher),
        teacher,
        plain,
        settings,
        tokenizer=tokenizer,
        held=plain,
        output=tmp_path,
        progress=lambda phase, done, total: seconds.append((done, total)),
    )
    assert curve[-1]["seconds"] >= 1.2
    assert curve[-1]["step"] > len(plain) / FAST.batch_size  # more than the thousandth of an epoch
    assert {total for _, total in seconds} == {1}
    assert max(done for done, _ in seconds) == 1
    assert len(curve) <= FAST.points


def test_a_run_goes_on_as_if_it_had_not_stopped(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    start, lines, settings = compressed(teacher), [], dataclasses.replace(FAST, epochs=6)

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"tokenizer": tokenizer, "held": plain}
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    expected = heal(whole, teacher, plain, settings, output=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        heal(parts, teacher, plain, settings, output=tmp_path / "parts", **options, report=stop)
    again = copy.deepcopy(start)
    curve = heal(again, teacher, plain, settings, output=tmp_path / "parts", **options)
    assert [row["step"] for row in curve] == [row["step"] for row in expected]
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], atol=1e-5), name
    # One that had ended is as it was.
    ended = copy.deepcopy(start)
    assert heal(ended, teacher, plain, settings, output=tmp_path / "parts", **options) == curve
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ended.state_dict().items())


def test_divergence_is_said(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset, tmp_path: Path
) -> None:
    settings = dataclasses.replace(FAST, learning_rate=1e30)
    with pytest.raises(DivergedError, match="learning rate 1e"):
        heal(compressed(teacher), teacher, plain, settings, tokenizer=tokenizer, held=plain)


# What else there is to learn


def test_a_part_of_the_data_is_held_out(
    teacher: tf.PreTrainedModel,
    tokenizer: tf.PreTrainedTokenizerBase,
    plain: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, Any]] = []
    split = healing.hold_out
    monkeypatch.setattr(healing, "hold_out", lambda *given: seen.append(split(*given)) or seen[-1])
    shorter = plain.map(lambda row: {name: v[:-1] if isinstance(v, list) else v - 1 for name, v in row.items()})
    data = datasets.concatenate_datasets([plain, shorter])
    curve = factorformer.heal(compressed(teacher), teacher, data, FAST, tokenizer=tokenizer)
    ((learned, held),) = seen
    assert len(held) >= 3
    assert not {*map(tuple, learned["input_ids"])} & {*map(tuple, held["input_ids"])}
    assert len(curve) == 3
    assert curve[-1]["embedding_cosine"] > curve[0]["embedding_cosine"]


@pytest.mark.parametrize("classes", [1, 3])
def test_a_cross_encoder_learns_scores(
    classes: int, make_classifier: Make, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    teacher = make_classifier()
    teacher.classifier = torch.nn.Linear(teacher.config.hidden_size, classes)
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight.mul_(10)
        for parameter in (*teacher.bert.encoder.parameters(), *teacher.classifier.parameters()):
            parameter.mul_(3)
    teacher.config.num_labels = classes
    student = compressed(teacher)
    settings = dataclasses.replace(FAST, epochs=24)
    curve = heal(student, teacher, plain, settings, tokenizer=tokenizer, held=plain, target=Predictions())
    names = {"score_spearman", "score_pearson"} if classes == 1 else {"prediction_agreement", "prediction_divergence"}
    assert set(curve[-1]) == {"step", "seconds", *names}
    if classes == 1:
        assert curve[-1]["score_pearson"] > max(curve[0]["score_pearson"], 0.8)
    else:
        assert curve[-1]["prediction_divergence"] < curve[0]["prediction_divergence"]


def images(rows: int) -> tuple[tf.PreTrainedModel, datasets.Dataset]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.ViTModel(tf.ViTConfig(**sizes, image_size=16, patch_size=4))
    return model, datasets.Dataset.from_dict({"pixel_values": torch.randn(rows, 3, 16, 16).tolist()})


def sounds(rows: int) -> tuple[tf.PreTrainedModel, datasets.Dataset]:
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    tokens = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(**sizes, **tokens, num_mel_bins=8, max_source_positions=10, decoder_attention_heads=4)
    model = tf.WhisperModel(config).get_encoder()
    return model, datasets.Dataset.from_dict({"input_features": torch.randn(rows, 8, 20).tolist()})


@pytest.mark.parametrize("inputs", [images, sounds])
def test_encoders_of_images_and_sound_heal(inputs: Callable[[int], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, data = inputs(40)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(4)
    student = compressed(teacher.eval(), int8=True)
    curve = factorformer.heal(student, teacher, data, FAST)
    assert curve[-1]["embedding_cosine"] > curve[0]["embedding_cosine"]
    quantize(student)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    batch = {name: torch.tensor(data[name][:3]) for name in data.column_names}
    with torch.inference_mode():
        assert torch.equal(again(**batch).last_hidden_state, student(**batch).last_hidden_state)


def test_language_models_learn_next_tokens(
    tokenizer: tf.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=len(tokenizer), use_cache=True)
    model, original = (tf.GPT2LMHeadModel(config).eval() for _ in range(2))
    ids = torch.randint(5, len(tokenizer), (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, :3] = 0  # behind a text, or before it
    inputs = {"input_ids": ids, "attention_mask": mask}
    monkeypatch.setattr(language_modelling, "PLACES", 7)  # in several parts
    with torch.no_grad():
        logits, theirs = (each(**inputs).logits[:, :-1] for each in (model, original))
        found = {
            weights: NextTokens(*weights).loss(
                NextTokens().read(model, inputs), NextTokens().read_teacher(original, inputs), inputs
            )
            for weights in ((1.0, 0.0), (1.0, 0.5), (0.0, 1.0))
        }
        alone = NextTokens().loss(NextTokens().read(model, inputs), None, inputs)
    follows = (mask[:, 1:] * mask[:, :-1]).bool()
    p, q = theirs.softmax(-1), logits.softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1)[follows].mean()
    likelihood = -q.log().gather(2, ids[:, 1:, None])[..., 0][follows].mean()
    torch.testing.assert_close(found[1.0, 0.0], divergence)
    torch.testing.assert_close(found[1.0, 0.5], divergence + 0.5 * likelihood)
    torch.testing.assert_close(found[0.0, 1.0], likelihood)
    torch.testing.assert_close(alone, likelihood)
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8] * 3] * 40, "attention_mask": [[1] * 12] * 40})
    data = data.add_column("length", [12] * 40)
    settings = HealingSettings(epochs=2, learning_rate=1e-2, batch_size=8, points=2)
    curve = heal(model, original, data, settings, tokenizer=tokenizer, target=NextTokens())
    assert curve[-1]["next_token_divergence"] < 0.5 * float(divergence)
    assert len(curve) >= 2
    longer = dataclasses.replace(settings, epochs=6, freeze_embeddings=False)
    curve = heal(original, None, data, longer, tokenizer=tokenizer, target=NextTokens())
    assert set(curve[-1]) == {"step", "seconds", "perplexity"}
    assert curve[-1]["perplexity"] < 5
    rest = {"tokenizer": tokenizer, "output": tmp_path}
    heal(original, model, data, dataclasses.replace(settings, epochs=1), target=NextTokens(), **rest)
    for teacher, target in ((None, NextTokens()), (model, NextTokens(1.0, 0.5))):
        with pytest.raises(OutputError):
            heal(original, teacher, data, dataclasses.replace(settings, epochs=1), target=target, **rest)
    with pytest.raises(DataError, match="give its tokenizer"):
        heal(model, original, data, settings, held=data, target=NextTokens())


def test_layers_that_are_computed_again(
    teacher: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerBase, plain: datasets.Dataset
) -> None:
    """And factors alone, which are all that is left to train then."""
    models = []
    for checkpointing in (False, True):
        calls: list[int] = []
        student = compressed(teacher)
        dense = {n: p.clone() for n, p in student.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
        student.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        settings = dataclasses.replace(BRIEF, checkpointing=checkpointing, factors_only=True)
        curve = heal(student, teacher, plain, settings, tokenizer=tokenizer, held=plain)
        models.append((student, len(calls)))
        state = dict(student.named_parameters())
        assert all(torch.equal(state[name], value) for name, value in dense.items())
        assert all(p.requires_grad for p in student.parameters())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    steps = int(curve[-1]["step"]) or int(curve[-2]["step"])
    assert models[1][1] == models[0][1] + steps
    for name, value in models[0][0].named_parameters():
        torch.testing.assert_close(dict(models[1][0].named_parameters())[name], value)
    assert not same(models[0][0].state_dict(), compressed(teacher).state_dict())
