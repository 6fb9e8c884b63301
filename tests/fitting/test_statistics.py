"""Calibration is an exact sum over examples: each claim against brute force."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from tests import tiny
from torch import Tensor, nn

import factorformer
from factorformer.errors import DataError
from factorformer.fitting import MetricName, gradient_recorders
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.fitting.recorder import UNSEEN
from factorformer.fitting.statistics import UNSHOWN, collect, too_few_tokens, unreached
from factorformer.layers.surgery import find_matrices

ROWS = 6
CLASSIFIERS = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**tiny._ENCODER, num_labels=3)),
    "albert": lambda: tf.AlbertForSequenceClassification(
        tf.AlbertConfig(**{**tiny._ENCODER, "num_hidden_layers": 3}, embedding_size=16, num_labels=3)
    ),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=99, num_labels=3, pad_token_id=0)
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99, max_position_embeddings=24, num_labels=1
        )
    ),
}


def classifier(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return CLASSIFIERS[name]().eval()


def examples(model: tf.PreTrainedModel, rows: int = ROWS, length: int = 6) -> tiny.Inputs:
    """Rows of different lengths with labels."""
    batch = tiny.text(rows, length, seed=3)
    lengths = torch.tensor([length, 3, 5, 2, 4, 1])[:rows]
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    labels = torch.arange(rows)
    batch["labels"] = labels / 3 if model.config.num_labels == 1 else labels % 3
    return batch


def split(batch: tiny.Inputs, size: int) -> Iterator[tiny.Inputs]:
    for start in range(0, len(batch["input_ids"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}


def names(model: nn.Module, scope: str = "blocks") -> list[str]:
    return [matrix.name for matrix in find_matrices(model, scope)[0] if matrix.dense is None]  # type: ignore[arg-type]


def moments_by_hand(model: nn.Module, layers: Iterable[str], batch: tiny.Inputs, mask: Tensor) -> dict[str, Tensor]:
    """The second moment of all unmasked inputs, one example at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name in layers
    ]
    with torch.no_grad():
        for row, single in enumerate(split(batch, 1)):
            before = {name: len(calls) for name, calls in seen.items()}
            model(**single)
            for name, calls in seen.items():
                calls[before[name] :] = [x[0][mask[row].bool()] for x in calls[before[name] :]]
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(calls).double() for name, calls in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


