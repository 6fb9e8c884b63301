"""Truncated singular value decompositions: Eckart and Young hold on every route."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factorformer import fitting
from factorformer.errors import ModelError
from factorformer.fitting import fit, linalg
from factorformer.fitting.linalg import (
    Route,
    leading_eigenvectors,
    leading_singular_vectors,
    separable_moment,
    separable_weights,
    square_root,
    truncation_errors,
)
from factorformer.structures import DenseSparse, LowRank, Structure, arrange_back, rearrange

SHAPES = {"wide": (40, 64), "tall": (64, 40), "square": (48, 48)}
RANK = 8


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(shape[0], len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], len(values), generator=generator, dtype=torch.float64))
    return left * values @ right.T


def residual(matrix: Tensor, side: str, vectors: Tensor) -> Tensor:
    """Squared error after projection on the vectors."""
    work = (matrix if side == "left" else matrix.T).double()
    return (work - vectors.double() @ (vectors.double().T @ work)).square().sum()


def best(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum()


@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_error_is_the_tail_of_singular_values(
    rows: int, columns: int, share: float, seed: int, dtype: torch.dtype
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    short = min(rows, columns)
    rank = max(1, int(share * short))
    side, vectors, tail, _ = leading_singular_vectors(matrix, rank)
    assert side == ("left" if rows <= columns else "right")
    assert vectors.shape == (short, rank)
    torch.testing.assert_close(vectors.double().T @ vectors.double(), torch.eye(rank).double(), rtol=0, atol=1e-5)
    energy = matrix.double().square().sum().item()
    assert tail.item() == pytest.approx(best(matrix, rank).item(), rel=1e-3, abs=1e-10 * energy)
    assert residual(matrix, side, vectors).item() == pytest.approx(tail.item(), rel=1e-3, abs=1e-10 * energy)


# The tail's singular values, where the leading ones are between 1 and 2, and the route that is just accurate enough.
TAILS: list[tuple[float, Route]] = [(1e-1, "gram32"), (1e-3, "gram64"), (1e-5, "gram64"), (1e-8, "svd")]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("tail", "route"), TAILS, ids=lambda value: str(value))
def test_each_route_is_taken_and_accurate(shape: tuple[int, int], tail: float, route: Route) -> None:
    values = torch.full((min(shape),), tail, dtype=torch.float64)
    values[:RANK] = torch.linspace(2, 1, RANK)
    matrix = with_spectrum(shape, values)
    side, vectors, squared, taken = leading_singular_vectors(matrix, RANK)
    assert taken == route
    assert squared.sqrt().item() == pytest.approx(best(matrix, RANK).sqrt().item(), rel=1e-3)
    assert residual(matrix, side, vectors).sqrt() <= 1.001 * best(matrix, RANK).sqrt()


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rank", [1, 8, 31, 40])
def test_power_law_spectra_are_within_a_thousandth_of_the_optimum(decay: float, rank: int) -> None:
    matrix = with_spectrum((48, 64), torch.arange(1, 49, dtype=torch.float64) ** -decay)
    side, vectors, _, _ = leading_singular_vectors(matrix.float(), rank)
    assert residual(matrix.float(), side, vectors).sqrt() <= 1.001 * best(matrix.float(), rank).sqrt()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_matrix_of_low_rank_is_recovered(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(shape, torch.linspace(2, 1, RANK, dtype=torch.float64))
    side, vectors, tail, route = leading_singular_vectors(matrix, RANK)
    assert route == "svd"
    assert tail < 1e-24
    assert residual(matrix, side, vectors) < 1e-24


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    matrix = torch.randn(12, 20, dtype=dtype)
    _, expected, tail, _ = leading_singular_vectors(matrix, 3)
    _, vectors, scaled, _ = leading_singular_vectors(matrix * scale, 3)
    torch.testing.assert_close(vectors @ vectors.T, expected @ expected.T, rtol=0, atol=1e-4)
    assert scaled.double().item() == pytest.approx(tail.item() * scale**2, rel=1e-3)


def test_a_zero_matrix_has_no_tail() -> None:
    side, vectors, tail, _ = leading_singular_vectors(torch.zeros(4, 6), 2)
    assert (side, vectors.shape, tail.item()) == ("left", (4, 2), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    matrix = torch.zeros(4, 6)
    matrix[1, 2] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        leading_singular_vectors(matrix, 2)


def test_leading_eigenvectors_are_ordered() -> None:
    factor = torch.randn(9, 9, dtype=torch.float64)
    gram = factor @ factor.T
    vectors, values = leading_eigenvectors(gram, 4)
    assert torch.equal(values, values.sort(descending=True).values)
    torch.testing.assert_close(gram @ vectors, vectors * values[:4])


@pytest.mark.parametrize("spec", [DenseSparse(12, 4), DenseSparse(12, 4, side="columns")], ids=str)
def test_fits_do_not_depend_on_signs_of_eigenvectors(spec: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    expected, _ = fit(weight, spec)
    eigh = torch.linalg.eigh

    def other(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.randn(len(values)).sign()

    monkeypatch.setattr(torch.linalg, "eigh", other)
    found, _ = fit(weight, spec)
    for name, factor in expected.items():
        assert torch.equal(found[name], factor)


@given(width=st.integers(1, 12), seed=st.integers(0, 5))
def test_square_root(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, width + 2, generator=generator, dtype=torch.float64)
    moment = factor @ factor.T + 0.1 * torch.eye(width, dtype=torch.float64)
    root = square_root(moment)
    assert root.dtype == torch.float64
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, moment)


@pytest.mark.parametrize(
    "moment", [-torch.eye(3), torch.zeros(3, 3), torch.full((3, 3), float("nan"))], ids=["negative", "zero", "nan"]
)
def test_a_metric_that_is_not_positive_definite_is_refused(moment: Tensor) -> None:
    with pytest.raises(ModelError, match=r"not positive definite.*calibration data"):
        square_root(moment)


# Rearrangement

SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(left=SIDES, right=SIDES)
def test_a_kronecker_product_becomes_an_outer_product(left: tuple[int, int], right: tuple[int, int]) -> None:
    first, second = torch.randn(left), torch.randn(right)
    rearranged = rearrange(torch.kron(first, second), left, right)
    torch.testing.assert_close(rearranged, torch.outer(first.flatten(), second.flatten()))


@given(left=SIDES, right=SIDES, rows=st.integers(0, 3), columns=st.integers(0, 3))
def test_arranging_back_gives_the_matrix_padded_with_zeros(
    left: tuple[int, int], right: tuple[int, int], rows: int, columns: int
) -> None:
    out, inner = left[0] * right[0], left[1] * right[1]
    matrix = torch.randn(max(1, out - rows), max(1, inner - columns))
    rearranged = rearrange(matrix, left, right)
    assert rearranged.shape == (left[0] * left[1], right[0] * right[1])
    back = arrange_back(rearranged, left, right)
    assert torch.equal(back[: matrix.shape[0], : matrix.shape[1]], matrix)
    assert back.count_nonzero() == matrix.count_nonzero()


def a_moment(width: int, seed: int) -> Tensor:
    factor = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@given(sides=SIDES, seed=st.integers(0, 5))
def test_a_separable_moment_is_found_exactly(sides: tuple[int, int], seed: int) -> None:
    moment = torch.kron(a_moment(sides[0], seed), a_moment(sides[1], seed + 1))
    torch.testing.assert_close(torch.kron(*separable_moment(moment, sides)), moment)


@given(sides=SIDES, seed=st.integers(0, 5))
def test_the_separable_part_of_any_moment_is_the_most_likely(sides: tuple[int, int], seed: int) -> None:
    moment = a_moment(sides[0] * sides[1], seed)
    first, second = separable_moment(moment, sides, rounds=50)
    for factor in (first, second):
        torch.testing.assert_close(factor, factor.T)
        square_root(factor)  # raises unless positive definite

    def surprise(first: Tensor, second: Tensor) -> Tensor:
        separable = torch.kron(first, second)
        return torch.linalg.solve(separable, moment).trace() + torch.linalg.slogdet(separable)[1]

    best = surprise(first, second)
    for step in (1e-2, 1e-1):
        assert surprise(first + step * first.diagonal().diag(), second) >= best - 1e-6
        assert surprise(first, second + step * second.diagonal().diag()) >= best - 1e-6


@given(sides=SIDES, seed=st.integers(0, 5))
def test_separable_weights_are_the_separable_moment_of_a_diagonal(sides: tuple[int, int], seed: int) -> None:
    weights = torch.randn(sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    first, second = separable_weights(weights, rounds=50)
    expected = torch.kron(*separable_moment(weights.flatten().diag(), sides, rounds=50))
    torch.testing.assert_close(torch.outer(first, second).flatten().diag(), expected, rtol=1e-6, atol=1e-9)
    exact = torch.outer(first, second)
    torch.testing.assert_close(torch.outer(*separable_weights(exact)), exact)


def test_devices_without_float64_have_their_fits_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for such a device: the same results, of the same type and device."""
    weight, spec = torch.randn(20, 12), LowRank(3)
    expected, error = fit(weight, spec)
    errors = truncation_errors(weight)
    monkeypatch.setattr(linalg, "WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr(fitting, "WITHOUT_FLOAT64", ("cpu",))
    found, other = fit(weight, spec)
    assert other == error
    assert all(torch.equal(found[name], factor) for name, factor in expected.items())
    assert torch.equal(truncation_errors(weight), errors)
