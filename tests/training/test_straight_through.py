"""The Straight-Through Factorizer, on layers small enough to compute by hand what it should do."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorformer.errors import MethodError, ModelError
from factorformer.fitting import Metric, fit
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear
from factorformer.structures import DenseSparse, KroneckerSum, LowRank
from factorformer.training.straight_through import StraightThrough, StraightThroughSettings, _largest_eigenvalue

TALL, WIDE = (24, 16), (16, 24)
SPARSE = [
    (DenseSparse(8, 3), TALL),
    (DenseSparse(8, 3, "columns"), WIDE),
]
EACH_STEP = StraightThroughSettings(interval=1, freeze=0.5)


def layers(spec: DenseSparse, shape: tuple[int, int]) -> tuple[nn.Sequential, nn.Sequential]:
    """A dense layer, and the same one factorized."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0])
    factors, _ = fit(dense.weight.detach(), spec)
    return nn.Sequential(FactorizedLinear(spec, shape, factors, dense.bias)), nn.Sequential(dense)


def layer_of(model: nn.Sequential) -> FactorizedLinear:
    assert isinstance(model[0], FactorizedLinear)
    return model[0]


def measured(width: int) -> dict[str, LayerStatistics]:
    rows = torch.randn(50, width) * torch.linspace(0.2, 3, width)
    return {"0": LayerStatistics(SecondMoment((rows.T @ rows).double(), len(rows)))}


def learn(
    model: nn.Sequential,
    straight: StraightThrough,
    steps: int,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """A plain loop that pulls the layer towards another matrix."""
    shape = layer_of(model).shape
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(40, shape[1], generator=draw)
    target = x @ torch.randn(shape[1], shape[0], generator=draw)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(first, steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        straight.after_step(step + 1, 20)
    return optimizer


def support_of(layer: FactorizedLinear) -> Tensor:
    assert isinstance(layer.spec, DenseSparse)
    return layer.spec.coefficients(layer.factors).detach() != 0


@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
def test_the_forward_pass_is_that_of_the_factors(spec: DenseSparse, shape: tuple[int, int]) -> None:
    model, dense = layers(spec, shape)
    x = torch.randn(5, shape[1])
    expected = model(x)
    straight = StraightThrough(model, dense=dense)
    torch.testing.assert_close(model(x), expected)
    straight.finish()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("spec", "shape"), SPARSE[:2], ids=str)
def test_gradients_reach_entries_outside_of_the_support(spec: DenseSparse, shape: tuple[int, int]) -> None:
    model, dense = layers(spec, shape)
    StraightThrough(model, dense=dense)
    layer = layer_of(model)
    x, weights = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    (model(x) * weights).sum().backward()
    # dL/dW = weights^T x; dL/dS of W = S D, or of W^T, follows from the chain rule.
    gradient = weights.T @ x if spec.side == "rows" else x.T @ weights
    torch.testing.assert_close(layer.shadow.grad, gradient @ layer.dictionary.T)
    assert layer.weight.grad is None
    assert layer.dictionary.grad is not None


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
def test_supports_move_and_then_freeze(spec: DenseSparse, shape: tuple[int, int], with_metric: bool) -> None:
    model, dense = layers(spec, shape)
    layer = layer_of(model)
    straight = StraightThrough(model, measured(shape[1]) if with_metric else None, dense, EACH_STEP)
    start = support_of(layer)
    optimizer = learn(model, straight, 10)
    layer.state_dict()  # packs
    frozen = support_of(layer)
    assert (frozen != start).any()
    learn(model, straight, 20, 10, optimizer)
    straight.finish()
    assert torch.equal(support_of(layer), frozen)
    assert set(layer.state_dict()) == {"weight", "support", "dictionary", "bias"}
    assert all(p.requires_grad for p in layer.parameters())
    layer.check_factors()


@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
def test_it_learns_and_the_end_is_what_was_trained(spec: DenseSparse, shape: tuple[int, int]) -> None:
    model, dense = layers(spec, shape)
    x = torch.randn(40, shape[1], generator=torch.Generator().manual_seed(1))
    straight = StraightThrough(model, None, dense, EACH_STEP)
    before = model(x).detach()
    learn(model, straight, 20)
    trained = model(x).detach()
    straight.finish()
    torch.testing.assert_close(model(x), trained)
    assert (trained - before).abs().amax() > 0.1


@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
@pytest.mark.parametrize("cut", [4, 14], ids=["moving", "frozen"])
def test_a_state_dict_brings_everything_back(spec: DenseSparse, shape: tuple[int, int], cut: int) -> None:
    whole, dense = layers(spec, shape)
    straight = StraightThrough(whole, measured(shape[1]), dense, EACH_STEP)
    optimizer = learn(whole, straight, cut)
    state, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    learn(whole, straight, 20, cut, optimizer)
    straight.finish()

    other, _ = layers(spec, shape)
    again = StraightThrough(other, measured(shape[1]), dense, EACH_STEP)
    other.load_state_dict(state)
    again.refresh()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.05)
    optimizer.load_state_dict(moments)
    learn(other, again, 20, cut, optimizer)
    again.finish()
    assert whole.state_dict().keys() == other.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_state_dict_holds_the_factors_of_the_moment() -> None:
    spec, shape = SPARSE[0]
    model, dense = layers(spec, shape)
    straight = StraightThrough(model, None, dense, EACH_STEP)
    learn(model, straight, 5)
    state = {key.removeprefix("0."): value for key, value in model.state_dict().items()}
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(spec.matmul(shape, state, x, state["bias"]), model(x))