def fisher_by_hand(model: nn.Module, layers: Iterable[str], batch: tiny.Inputs) -> dict[str, Tensor]:
    """Squared gradients of every single example, averaged over examples and summed over the columns of the weight."""
    weights = {name: model.get_submodule(name).weight for name in layers}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for single in split(batch, 1):
        gradients = torch.autograd.grad(model(**single).loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.double().square() / len(batch["input_ids"])
    return {
        name: square.sum(0 if isinstance(model.get_submodule(name), tf.pytorch_utils.Conv1D) else 1)
        for name, square in total.items()
    }


def granted(counts: Tensor) -> Tensor:
    """Look-ups as they are reported: every row is granted a part of the mean row's."""
    return counts + UNSEEN * counts.double().mean()


def assert_same(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item())


def raw(statistics: LayerStatistics) -> Tensor:
    assert statistics.inputs is not None
    return statistics.inputs.total / statistics.inputs.count


# Second moments


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_moments_equal_brute_force_whatever_the_batches(name: str, size: int) -> None:
    model = classifier(name)
    batch, layers = examples(model), names(model)
    expected = moments_by_hand(model, layers, batch, batch["attention_mask"])
    found = collect(model, layers, reversed(list(split(batch, size))), "input_moment")
    assert list(found) == layers
    for layer in layers:
        assert_same(raw(found[layer]), expected[layer])
        assert found[layer].rows is None
    calls = model.config.num_hidden_layers if name == "albert" else 1
    assert {s.inputs.count for s in found.values() if s.inputs} == {calls * int(batch["attention_mask"].sum())}


def test_what_was_measured_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments take gigabytes: none waits for the collector of garbage."""
    made: list[Any] = []
    real = gradient_recorders.FisherRecorder.__init__

    def init(self: Any, *given: Any, **options: Any) -> None:
        real(self, *given, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(gradient_recorders.FisherRecorder, "__init__", init)
    llama = tiny.MODELS["llama"]
    model = llama.build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    gc.disable()
    try:
        collect(model, names, [llama.inputs()], "fisher")
        assert len(made) == 2
        assert [one() for one in made] == [None, None]
    finally:
        gc.enable()


def test_without_a_mask_every_position_counts() -> None:
    model = classifier("bert")
    batch = {"input_ids": examples(model)["input_ids"]}
    expected = moments_by_hand(model, names(model), batch, torch.ones_like(batch["input_ids"]))
    for layer, statistics in collect(model, names(model), split(batch, 4), "input_moment").items():
        assert_same(raw(statistics), expected[layer])


def test_padding_to_another_length_changes_nothing() -> None:
    model = classifier("bert")
    batch = examples(model)
    longer = {
        key: torch.nn.functional.pad(value, (0, 4)) if value.dim() == 2 else value for key, value in batch.items()
    }
    short = collect(model, names(model), [batch], "input_moment")
    for layer, statistics in collect(model, names(model), [longer], "input_moment").items():
        assert_same(raw(statistics), raw(short[layer]))


def test_layers_that_read_one_tensor_share_its_moment() -> None:
    model = classifier("bert")
    batch = examples(model)
    layers = [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    other = "bert.encoder.layer.0.attention.output.dense"
    found = collect(model, [*layers, other], split(batch, 2), "input_moment")
    assert len({id(found[layer].inputs) for layer in layers}) == 1
    assert found[other].inputs is not found[layers[0]].inputs
    for layer in layers:
        alone = collect(model, [layer], split(batch, 2), "input_moment")[layer]
        assert torch.equal(raw(alone), raw(found[layer]))


def test_encoder_and_decoder_are_masked_by_their_own_masks() -> None:
    model = tiny.MODELS["t5"].build()
    mask, decoder_mask = torch.ones(2, 5).long(), torch.ones(2, 5).long()
    mask[0, 2:], decoder_mask[1, 3:] = 0, 0
    ids = tiny.text(2, 5)["input_ids"]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": ids.flip(0),
        "decoder_attention_mask": decoder_mask,
    }
    layers = names(model)
    found = collect(model, layers, [batch], "input_moment")
    crossing = [layer for layer in layers if layer.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
    assert len(crossing) == 2 * tiny.BLOCKS
    for group, positions in (
        ([n for n in layers if n.startswith("encoder.")] + crossing, mask),
        ([n for n in layers if n.startswith("decoder.") and n not in crossing], decoder_mask),
    ):
        for layer, expected in moments_by_hand(model, group, batch, positions).items():
            assert_same(raw(found[layer]), expected)
    # Without a mask of its own a decoder position is a real one, even where the encoder's mask has the same shape.
    del batch["decoder_attention_mask"]
    layer = "decoder.block.0.layer.0.SelfAttention.q"
    assert_same(
        raw(collect(model, [layer], [batch], "input_moment")[layer]),
        moments_by_hand(model, [layer], batch, torch.ones_like(mask))[layer],
    )


@pytest.mark.parametrize("size", [1, 4, 6])
def test_embeddings_count_their_rows(size: int) -> None:
    model = classifier("bert")
    batch = examples(model)
    words, places = "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"
    found = collect(model, [words, places], split(batch, size), "input_moment")
    ids = batch["input_ids"][batch["attention_mask"].bool()]
    assert_same(found[words].rows, granted(torch.bincount(ids, minlength=99)))
    counts = torch.zeros(len(found[places].rows))
    counts[:6] = batch["attention_mask"].sum(0)
    assert_same(found[places].rows, granted(counts))
    assert found[words].inputs is found[places].inputs is None


def test_tied_embeddings_are_measured_over_all_their_calls() -> None:
    model = tiny.MODELS["t5"].build()
    batch = tiny.sequence_to_sequence()
    batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    batch["decoder_attention_mask"][0, 3:] = 0
    read = torch.cat([batch[f"{part}input_ids"][batch[f"{part}attention_mask"].bool()] for part in ("", "decoder_")])
    found = collect(model, ["shared"], [batch], "input_moment")["shared"]
    assert_same(found.rows, granted(torch.bincount(read, minlength=99)))
    batch["labels"] = batch["decoder_input_ids"].contiguous()
    assert collect(model, ["shared"], [batch], "fisher_rows")["shared"].rows is not None


# Regularization


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 40, 10_000])
def test_the_moment_is_positive_definite_and_keeps_its_trace(count: int) -> None:
    x = torch.randn(count, 16, dtype=torch.float64)
    x[:, 5] = 0  # an input that is never active
    moment = SecondMoment(x.T @ x, count)
    assert torch.linalg.eigvalsh(moment.moment())[0] > 0
    torch.testing.assert_close(moment.moment().trace(), x.square().sum() / count)
    torch.testing.assert_close(moment.root() @ moment.root().T, moment.moment())


def test_many_rows_are_hardly_regularized() -> None:
    x = torch.randn(100_000, 8, dtype=torch.float64) * torch.arange(1, 9)
    moment = SecondMoment(x.T @ x, len(x))
    torch.testing.assert_close(moment.moment(), x.T @ x / len(x), rtol=1e-5, atol=1e-4)


# Fisher rows


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_fisher_rows_equal_brute_force_whatever_the_batches(name: str, scope: str, size: int) -> None:
    model = classifier(name)
    batch, layers = examples(model), names(model, scope)
    expected = fisher_by_hand(model, layers, batch)
    found = collect(model, layers, split(batch, size), "fisher_rows")
    for layer in layers:
        assert_same(found[layer].rows, expected[layer], 1e-3)
        assert found[layer].inputs is None


def test_fisher_rows_do_not_depend_on_how_batches_are_cut() -> None:
    model = classifier("bert")
    batch = examples(model)
    uneven = [*split({k: v[:5] for k, v in batch.items()}, 3), {k: v[5:] for k, v in batch.items()}]
    one = collect(model, names(model), [batch], "fisher_rows")
    for layer, statistics in collect(model, names(model), uneven, "fisher_rows").items():
        assert_same(statistics.rows, one[layer].rows, 1e-5)


@pytest.mark.parametrize("frozen", ["all", "embeddings", "one layer"])
def test_fisher_rows_of_frozen_parameters(frozen: str) -> None:
    model = classifier("bert")
    batch, layers = examples(model), names(model, "all")
    expected = fisher_by_hand(model, layers, batch)
    part = {"all": model, "embeddings": model.bert.embeddings, "one layer": model.bert.encoder.layer[1]}[frozen]
    part.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for layer, statistics in collect(model, layers, split(batch, 3), "fisher_rows").items():
        assert_same(statistics.rows, expected[layer], 1e-3)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_repeated_tokens_add_up_before_the_square() -> None:
    model = classifier("bert")
    batch = examples(model)
    batch["input_ids"] = torch.full_like(batch["input_ids"], 7)
    name = "bert.embeddings.word_embeddings"
    rows = collect(model, [name], [batch], "fisher_rows")[name].rows
    assert_same(rows, fisher_by_hand(model, [name], batch)[name], 1e-3)
    assert rows is not None
    assert rows.nonzero().flatten().tolist() == [7]


# The model is left as it was


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("metric", ["input_moment", "fisher_rows", "fisher"])
def test_the_model_is_left_as_it_was(training: bool, fails: bool, metric: MetricName) -> None:
    model = classifier("bert").train(training)
    model.bert.embeddings.requires_grad_(False)
    batch = examples(model)
    model(**batch).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def batches() -> Iterator[tiny.Inputs]:
        yield batch
        if fails:
            raise RuntimeError("the file ended")

    if fails:
        with pytest.raises(RuntimeError, match="the file ended"):
            collect(model, names(model, "all"), batches(), metric)
    else:
        collect(model, names(model, "all"), batches(), metric)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_modes_of_parts_are_left_as_they_were() -> None:
    model = classifier("bert").train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    collect(model, names(model), [examples(model)], "input_moment")
    assert [module.training for module in model.modules()] == modes


def test_progress_counts_batches() -> None:
    model, done = classifier("bert"), []
    collect(model, names(model), split(examples(model), 2), "input_moment", progress=done.append)
    assert done == [1, 2, 3]


# Errors


def test_no_batches() -> None:
    model = classifier("bert")
    with pytest.raises(DataError, match="calibration data is empty"):
        collect(model, names(model), iter([]), "input_moment")


def test_no_labels() -> None:
    model = classifier("bert")
    batch = examples(model)
    del batch["labels"]
    with pytest.raises(DataError, match=r"BertForSequenceClassification.*labels"):
        collect(model, names(model), [batch], "fisher_rows")


class Two(nn.Module):
    """A used and an unused layer."""

    def __init__(self, called: bool = False) -> None:
        super().__init__()
        self.used, self.unused, self.called = nn.Linear(4, 4), nn.Linear(4, 4), called

    def forward(self, x: Tensor) -> tf.utils.ModelOutput:
        if self.called:
            self.unused(x)
        logits = self.used(x)
        return tf.modeling_outputs.SequenceClassifierOutput(loss=logits.square().mean(), logits=logits)


@pytest.mark.parametrize("metric", ["input_moment", "fisher_rows", "fisher"])
def test_a_layer_that_is_never_reached(metric: MetricName) -> None:
    batch = {"x": torch.ones(2, 4)}
    assert set(collect(Two(), ["used", "unused"], [batch], metric)) == {"used"}
    with pytest.raises(DataError, match=r"'unused'|depends on its weights"):
        collect(Two(), ["unused"], [batch], metric)
    assert "exclude 'unused'" in unreached(Two(), ["used", "unused"], iter([batch]))["unused"]


def test_fisher_rows_are_of_layers_that_the_loss_depends_on() -> None:
    model, layers, batch = Two(called=True), ["used", "unused"], {"x": torch.ones(2, 4)}
    assert set(collect(model, layers, [batch], "input_moment")) == {"used", "unused"}
    assert set(collect(model, layers, [batch], "fisher_rows")) == {"used"}
    assert not unreached(model, layers, [batch])
    for metric in ("fisher_rows", "fisher"):
        assert unreached(model, layers, [batch], metric) == {"unused": UNSHOWN}
    with pytest.raises(DataError, match="'unused'"):
        collect(model, ["unused"], [batch], "fisher_rows")


@pytest.mark.parametrize("metric", ["input_moment", "fisher_rows", "fisher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(metric: MetricName, value: float) -> None:
    with pytest.raises(DataError, match="'used' sees NaN or infinite"):
        collect(Two(), ["used"], [{"x": torch.full((2, 4), value)}], metric)


def test_padding_does_not_count_where_positions_are_folded_into_the_batch() -> None:
    model = tiny.MODELS["opt"].build()
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    names = [m.name for m in find_matrices(model)[0]]
    measured = collect(model, names, [{"input_ids": ids, "attention_mask": mask}], "input_moment")
    counts = {name: statistics.inputs.count for name, statistics in measured.items() if statistics.inputs}
    assert set(counts.values()) == {12}


def test_fisher_rows_of_a_language_model_are_those_of_single_examples() -> None:
    model = tiny.MODELS["gpt2"].build()
    ids = torch.randint(3, 90, (3, 7))
    labels = ids.clone()
    labels[0, 2:] = -100  # the mean over tokens weighs this example's few tokens otherwise in a batch than alone
    names = [m.name for m in find_matrices(model)[0] if m.dense is None]
    together = collect(model, names, [{"input_ids": ids, "labels": labels}], "fisher_rows")
    alone = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(3)]
    single = collect(model, names, alone, "fisher_rows")
    for name in names:
        torch.testing.assert_close(together[name].rows, single[name].rows)


# Calibration data of other types


def test_data_as_people_have_it() -> None:
    model = tiny.MODELS["bert"].build()
    ids = torch.randint(3, 90, (4, 7))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    layers = names(model)
    expected = collect(model, layers, [batch], "input_moment")
    rows = datasets.Dataset.from_dict({"text": ["a"] * 4, "input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    for data in (
        batch,
        tf.BatchEncoding(batch),
        [{key: value.numpy() for key, value in batch.items()}],
        [{key: value.tolist() for key, value in batch.items()}],
        [{**batch, "position_ids": None, "return_dict": True}],
        [{key: value[place] for key, value in batch.items()} for place in range(4)],
        rows,
        rows.with_format("torch"),
    ):
        for layer, statistics in collect(model, layers, data, "input_moment").items():
            torch.testing.assert_close(raw(statistics), raw(expected[layer]), rtol=1e-4, atol=1e-4)


def test_layers_that_share_a_moment_part_when_they_read_other_things() -> None:
    class Twice(nn.Module):
        """Reads one tensor with two layers, then others; one of them reads it twice."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.q(other) + self.k(3 * other) + self.k(x) + self.k(x)

    torch.manual_seed(0)
    model, x, other = Twice(), torch.randn(5, 4), torch.randn(5, 4)
    for metric in ("input_moment", "fisher"):
        found = collect(model, ["q", "k"], [{"x": x, "other": other}] * 2, metric)
        for name, inputs in (("q", [x, other]), ("k", [x, 3 * other, x, x])):
            moment = found[name].inputs
            assert moment is not None
            assert moment.count == 2 * 5 * len(inputs)
            expected = 2 * sum(part.T @ part for part in inputs)
            torch.testing.assert_close(moment.symmetric().float(), expected, rtol=1e-2, atol=1e-2)
    assert found["k"].tokens / found["q"].tokens == 2


def test_roots_of_long_texts_are_positive_definite() -> None:
    """Sums in float32 are wrong by more than so many tokens leave of the shrinkage."""
    generator = torch.Generator().manual_seed(0)
    width, count = 256, 10**9
    strong = torch.randn(width, 1, generator=generator)
    noise = torch.randn(width, width, generator=generator)
    total = (strong @ strong.T) * count * (1 + torch.finfo(torch.float32).eps * (noise + noise.T))
    root = SecondMoment(total, count).root()
    assert torch.isfinite(root).all()


def test_roots_are_kept_until_more_is_counted() -> None:
    moment = SecondMoment.zeros(4, torch.device("cpu"))
    moment.add(torch.randn(9, 4))
    first = moment.root()
    assert moment.root() is first
    moment.add(torch.randn(9, 4))
    torch.testing.assert_close(moment.root() @ moment.root().T, moment.moment())
    others = [SecondMoment(torch.eye(4) * size, 1) for size in range(1, 9)]
    for other in others:
        torch.testing.assert_close(other.root() @ other.root().T, other.moment())


def test_too_few_tokens_are_told() -> None:
    model = tiny.MODELS["bert"].build()
    (wide, *_) = [name for name in names(model) if name.endswith("output.dense")]
    for rows, length, said in ((1, 5, True), (8, 20, False)):
        statistics = collect(model, [wide], [tiny.text(rows, length)], "input_moment")
        line = too_few_tokens(statistics)
        assert (line is not None) == said
    assert too_few_tokens({}) is None


def test_rows_of_a_data_set_may_differ_in_length() -> None:
    model = tiny.MODELS["bert"].build()
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
    (statistics,) = collect(model, names(model)[:1], rows, "input_moment").values()
    assert statistics.inputs is not None
    assert statistics.inputs.count == 5


@pytest.mark.usefixtures("no_shape_checks")
def test_data_that_is_none() -> None:
    model = tiny.MODELS["bert"].build()
    ids = torch.randint(3, 90, (2, 7))
    for data, message in (
        ("a text", "cannot be a str"),
        (ids, "cannot be a Tensor"),
        (7, "cannot be a int"),
        (["a text"], "batch 0 is a str"),
        ([{"input_ids": ids}, [ids]], "batch 1 is a list of Tensor"),
        ([{"input_ids": ids, "text": ["a", "b"]}], "'text' as a list of str"),
        ([{"input_ids": [[1, 2], [3]]}], "'input_ids'.*pad"),
        ([{"input_ids": ids, "pixels": object()}], "'pixels' as a object"),
        ([{}], "batch 0 holds no tensors"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "columns text"),
    ):
        with pytest.raises(DataError, match=message):
            collect(model, names(model), data, "input_moment")


def images_and_text() -> tf.PreTrainedModel:
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    text = {**vision, "num_key_value_heads": 2, "vocab_size": 51}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=tf.LlamaConfig(**text),
        image_token_index=50,
    )
    return tf.LlavaForConditionalGeneration(config).eval()


