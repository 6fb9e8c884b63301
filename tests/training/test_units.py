"""Units of matrices: what they are, what they are worth, and how they leave a model and its optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factorformer.fitting import Metric, fit
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Matrix
from factorformer.layers.nn import FactorizedLinear
from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure
from factorformer.training.optimizer_state import SQUARED
from factorformer.training.units import DenseUnits, FactorUnits, Importance

WIDE, TALL, SQUARE = (20, 28), (28, 20), (24, 24)
SHAPES = [WIDE, TALL, SQUARE]
FACTORIZED: list[tuple[Structure, tuple[int, int]]] = [
    (LowRank(8), WIDE),
    (KroneckerSum.of(SQUARE, 6), SQUARE),
    (DenseSparse(12, 4), TALL),
    (DenseSparse(12, 4, "columns"), WIDE),
]


def dense_model(shape: tuple[int, int], *, conv: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    if conv:
        layer = Conv1D(shape[0], shape[1])
        nn.init.normal_(layer.weight, std=0.3)
        return nn.Sequential(layer).double()
    return nn.Sequential(nn.Linear(shape[1], shape[0])).double()


def metric_of(shape: tuple[int, int], kind: str) -> Metric:
    torch.manual_seed(1)
    rows = torch.randn(60, shape[1]) * torch.linspace(0.2, 3, shape[1])
    moment = SecondMoment((rows.T @ rows).double(), len(rows))
    slopes = torch.randn(90, shape[0]) * torch.linspace(2, 0.1, shape[0])
    return {
        "plain": Metric(),
        "moment": Metric.of(LayerStatistics(moment)),
        "rows": Metric.of(LayerStatistics(rows=torch.rand(shape[0]) + 0.1)),
        "both": Metric.of(LayerStatistics(moment, outputs=SecondMoment((slopes.T @ slopes).double(), len(slopes)))),
    }[kind]


def dense_units(shape: tuple[int, int], kind: str = "plain", *, conv: bool = False) -> tuple[nn.Sequential, DenseUnits]:
    model = dense_model(shape, conv=conv)
    matrix = Matrix("0", shape, "float64")
    weight = dense_weight(model[0])
    return model, DenseUnits.of(model, matrix, Importance(0.5), weight, metric_of(shape, kind))


def loss_of(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(30, shape[1], generator=draw, dtype=torch.float64)
    target = torch.randn(30, shape[0], generator=draw, dtype=torch.float64)
    return (model(x) - target).square().sum()


def groups(units: DenseUnits) -> list[Tensor]:
    """The matrices, `(out, in)`, that a dense matrix is the sum of."""
    weight = dense_weight(units.model.get_submodule("0"))
    turned = weight.T if units.tall else weight
    parts = [torch.outer(units.basis[:, i], units.dual[i] @ turned) for i in range(units.count)]
    return [part.T if units.tall else part for part in parts]


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("kind", ["plain", "moment", "rows", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_groups_are_the_best_fit_of_their_rank(shape: tuple[int, int], kind: str, conv: bool) -> None:
    _, units = dense_units(shape, kind, conv=conv)
    weight, parts = dense_weight(units.model.get_submodule("0")), groups(units)
    torch.testing.assert_close(torch.stack(parts).sum(0), weight)
    best, _ = fit(weight, LowRank(5), metric_of(shape, kind))
    torch.testing.assert_close(torch.stack(parts[:5]).sum(0), LowRank(5).to_dense(shape, best), rtol=0, atol=1e-5)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_changes_are_singular_values_times_their_gradients(shape: tuple[int, int], conv: bool) -> None:
    model, units = dense_units(shape, conv=conv)
    loss_of(model, shape).backward()
    left, values, right = torch.linalg.svd(dense_weight(model[0]), full_matrices=False)
    values.requires_grad_()
    replaced = copy.deepcopy(model)
    weight = left @ torch.diag(values) @ right
    loss = loss_of(lambda x: x @ weight.T + replaced[0].bias, shape)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(units.changes(), values.detach() * gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_changes_of_a_dense_matrix_are_those_of_its_factors(shape: tuple[int, int]) -> None:
    """The matrix written as factors has the same products of parameters and gradients, whatever their norms."""
    model, units = dense_units(shape, "moment")
    loss_of(model, shape).backward()
    changes = units.changes()
    assert units.keep(torch.arange(8), None) is not units
    factors = model[0]
    assert isinstance(factors, FactorizedLinear)
    full = fit(dense_weight(dense_model(shape)[0]), LowRank(8), metric_of(shape, "moment"))[0]
    torch.testing.assert_close(factors.to_dense(), LowRank(8).to_dense(shape, full), rtol=0, atol=1e-5)
    # The loss at the full matrix, as a function of the leading eight groups.
    rest = dense_weight(dense_model(shape)[0]) - factors.to_dense().detach()
    bias = factors.bias
    loss_of(lambda x: factors.matmul(x) + x @ rest.T + bias, shape).backward()  # type: ignore[arg-type]
    torch.testing.assert_close(changes[:8], FactorUnits(model, units.matrix, units.full, Importance(0.5)).changes())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_above_break_even_the_matrix_stays_dense_and_whole(shape: tuple[int, int]) -> None:
    """Fewer groups would take no fewer bytes."""
    model, units = dense_units(shape, "moment")
    before = dense_weight(model[0]).clone()
    largest = max(spec.rank for spec in LowRank.candidates(shape, torch.float64))
    assert units.keep(torch.arange(largest + 1), torch.optim.SGD(model.parameters(), lr=1e-3)) is units
    assert torch.equal(dense_weight(model[0]), before)
    assert units.count == min(shape)
    assert units.keep(torch.arange(largest), None) is not units


def test_groups_follow_the_model_to_another_type() -> None:
    """As they do to another device."""
    model, units = dense_units(WIDE)
    model.float()
    loss = (model(torch.ones(3, WIDE[1])) - 1).square().sum()
    loss.backward()
    units.importance.update(units.changes())
    layer = units.keep(torch.arange(4), None).model[0]
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_below_break_even_factors_take_its_place(shape: tuple[int, int], conv: bool) -> None:
    model, units = dense_units(shape, "moment", conv=conv)
    parts = groups(units)
    kept = torch.tensor([0, 1, 3, 6])
    new = units.keep(kept, None)
    layer = model[0]
    assert isinstance(new, FactorUnits)
    assert isinstance(layer, FactorizedLinear)
    assert layer.spec == LowRank(4)
    torch.testing.assert_close(layer.to_dense(), torch.stack([parts[i] for i in kept]).sum(0))
    torch.testing.assert_close(layer.weight.norm(dim=0), layer.get_parameter("right").norm(dim=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_averages_become_those_of_the_factors(shape: tuple[int, int]) -> None:
    """After one step an average is a multiple of the gradient, and so are the ones carried over."""
    model, units = dense_units(shape)
    # A rate of zero: the weight stays, and with it what the gradient of its factors would have been.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.99))
    loss_of(model, shape).backward()
    gradient = model[0].weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    bias = model[0].bias
    units.keep(torch.arange(6), optimizer)
    layer = model[0]
    assert isinstance(layer, FactorizedLinear)
    weight, right = layer.weight, layer.get_parameter("right")
    group = optimizer.param_groups[0]["params"]
    assert group[0] is weight
    assert group[1] is right
    assert group[2] is bias
    assert len(group) == 3
    expected = {weight: gradient @ right.T, right: weight.T @ gradient}
    for factor, whole in expected.items():
        state = optimizer.state[factor]
        torch.testing.assert_close(state["exp_avg"], 0.1 * whole.detach())
        assert state["step"] == 1
        assert (state["exp_avg_sq"] > 0).all()
    squares = 0.01 * gradient.square() @ right.square().T
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], squares.detach())


def learned(
    spec: Structure, shape: tuple[int, int], kind: str
) -> tuple[nn.Sequential, torch.optim.Optimizer, FactorUnits]:
    """A factorized layer after two steps."""
    weight = dense_weight(dense_model(shape)[0])
    factors, _ = fit(weight, spec)
    model = nn.Sequential(FactorizedLinear(spec, shape, factors, torch.zeros(shape[0], dtype=torch.float64)))
    options = {"adamw": (torch.optim.AdamW, {"amsgrad": True}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}[kind]
    optimizer = options[0](model.parameters(), lr=1e-3, **options[1])
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, shape).backward()
        optimizer.step()
    return model, optimizer, FactorUnits(model, Matrix("0", shape, "float64"), spec, Importance(0.5))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("spec", "shape"), FACTORIZED, ids=str)
def test_what_remains_is_the_old_one_sliced(spec: Structure, shape: tuple[int, int], kind: str) -> None:
    model, optimizer, units = learned(spec, shape, kind)
    layer = model[0]
    assert isinstance(layer, FactorizedLinear)
    before = {name: factor.detach().clone() for name, factor in layer.factors.items()}
    states = {name: dict(optimizer.state[f]) for name, f in layer.factors.items() if f in optimizer.state}
    assert states
    kept = torch.arange(spec.units)[1::2]
    selection = spec.select(before, kept, spec.with_units(len(kept)))
    units.keep(kept, optimizer)
    assert layer.spec == spec.with_units(len(kept))
    assert units.count == len(kept)
    for name, cut in selection.cut.items():
        parameter = getattr(layer, name)
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, cut(before[name]))
        for key, value in states[name].items():
            now = optimizer.state[parameter][key]
            assert torch.equal(now, cut(value) if value.dim() else value), (name, key)
            if now.dim():
                assert now.untyped_storage().nbytes() == now.numel() * now.element_size(), "memory is not freed"
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    assert len(optimizer.state) == len(held), "the state of a parameter that is gone is kept"
    loss_of(model, shape).backward()
    optimizer.step()  # goes on with what is left


def test_importance_is_the_change_of_the_loss_for_small_units() -> None:
    model, units = dense_units(SQUARE)
    loss_of(model, SQUARE).backward()
    products, parts = units.changes(), groups(units)
    weight, size = model[0].weight, 1e-5
    with torch.no_grad():
        start = loss_of(model, SQUARE)
        for product, part in zip(products, parts, strict=True):
            weight -= size * part
            change = loss_of(model, SQUARE) - start
            weight += size * part
            torch.testing.assert_close(change / size, -product, rtol=1e-2, atol=1e-3 * float(products.abs().max()))


def test_states_of_other_sizes_begin_anew() -> None:
    """Adafactor's row and column statistics cannot be cut as the parameter is."""
    model, _, units = learned(LowRank(8), WIDE, "sgd")
    optimizer = torch.optim.Adafactor(model.parameters())
    loss_of(model, WIDE).backward()
    optimizer.step()
    units.keep(torch.arange(4), optimizer)
    assert all(parameter not in optimizer.state for parameter in units.parameters.values())
    model.zero_grad()
    loss_of(model, WIDE).backward()
    optimizer.step()


