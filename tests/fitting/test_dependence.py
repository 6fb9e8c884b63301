"""How far the Fisher information is from the product of moments: against brute force, and where it is known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tests import tiny
from tests.fitting.test_statistics import examples, names, split
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput
from transformers.pytorch_utils import Conv1D

from factorformer.fitting import Metric
from factorformer.fitting.dependence import BATCHES, Sample, with_dependence
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.objective import objective
from factorformer.fitting.statistics import collect


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as precise as those by hand, on every processor, and all directions."""
    monkeypatch.setattr("factorformer.fitting.dependence.SKETCH", 128)
    monkeypatch.setattr("factorformer.fitting.gradient_recorders.fast_products", lambda _: contextlib.nullcontext())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels as they are in the batch."""
    monkeypatch.setattr("factorformer.fitting.dependence.objective", lambda *args, drawn: objective(*args))


def expected_dependence(
    model: nn.Module, name: str, statistics: LayerStatistics, batch: tiny.Inputs, weight: nn.Parameter, shift: int
) -> float:
    """By hand: the gradient of a weight for each row, and what its uses read and get as gradients."""
    metric, used = Metric.of(statistics), []
    handles = [
        module.register_forward_hook(lambda module, x, y: used.append((module, x[0], y)))
        for module in model.modules()
        if getattr(module, "weight", None) is weight
    ]
    together, apart = 0.0, {True: [0.0, 0.0, 0], False: [0.0, 0.0, 0]}
    for row, single in enumerate(split(batch, 1)):
        used.clear()
        real = batch["attention_mask"][row].bool()
        loss = model(**single).loss * int((single["labels"][:, shift:] != -100).sum())
        total = torch.zeros(weight.shape[::-1] if isinstance(used[0][0], Conv1D) else weight.shape, dtype=torch.float64)
        gradients = torch.autograd.grad(loss, [y for _, _, y in used])
        for (module, x, _), gradient in zip(used, gradients, strict=True):
            g, looked_up = gradient[0][real].double(), isinstance(module, nn.Embedding)
            if looked_up:
                x = nn.functional.one_hot(x[0], len(weight))[real].double() if len(x) == 1 else x
            else:
                x = x[0][real].detach().double()
            rows, columns = (x, g) if looked_up else (g, x)
            total += rows.T @ columns
            sizes = [
                float(whitened_rows(rows, metric).square().sum()),
                float(whitened_columns(columns, metric).square().sum()),
            ]
            sums = apart[looked_up]
            sums[0], sums[1], sums[2] = sums[0] + sizes[0], sums[1] + sizes[1], sums[2] + len(g)
        together += float(whitened_columns(whitened_rows(total.T, metric).T, metric).square().sum())
    for handle in handles:
        handle.remove()
    return together / sum(first * second / count for first, second, count in apart.values() if count)


def whitened_rows(vectors: Tensor, metric: Metric) -> Tensor:
    """`R^-T u` of vectors along rows of the weight."""
    assert metric.rows is not None
    if metric.rows.dim() == 1:
        return vectors / metric.rows
    return torch.linalg.solve_triangular(metric.rows.T, vectors.T, upper=False).T


def whitened_columns(vectors: Tensor, metric: Metric) -> Tensor:
    """`L^-1 v`."""
    assert metric.columns is not None
    return torch.linalg.solve_triangular(metric.columns, vectors.T, upper=False).T


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama-tied"])
def test_gradients_of_rows_equal_brute_force(name: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, layers that are called several times, tied heads, and weights that lie the other way round."""
    if wide:
        monkeypatch.setattr("factorformer.fitting.gradient_recorders.WIDE", 64)  # of heads the diagonal alone
    model = tiny.MODELS[name].build()
    batch = examples(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch = {key: value[:5] for key, value in batch.items()}  # of the last row nothing is predicted
    layers, shift = names(model, "all"), int(name in ("gpt2", "llama-tied"))
    found = collect(model, layers, [batch], "fisher")
    for layer, measured in found.items():
        weight = model.get_submodule(layer).weight
        if "position" in layer or layer.endswith("wpe"):
            continue  # looked up once for all rows
        expected = expected_dependence(model, layer, measured, batch, weight, shift)
        assert measured.dependence == pytest.approx(expected, rel=0.01), layer
    if name == "albert":  # of the others, weights that learned nothing make no tokens alike
        assert max(abs(measured.dependence - 1) for measured in found.values()) > 0.1


class Pooled(nn.Module):
    """A linear layer, whose outputs the objective takes the mean of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20, bias=False)

    def forward(self, x: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.linear(x))


def test_tokens_that_are_alike_count_as_often_as_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    model, rows = Pooled(), torch.randn(400, 1, 12, generator=generator)
    apart = torch.randn(400, 7, 12, generator=generator)
    for x, expected in ((rows.expand(-1, 7, -1), 7.0), (apart, 1.0)):
        found = collect(model, ["linear"], [{"x": x}], "fisher")["linear"]
        # Long vectors have small gradients, for embeddings are normalized.
        assert found.dependence == pytest.approx(expected, rel=0.25)
        assert Metric.of(found).scale == pytest.approx(
            found.dependence * Metric.of(dataclasses.replace(found, dependence=1.0)).scale
        )


def test_what_a_change_really_does_to_embeddings_is_predicted() -> None:
    """Every token of a row has one gradient: without the dependence, the prediction is too low by far."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Pooled()
    x = torch.randn(600, 1, 12, generator=generator) + 0.5 * torch.randn(600, 9, 12, generator=generator)
    found = collect(model, ["linear"], [{"x": x}], "fisher")["linear"]
    weight = model.linear.weight.detach()
    error = 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    before, after = (x.mean(1) @ changed.T for changed in (weight, weight + error))
    true = 1 - float(nn.functional.cosine_similarity(before, after).mean())
    predicted = Metric.of(found).scale * float(Metric.of(found).apply(error.double()).square().sum())
    assert predicted == pytest.approx(true, rel=0.3)
    assert predicted / found.dependence < true / 3


def test_projections_keep_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny.MODELS["bert"].build(), [tiny.text(8, 12)]
    expected = collect(model, names(model), data, "fisher")
    monkeypatch.setattr("factorformer.fitting.dependence.SKETCH", 16)
    for name, measured in collect(model, names(model), data, "fisher").items():
        assert measured.dependence != expected[name].dependence
        assert measured.dependence == pytest.approx(expected[name].dependence, rel=0.5)


class Arranged(Pooled):
    """The same in another layout of positions."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        if self.layout == "folded":
            return BaseModelOutput(last_hidden_state=self.linear(x.flatten(0, 1)).view(len(x), -1, 20))
        if self.layout == "positions first":
            return BaseModelOutput(last_hidden_state=self.linear(x.transpose(0, 1)).transpose(0, 1))
        if self.layout == "windows":
            return BaseModelOutput(last_hidden_state=self.linear(x.view(2 * len(x), -1, 12)).view(len(x), -1, 20))
        if self.layout == "routed":
            flat = x.flatten(0, 1)
            return BaseModelOutput(last_hidden_state=self.linear(flat[:-1]).mean(0).expand(len(x), -1))
        return super().forward(x)


def test_rows_are_told_apart_in_every_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 12, generator=generator) + 0.3 * torch.randn(5, 6, 12, generator=generator)
    mask, found = torch.ones(5, 6).long(), {}
    for layout in ("plain", "folded", "positions first", "windows", "routed"):
        batch = {"x": x} | ({"attention_mask": mask} if layout == "folded" else {})
        torch.manual_seed(1)
        found[layout] = collect(Arranged(layout), ["linear"], [batch], "fisher")["linear"].dependence
    assert found.pop("routed") == 1.0  # which row a token is of is not known
    torch.manual_seed(1)
    assert found.pop("folded") == pytest.approx(
        collect(Arranged("plain"), ["linear"], [{"x": x, "attention_mask": mask}], "fisher")["linear"].dependence
    )
    assert found["plain"] > 2
    # In another order of positions, draws count other halves of the tokens.
    assert list(found.values()) == pytest.approx([found["plain"]] * len(found), rel=1e-2)


def test_padding_that_is_no_number_changes_nothing() -> None:
    x = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(0)).repeat(1, 5, 1)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]).long()

    class Careful(Pooled):
        def forward(self, x: Tensor, attention_mask: Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=self.linear(x).masked_fill(attention_mask[..., None] == 0, 0))

    found = []
    for padding in (0.0, float("nan"), float("inf")):
        torch.manual_seed(0)
        given = x.masked_fill(mask[..., None] == 0, padding)
        found.append(collect(Careful(), ["linear"], [{"attention_mask": mask, "x": given}], "fisher")["linear"])
    assert found[0].dependence > 2
    assert found[1].dependence == pytest.approx(found[0].dependence, rel=0.2)  # other draws
    assert found[2].dependence == pytest.approx(found[0].dependence, rel=0.2)


def test_labels_of_a_row_that_are_alike_are_not_taken_for_curvature() -> None:
    class Tagger(Pooled):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> TokenClassifierOutput:
            logits = 0.1 * self.linear(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return TokenClassifierOutput(loss=loss, logits=logits)

    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.3 * torch.randn(40, 30, 12, generator=generator)
    labels = torch.randint(20, (40, 1), generator=generator).expand(-1, 30)
    for given in ({}, {"labels": labels}):
        assert collect(Tagger(), ["linear"], [{"x": x} | given], "fisher")["linear"].dependence < 1.5


def test_layers_that_the_sample_does_not_reach_are_taken_for_independent() -> None:
    class Sometimes(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(12, 20)

        def forward(self, x: Tensor, both: bool = False) -> BaseModelOutput:
            states = self.linear(x) + (self.other(x) if both else 0)
            return BaseModelOutput(last_hidden_state=states)

    batches = [{"x": torch.randn(3, 4, 12), "both": False} for _ in range(3)]
    sample = Sample()
    for batch in batches:
        sample.add(batch)
    left = next(batch for batch in batches if not any(torch.equal(batch["x"], kept["x"]) for kept in sample.batches))
    left["both"] = True
    found = collect(Sometimes(), ["linear", "other"], batches, "fisher")
    assert found["other"].dependence == 1.0
    assert found["linear"].dependence != 1.0


def test_batches_may_be_filled_again() -> None:
    model = tiny.MODELS["bert"].build()
    batches = [tiny.text(2, 5, seed) for seed in range(4)]

    def refilled() -> Iterator[tiny.Inputs]:
        buffer = {key: value.clone() for key, value in batches[0].items()}
        for batch in batches:
            for key, value in batch.items():
                buffer[key].copy_(value)
            yield buffer

    expected, found = (
        collect(model, names(model), batches, "fisher"),
        collect(model, names(model), refilled(), "fisher"),
    )
    assert {n: s.dependence for n, s in found.items()} == {n: s.dependence for n, s in expected.items()}


def test_a_few_batches_are_run_again_in_whatever_order_they_come() -> None:
    batches = [tiny.text(2, 5, seed) for seed in range(7)]
    chosen = []
    for order in (batches, batches[::-1]):
        sample = Sample()
        for batch in order:
            sample.add(batch)
        chosen.append([batch["input_ids"].tolist() for batch in sample.batches])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == BATCHES
    model = tiny.MODELS["bert"].build()
    found = [collect(model, names(model), order, "fisher") for order in (batches, batches[::-1])]
    for name, measured in found[0].items():
        assert measured.dependence == pytest.approx(found[1][name].dependence, rel=1e-3)


def test_nothing_but_the_scale_is_new() -> None:
    model, data = tiny.MODELS["bert"].build(), [tiny.text(4)]
    found = collect(model, names(model), data, "fisher")
    again = with_dependence(model, found, data)
    for name, measured in found.items():
        assert dataclasses.replace(again[name], dependence=measured.dependence) == measured
        one, other = (Metric.of(dataclasses.replace(measured, dependence=value)) for value in (1.0, 3.0))
        assert other.scale == pytest.approx(3 * one.scale)
        assert one.rows is not None
        assert other.rows is not None
        assert torch.equal(one.rows, other.rows)