@pytest.mark.parametrize(("spec", "shape"), [*SPARSE, (DenseSparse(24, 6, "columns"), (32, 96))], ids=str)
def test_projections_alone_keep_what_the_fit_has_chosen(spec: DenseSparse, shape: tuple[int, int]) -> None:
    """Under a metric with correlated inputs, where plain least squares would choose something else."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(shape[1], shape[0]))
    rows = torch.randn(400, shape[1]) @ torch.randn(shape[1], shape[1]) * torch.logspace(0, -2, shape[1])
    moment = SecondMoment((rows.T @ rows).double(), len(rows))
    metric = Metric(None, moment.root())
    factors, fitted = fit(dense[0].weight.detach(), spec, metric)
    model = nn.Sequential(FactorizedLinear(spec, shape, factors, dense[0].bias))
    straight = StraightThrough(model, {"0": LayerStatistics(moment)}, dense, EACH_STEP)
    for step in range(40):
        straight.after_step(step + 1, 40)
    straight.finish()
    left = metric.apply(dense[0].weight.detach() - layer_of(model).to_dense().detach())
    assert left.norm() / metric.apply(dense[0].weight.detach()).norm() <= 1.05 * fitted


@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
def test_what_reads_the_matrix_in_training_reads_what_is_multiplied(spec: DenseSparse, shape: tuple[int, int]) -> None:
    model, dense = layers(spec, shape)
    straight = StraightThrough(model, None, dense, EACH_STEP)
    layer, x = layer_of(model), torch.randn(3, shape[1])
    for first, last in ((0, 4), (4, 14)):
        learn(model, straight, last, first)
        torch.testing.assert_close(x @ layer.to_dense().T + layer.bias, model(x))
    index = torch.tensor([1, 0, 1])
    torch.testing.assert_close(layer.rows(index), layer.to_dense()[index])
    with pytest.raises(ModelError, match=r"finish\(\) of that first"):
        StraightThrough(model)
    straight.finish()
    straight.finish()
    assert layer.form is None


@pytest.mark.parametrize(("spec", "shape"), SPARSE, ids=str)
def test_a_training_that_stops_between_two_projections_loses_nothing(spec: DenseSparse, shape: tuple[int, int]) -> None:
    """What the shadow learned since the last one is projected once more, with any interval."""
    settings = StraightThroughSettings(interval=4, freeze=1.0)
    distances = []
    for steps in (8, 10):  # at a projection, and two steps after it
        model, dense = layers(spec, shape)
        straight = StraightThrough(model, None, dense, settings)
        learn(model, straight, steps)
        layer = layer_of(model)
        shadow, stale = layer.shadow.detach().clone(), layer.projection.clone()
        dictionary = layer.dictionary.detach().clone()
        straight.finish()
        found = spec.coefficients(layer.factors).detach()
        distances.append([float(((codes - shadow) @ dictionary).norm()) for codes in (stale, found)])
        assert torch.equal(found, stale) == (steps == 8)
    assert distances[1][1] < distances[1][0], "the projection did not follow"


def test_other_structures_have_no_support_to_learn() -> None:
    for spec in (LowRank(4), KroneckerSum.of(TALL, 3)):
        with pytest.raises(ModelError, match="sparse support"):
            StraightThrough(layers(spec, TALL)[0])
    mixed = nn.ModuleDict({"a": layers(LowRank(4), TALL)[0], "b": layers(*SPARSE[0])[0]})
    assert list(StraightThrough(mixed).forms) == ["b.0"]


def test_factors_that_are_frozen_stay_so() -> None:
    model, dense = layers(*SPARSE[0])
    layer_of(model).dictionary.requires_grad_(False)
    straight = StraightThrough(model, None, dense, EACH_STEP)
    straight.finish()
    assert layer_of(model).weight.requires_grad
    assert not layer_of(model).dictionary.requires_grad


@pytest.mark.parametrize("wrong", [nn.Sequential(nn.Linear(3, 4)), nn.Sequential()], ids=str)
def test_a_dense_model_that_does_not_fit_is_refused(wrong: nn.Module) -> None:
    model, _ = layers(*SPARSE[0])
    for given in (wrong, model):
        with pytest.raises(ModelError, match=r"'0'.* \(24, 16\)"):
            StraightThrough(model, None, given)


def test_the_step_of_projections_is_never_too_long() -> None:
    torch.manual_seed(0)
    for width in (2, 5, 40):
        for _ in range(20):
            atoms = torch.randn(width, 12)
            signs = torch.sign(atoms[:, :1])
            for gram in (atoms @ atoms.T, torch.ones(width, width), signs @ signs.T):
                # Least of three seeds 0.94, over 1.3; steps diverge below a half.
                assert _largest_eigenvalue(gram) >= 0.72 * torch.linalg.eigvalsh(gram)[-1]


def test_projections_follow_the_metric() -> None:
    """Under a metric in which one input hardly counts, its codes are given up first."""
    spec, shape = DenseSparse(8, 3), TALL
    model, dense = layers(spec, shape)
    moment = torch.ones(shape[1]).double()
    moment[:8] = 1e-3
    statistics = {"0": LayerStatistics(SecondMoment(torch.diag(moment), 1))}
    errors = []
    for known in (statistics, None):
        chosen = copy.deepcopy(model)
        straight = StraightThrough(chosen, known, dense, dataclasses.replace(EACH_STEP, steps=30))
        straight.after_step(1, 20)
        difference = layer_of(chosen).projection @ layer_of(chosen).dictionary.detach() - dense[0].weight.detach()
        errors.append(float((difference.square() * moment).sum()))
    assert errors[0] < errors[1]


def test_only_linear_layers_that_stand_alone_are_taken() -> None:
    spec, shape = SPARSE[0]
    embedding = FactorizedEmbedding(spec, shape)
    head = FactorizedLinear(spec, shape, embedding.factors)
    with pytest.raises(ModelError, match="compress the model first"):
        StraightThrough(nn.ModuleDict({"embedding": embedding, "head": head}))
    with pytest.raises(ModelError, match="compress the model first"):
        StraightThrough(nn.Linear(3, 4))
    model, _ = layers(spec, shape)
    layer_of(model).weight.requires_grad_(False)
    with pytest.raises(ModelError, match="compress the model first"):
        StraightThrough(model)


@pytest.mark.parametrize(("spec", "shape"), SPARSE[:2], ids=str)
def test_products_in_bfloat16(spec: DenseSparse, shape: tuple[int, int]) -> None:
    model, dense = layers(spec, shape)
    straight = StraightThrough(model, None, dense, EACH_STEP)
    x = torch.randn(4, shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert layer_of(model).shadow.grad is not None
    assert layer_of(model).shadow.grad.dtype == torch.float32
    straight.finish()


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"freeze": 0.0}, {"freeze": 1.1}, {"steps": 0}], ids=str)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=next(iter(wrong))):
        StraightThroughSettings(**wrong)  # type: ignore[arg-type]