def test_parts_that_data_does_not_reach_stay_dense_in_plan_and_compress() -> None:
    model = images_and_text()
    batches = [{"input_ids": torch.randint(5, 49, (8, 20))}]
    told = factorformer.plan(model, "whitened", ratio=1.3, calibration=batches)
    by_loss = factorformer.plan(model, "fisher", ratio=1.3, calibration=batches)
    blind = factorformer.plan(model, "whitened", ratio=2)
    report = factorformer.compress(copy.deepcopy(model), blind, calibration=batches)
    for plan in (told, by_loss, report.plan):
        kept = {entry.matrix.name: entry.reason for entry in plan.entries if "vision" in entry.matrix.name}
        assert len({reason for name, reason in kept.items() if "position" not in name}) == 1
        assert all("exclude 'model.vision_tower" in r for n, r in kept.items() if n.endswith("_proj"))
        assert any("language_model" in entry.matrix.name for entry in plan.factorized)
        assert not any("vision" in entry.matrix.name for entry in plan.factorized)
    assert told.ratio == pytest.approx(1.3, rel=0.01)
    assert len(report.notes) == 1
    assert "model.vision_tower" in report.notes[0]
    assert report.compressed == report.plan.compressed
    excluded = factorformer.plan(model, "whitened", ratio=1.3, exclude="model.vision_tower.*")
    assert factorformer.compress(model, excluded, calibration=batches).notes == ()


@pytest.mark.parametrize("metric", ["input_moment", "fisher"])
def test_tokens_count_as_often_as_in_all_the_text(metric: MetricName) -> None:
    model, data = classifier("bert"), [tiny.text(4)]
    words, places = "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"
    counts = torch.arange(99)
    seen, found = (collect(model, [words, places], data, metric, token_counts=known) for known in (None, counts))
    rows = found[words].rows
    assert_same(found[places].rows, seen[places].rows)
    assert_same(rows / rows.sum(), granted(counts / counts.sum()) / (1 + UNSEEN))
    assert_same(rows.sum(), seen[words].rows.sum())
    labelled = [{**data[0], "labels": torch.zeros(len(data[0]["input_ids"]), dtype=torch.int64)}]
    by_gradient = (collect(model, [words], labelled, "fisher_rows", token_counts=known) for known in (None, counts))
    assert_same(*(known[words].rows for known in by_gradient))
    for wrong, message in ((counts[1:], "holds 98 numbers"), (-counts, "none negative"), (0 * counts, "the sum 0")):
        with pytest.raises(DataError, match=message) as error:
            collect(model, [words], data, metric, token_counts=wrong)
        assert f"'{words}' has 99 rows" in str(error.value)
