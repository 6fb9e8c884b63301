"""Low-rank fits reach the optimum of their metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting import Metric, fit
from factorformer.fitting.linalg import square_root
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.structures import LowRank, largest_rank

SHAPES = {"tall": (20, 11), "wide": (11, 20), "square": (14, 14)}
RANK = 3
METRICS = ["plain", "rows", "columns", "rows-and-columns"]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(width: int, spread: float = 1.0, seed: int = 1) -> Tensor:
    """Correlated rows of input, `(rows, width)`, whose channels differ in size by a factor `spread`."""
    mixed = normal(3 * width, width, seed=seed) @ normal(width, width, seed=seed + 1)
    return mixed * torch.logspace(0, torch.tensor(spread).log10().item(), width, dtype=torch.float64)


def a_metric(name: str, shape: tuple[int, int], spread: float = 1.0) -> tuple[Metric, Tensor, Tensor]:
    """The metric, its rows as a column `(out, 1)`, and the input `(n, in)` whose moment it is."""
    x = inputs(shape[1], spread) if "columns" in name else torch.eye(shape[1], dtype=torch.float64)
    rows = normal(shape[0], seed=7).exp() if "rows" in name else torch.ones(shape[0], dtype=torch.float64)
    metric = Metric(rows if "rows" in name else None, square_root(x.T @ x) if "columns" in name else None)
    return metric, rows[:, None], x


def measured(weight: Tensor, factors: dict[str, Tensor], rows: Tensor, x: Tensor) -> float:
    """`||R (W - W') X^T||_F / ||R W X^T||_F`, from its definition."""
    dense = factors["weight"].double() @ factors["right"].double()
    return float((rows * (weight.double() - dense) @ x.T).norm() / (rows * weight.double() @ x.T).norm())


def optimum(weight: Tensor, rank: int, rows: Tensor, x: Tensor) -> float:
    """The same for the best `W'`: `R W' X^T` can be any matrix of that rank in the row space of `X^T`."""
    values = torch.linalg.svdvals(rows * weight.double() @ x.T)
    return float(values[rank:].norm() / values.norm())


def descend(weight: Tensor, rank: int, rows: Tensor, x: Tensor) -> float:
    """The same once more, by brute force: L-BFGS on the factors from several random starts."""
    found = []
    for seed in range(3):
        factors = {
            "weight": normal(weight.shape[0], rank, seed=10 + seed).requires_grad_(),
            "right": normal(rank, weight.shape[1], seed=20 + seed).requires_grad_(),
        }
        optimizer = torch.optim.LBFGS(list(factors.values()), max_iter=800, line_search_fn="strong_wolfe")

        def loss(factors=factors, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            value = (rows * (weight - factors["weight"] @ factors["right"]) @ x.T).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        found.append(measured(weight, {name: f.detach() for name, f in factors.items()}, rows, x))
    return min(found)


@given(
    rows=st.integers(3, 14),
    columns=st.integers(3, 14),
    share=st.floats(0, 1),
    name=st.sampled_from(METRICS),
    seed=st.integers(0, 9),
)
def test_error_equals_the_tail_of_singular_values(rows: int, columns: int, share: float, name: str, seed: int) -> None:
    shape = (rows, columns)
    rank = 1 + int(share * (largest_rank(shape) - 1))
    weight = normal(*shape, seed=seed)
    metric, r, x = a_metric(name, shape)
    factors, error = fit(weight, LowRank(rank), metric)
    assert measured(weight, factors, r, x) == pytest.approx(optimum(weight, rank, r, x), rel=1e-3)
    assert error == pytest.approx(measured(weight, factors, r, x), rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "name"),
    [(SHAPES["tall"], METRICS[0]), *((shape, METRICS[3]) for shape in SHAPES.values())],
    ids=str,
)
def test_no_descent_finds_better_factors(shape: tuple[int, int], name: str) -> None:
    weight = normal(*shape)
    metric, rows, x = a_metric(name, shape)
    factors, _ = fit(weight, LowRank(RANK), metric)
    error, other = measured(weight, factors, rows, x), descend(weight, RANK, rows, x)
    assert error <= other * (1 + 1e-6)
    assert other == pytest.approx(error, rel=1e-3)  # and the descent did not merely fail


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", METRICS[1:])
def test_a_metric_beats_the_plain_fit_under_itself(shape: tuple[int, int], name: str) -> None:
    weight = normal(*shape)
    metric, rows, x = a_metric(name, shape)
    plain, _ = fit(weight, LowRank(RANK))
    aware, _ = fit(weight, LowRank(RANK), metric)
    assert measured(weight, aware, rows, x) < 0.999 * measured(weight, plain, rows, x)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_a_matrix_of_low_rank_is_recovered(shape: tuple[int, int], name: str) -> None:
    weight = normal(shape[0], RANK) @ normal(RANK, shape[1], seed=1)
    factors, error = fit(weight, LowRank(RANK), a_metric(name, shape)[0])
    assert error < 1e-7
    torch.testing.assert_close(factors["weight"] @ factors["right"], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outlier_channels_do_not_spoil_the_fit(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    metric, rows, x = a_metric("columns", shape, spread=1e4)
    factors, error = fit(weight, LowRank(RANK), metric)
    assert measured(weight, factors, rows, x) <= 1.001 * optimum(weight, RANK, rows, x)
    assert error == pytest.approx(measured(weight, factors, rows, x), rel=1e-3)


PRECISIONS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_factors_have_the_type_of_the_weight(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    weight = normal(*shape).to(dtype)
    metric, rows, x = a_metric(name, shape)
    factors, error = fit(weight, LowRank(RANK), metric)
    assert {t.dtype for t in factors.values()} == {dtype}
    assert all(t.is_contiguous() for t in factors.values())
    assert measured(weight, factors, rows, x) <= (1 + PRECISIONS[dtype]) * optimum(weight, RANK, rows, x)
    assert error == pytest.approx(measured(weight, factors, rows, x), rel=max(1e-3, PRECISIONS[dtype]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_units_are_balanced_and_the_last_matter_least(shape: tuple[int, int], name: str) -> None:
    weight = normal(*shape)
    metric, rows, x = a_metric(name, shape)
    factors, _ = fit(weight, LowRank(RANK), metric)
    torch.testing.assert_close(factors["weight"].norm(dim=0), factors["right"].norm(dim=1))
    for rank in range(1, RANK):
        kept = LowRank(RANK).select(factors, torch.arange(rank), LowRank(rank))
        leading = {name: cut(factors[name]) for name, cut in kept.cut.items()}
        assert measured(weight, leading, rows, x) == pytest.approx(optimum(weight, rank, rows, x), rel=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_a_view_is_fitted_like_its_copy(name: str) -> None:
    weight = normal(12, 18).T  # as the weight of a Conv1D comes
    metric, rows, x = a_metric(name, (18, 12))
    factors, _ = fit(weight, LowRank(RANK), metric)
    assert measured(weight, factors, rows, x) <= 1.001 * optimum(weight, RANK, rows, x)


@pytest.mark.parametrize("name", METRICS)
def test_a_zero_matrix_stays_zero(name: str) -> None:
    factors, error = fit(torch.zeros(12, 18), LowRank(RANK), a_metric(name, (12, 18))[0])
    assert not (factors["weight"] @ factors["right"]).any()
    assert error == 0


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = normal(12, 18)
    weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        fit(weight, LowRank(RANK))


def test_a_rank_without_gain_is_refused() -> None:
    with pytest.raises(ModelError, match="allowed: 1 to 7; "):
        fit(normal(12, 18), LowRank(8))


# Statistics to metrics


def test_no_statistics_are_the_plain_metric() -> None:
    assert Metric.of(None) == Metric()
    weight = normal(4, 6)
    assert Metric().apply(weight) is weight
    assert Metric().apply(weight.half()).dtype == torch.float32


def test_rows_of_a_metric_are_roots_of_importance() -> None:
    importance = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)
    rows = Metric.of(LayerStatistics(rows=importance)).rows
    assert rows is not None
    torch.testing.assert_close(rows / rows[0], importance.sqrt(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20])
def test_the_scale_of_importance_does_not_matter(scale: float) -> None:
    weight, importance = normal(12, 18).float(), normal(12).exp()
    expected, error = fit(weight, LowRank(RANK), Metric.of(LayerStatistics(rows=importance)))
    factors, scaled = fit(weight, LowRank(RANK), Metric.of(LayerStatistics(rows=importance * scale)))
    assert scaled == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(
        factors["weight"] @ factors["right"], expected["weight"] @ expected["right"], rtol=0, atol=1e-4
    )


def test_rows_that_calibration_never_touched_are_fitted_too() -> None:
    importance = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    weight = normal(12, 18)
    weight[:6] = normal(6, 1) @ normal(1, 18, seed=1)  # the important rows take one of the ranks
    factors, _ = fit(weight, LowRank(4), Metric.of(LayerStatistics(rows=importance)))
    dense = factors["weight"] @ factors["right"]
    torch.testing.assert_close(dense[:6], weight[:6], rtol=0, atol=0.05)
    others = torch.linalg.svdvals(weight[6:])[3:].norm()
    assert (dense[6:] - weight[6:]).norm() <= 1.01 * others


def test_no_importance_at_all_is_the_plain_fit() -> None:
    weight = normal(12, 18).float()
    metric = Metric.of(LayerStatistics(rows=torch.zeros(12, dtype=torch.float64)))
    (plain, error), (factors, other) = fit(weight, LowRank(RANK)), fit(weight, LowRank(RANK), metric)
    assert other == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(
        factors["weight"] @ factors["right"], plain["weight"] @ plain["right"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_measured_moment_gives_the_optimum_on_its_input(shape: tuple[int, int], scale: float) -> None:
    weight = normal(*shape)
    x = inputs(shape[1]).repeat(200, 1) * scale  # so many rows that regularization is negligible
    statistics = LayerStatistics(SecondMoment(x.T @ x, len(x)))
    factors, _ = fit(weight, LowRank(RANK), Metric.of(statistics))
    ones = torch.ones(shape[0], 1, dtype=torch.float64)
    assert measured(weight, factors, ones, x) <= 1.001 * optimum(weight, RANK, ones, x)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_input_that_is_always_zero_gives_the_plain_fit(shape: tuple[int, int]) -> None:
    weight = normal(*shape).float()
    width = shape[1]
    metric = Metric.of(LayerStatistics(SecondMoment(torch.zeros(width, width, dtype=torch.float64), 100)))
    (plain, error), (factors, other) = fit(weight, LowRank(RANK)), fit(weight, LowRank(RANK), metric)
    assert other == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(
        factors["weight"] @ factors["right"], plain["weight"] @ plain["right"], rtol=0, atol=1e-4
    )