def test_importance_averages_over_steps_and_forgets_what_is_gone() -> None:
    importance = Importance(0.75)
    assert importance.values is None
    importance.update(torch.tensor([-2.0, 4.0]))
    importance.update(torch.tensor([torch.nan, 0.0]))  # does not count
    importance.update(torch.tensor([6.0, 0.0]))
    assert importance.values is not None
    assert importance.values.tolist() == [0.75 * 2 + 0.25 * 6, 0.75 * 4]
    importance.keep(torch.tensor([1]))
    assert importance.values.tolist() == [3.0]


def test_a_matrix_that_few_steps_reach_has_its_mean_over_all_of_them() -> None:
    rare = Importance(0.75)
    for step in range(100):
        nothing = None if step % 2 else torch.zeros(2)
        rare.update(torch.tensor([2.0, 4.0]) if step % 20 == 10 else nothing)
    assert rare.values is not None
    torch.testing.assert_close(rare.values, torch.tensor([2.0, 4.0]) / 20)
    never = Importance(0.75)
    never.update(torch.zeros(3))
    never.update(None)
    assert never.values is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {}),
    ],
)
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=str)
def test_every_optimizer_goes_on_with_factors(kind: type, options: dict[str, bool], shape: tuple[int, int]) -> None:
    """Averages of squares stay above zero, and what nothing is known of begins anew."""
    model, units = dense_units(shape)
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, shape)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        if step == 2:
            units.keep(torch.arange(8), optimizer)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[3]
    for state in optimizer.state.values():
        for name, value in state.items():
            assert name not in SQUARED or (value >= 0).all()


def test_names_of_parameters_follow() -> None:
    model, units = dense_units(WIDE)
    optimizer = torch.optim.AdamW(model.named_parameters())
    units = units.keep(torch.arange(8), optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.right", "0.bias"]
    units.keep(torch.arange(4), optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.right", "0.bias"]
    held = optimizer.param_groups[0]["params"]
    assert all(held[i] is model.get_parameter(name) for i, name in enumerate(optimizer.param_groups[0]["param_names"]))
