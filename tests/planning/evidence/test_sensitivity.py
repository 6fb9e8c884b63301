"""Sensitivities are those of the definition, for every architecture, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import MODELS, Tiny, text
from torch import Tensor, nn

from factorformer.errors import DataError
from factorformer.layers.surgery import dense_weight, find_matrices
from factorformer.planning.evidence.sensitivity import measure_sensitivities


def shrunk(model: nn.Module, part: float = 0.9):
    """Every weight scaled: its squared relative error is known."""
    return lambda name: (part * dense_weight(model.get_submodule(name)), (1 - part) ** 2)


@pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS.keys())
def test_every_architecture_is_measured_and_left_as_it_was(tiny: Tiny) -> None:
    model = tiny.build().train()
    names = [m.name for m in find_matrices(model, "all")[0] if m.dense is None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    done: list[int] = []
    found = measure_sensitivities(model, names, shrunk(model), [tiny.inputs()], done.append)
    assert list(found) == names
    assert done == list(range(1, len(names) + 1))
    assert all(value >= 0 for value in found.values())
    assert sum(value > 0 for value in found.values()) >= len(names) - 2  # what makes logits only is behind the states
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


class Product(nn.Module):
    """Two matrices in a row, without anything between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x))


def test_of_a_linear_model_they_are_known() -> None:
    model, x = Product(), torch.randn(3, 20, 6)
    mask = torch.ones(3, 20)
    mask[1, 9:] = 0
    found = measure_sensitivities(model, ["first", "second"], shrunk(model), [{"x": x, "attention_mask": mask}])
    y = model(x).detach()[mask.bool()]
    expected = float(y.square().sum() / (y - y.mean(0)).square().sum())
    assert found == pytest.approx({"first": expected, "second": expected}, rel=1e-4)


def test_padding_does_not_count() -> None:
    model = MODELS["bert"].build()
    names = [m.name for m in find_matrices(model)[0]]
    inputs = text(4, 10)
    inputs["attention_mask"][:, 7:] = 0
    noisy = {**inputs, "input_ids": inputs["input_ids"].clone()}
    noisy["input_ids"][:, 7:] = 5
    cut = {key: value[:, :7] for key, value in inputs.items()}
    results = [measure_sensitivities(model, names, shrunk(model), [batch]) for batch in (inputs, noisy, cut)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert results[0] == pytest.approx(results[2], rel=1e-3)


def test_rows_come_from_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorformer.planning.evidence.sensitivity.ROWS", 6)
    model, seen = Product(), []
    model.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    measure_sensitivities(model, ["first"], shrunk(model), [{"x": torch.randn(5, 2, 6)} for _ in range(4)])
    assert seen == [2, 2, 1, 2] * 2  # every third row, without labels, before and after


def test_an_exact_replacement_has_none() -> None:
    model = Product()
    assert measure_sensitivities(
        model, ["first"], lambda name: (dense_weight(model.first), 0.0), [{"x": torch.randn(2, 3, 6)}]
    ) == {"first": 0.0}


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Product().train()
    before = model.first.weight.clone()

    def fail(name: str) -> tuple[Tensor, float]:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        measure_sensitivities(model, ["first"], fail, [{"x": torch.randn(2, 3, 6)}])
    assert torch.equal(model.first.weight, before)
    assert model.training
    with pytest.raises(RuntimeError, match=r"shape|size"):
        measure_sensitivities(model, ["first"], lambda _: (torch.zeros(7, 9), 1.0), [{"x": torch.randn(2, 3, 6)}])
    assert torch.equal(model.first.weight, before)


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="calibration data is empty"):
        measure_sensitivities(Product(), ["first"], shrunk(Product()), [])


class Silent(Product):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.first(x).argmax()


def test_a_model_must_return_something() -> None:
    with pytest.raises(DataError, match="Silent returned no tensor"):
        measure_sensitivities(Silent(), ["first"], shrunk(Product()), [{"x": torch.randn(2, 3, 6)}])
