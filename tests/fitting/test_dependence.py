"""How far the Fisher information is from the product of moments: against brute force, and where it is known."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from tests import tiny
from tests.fitting.test_statistics import examples, names, split
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from factorformer.fitting import Metric
from factorformer.fitting.dependence import BATCHES, Sample, with_dependence
from factorformer.fitting.metric import divided
from factorformer.fitting.statistics import collect


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as precise as those by hand, on every processor, and all directions."""
    monkeypatch.setattr("factorformer.fitting.dependence.SKETCH", 128)
    monkeypatch.setattr("factorformer.fitting.gradient_recorders.fast_products", lambda _: contextlib.nullcontext())


def whitened(gradient: Tensor, metric: Metric) -> Tensor:
    """`R^-T D L^-T` of a gradient `D: (out, in)`."""
    assert metric.rows is not None
    assert metric.columns is not None
    rows = torch.linalg.solve_triangular(metric.rows.T, gradient.double(), upper=False)
    return torch.linalg.solve_triangular(metric.columns, rows.T, upper=False).T


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
def test_gradients_of_rows_equal_brute_force(name: str) -> None:
    """Padding, layers that are called several times, and weights that lie the other way round."""
    model = tiny.MODELS[name].build()
    batch = examples(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    layers, shift = names(model), int(name == "gpt2")
    found = collect(model, layers, [batch], "fisher")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _, x, y, layer=layer: seen[layer].append((x[0], y)))
        for layer in layers
    ]
    together, inputs, outputs = (dict.fromkeys(layers, 0.0) for _ in range(3))
    counts = dict.fromkeys(layers, 0)
    for row, single in enumerate(split(batch, 1)):
        for calls in seen.values():
            calls.clear()
        units = int((single["labels"][:, shift:] != -100).sum())
        loss, real = model(**single).loss, batch["attention_mask"][row].bool()
        for layer in layers:
            module, metric = model.get_submodule(layer), Metric.of(found[layer])
            gradient = torch.zeros(module.weight.shape)
            for x, y in seen[layer]:
                g = torch.zeros_like(y)
                if units:
                    (g,) = torch.autograd.grad(loss * units, y, retain_graph=True)
                flat, g = x[0][real].detach(), g[0][real]
                gradient = gradient + (flat.T @ g if isinstance(module, Conv1D) else g.T @ flat)
                assert metric.rows is not None
                inputs[layer] += float(
                    torch.linalg.solve_triangular(metric.columns, flat.double().T, upper=False).square().sum()
                )
                outputs[layer] += float(
                    torch.linalg.solve_triangular(metric.rows.T, g.double().T, upper=False).square().sum()
                )
                counts[layer] += len(g)
            gradient = gradient.T if isinstance(module, Conv1D) else gradient
            together[layer] += float(whitened(gradient, metric).square().sum())
    for handle in handles:
        handle.remove()
    for layer in layers:
        expected = together[layer] * counts[layer] / inputs[layer] / outputs[layer]
        assert found[layer].dependence == pytest.approx(expected, rel=0.01), layer
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


def test_embeddings_and_tied_heads_are_measured() -> None:
    for name in ("bert", "llama-tied", "gpt2"):
        model = tiny.MODELS[name].build()
        found = collect(model, names(model, "all"), [tiny.text(8, 12)], "fisher")
        assert all(0.05 < measured.dependence < 20 for measured in found.values()), name
        assert all(measured.dependence != 1.0 for measured in found.values()), name


def test_tokens_of_unknown_rows_are_left_out() -> None:
    class Routed(Pooled):
        def forward(self, x: Tensor) -> BaseModelOutput:
            flat = x.flatten(0, 1)
            return BaseModelOutput(last_hidden_state=self.linear(flat[:-1]).mean(0).expand(len(x), -1))

    x = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0))
    assert collect(Routed(), ["linear"], [{"x": x}], "fisher")["linear"].dependence == 1.0


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
        assert torch.equal(divided(torch.eye(len(one.rows)), one.rows), divided(torch.eye(len(one.rows)), other.rows))  # type: ignore[arg-type]
