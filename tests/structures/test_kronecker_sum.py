"""Sums of Kronecker products: default shapes, costs, errors, the start from scratch, and what they can express."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear
from factorformer.structures import KroneckerSum, LowRank, Shape, factor_shapes
from factorformer.structures.kronecker_sum import ROWS_AT_ONCE

MULTIPLES = st.integers(2, 64).map(lambda count: 64 * count)


def factors(spec: KroneckerSum, shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(tensor.size, dtype=dtype) for name, tensor in spec.tensors(shape).items()}


def orders(spec: KroneckerSum) -> tuple[int, int]:
    """FLOPs for a row of input: right factors first, and left factors first."""
    (m1, n1), (m2, n2) = spec.left, spec.right
    # X (n1, n2) -> X B_k^T (n1, m2) -> A_k X B_k^T (m1, m2), and the other way round.
    return 2 * spec.rank * (n1 * n2 * m2 + m1 * n1 * m2), 2 * spec.rank * (m1 * n1 * n2 + m1 * n2 * m2)


def rearranged(matrix: Tensor, left: Shape, right: Shape) -> Tensor:
    """Every block of the size of `right` as one row (Van Loan and Pitsianis, 1993): `A (x) B` has rank 1."""
    (m1, n1), (m2, n2) = left, right
    blocks = [matrix[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].flatten() for i in range(m1) for j in range(n1)]
    return torch.stack(blocks)


# What it is


def test_it_is_the_sum_that_torch_kron_gives() -> None:
    spec, shape = KroneckerSum(3, (2, 5), (4, 3)), (8, 15)
    given_factors = factors(spec, shape)
    terms = [torch.kron(given_factors["weight"][..., k], given_factors["right"][:, k]) for k in range(3)]
    whole = torch.stack(terms).sum(0)
    torch.testing.assert_close(spec.to_dense(shape, given_factors), whole)
    torch.testing.assert_close(spec.to_dense((7, 14), given_factors), whole[:7, :14])


@pytest.mark.parametrize(("left", "right"), [((12, 1), (1, 9)), ((1, 9), (12, 1))])
def test_with_thin_factors_it_is_low_rank(left: Shape, right: Shape) -> None:
    spec = KroneckerSum(4, left, right)
    dense = spec.to_dense((12, 9), factors(spec, (12, 9)))
    assert torch.linalg.matrix_rank(dense) == 4
    assert spec.parameters((12, 9)) == LowRank(4).parameters((12, 9))
    assert spec.flops((12, 9)) == LowRank(4).flops((12, 9))


# Default shapes


@settings(max_examples=100)
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)) | st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_default_shapes_cover_the_matrix_and_nothing_else(shape: Shape) -> None:
    left, right = factor_shapes(shape)
    for whole, first, second in zip(shape, left, right, strict=True):
        assert (first - 1) * second < whole <= first * second  # no block row or column is padding only
    candidates = list(KroneckerSum.candidates(shape, torch.float32))
    assert {(spec.left, spec.right) for spec in candidates} <= {(left, right)}
    for spec in (*candidates[:1], *candidates[-1:]):
        spec.check(shape)
        assert spec.parameters(shape) < math.prod(shape)


@pytest.mark.parametrize("shape", [(509, 2550), (1, 41), (1, 42), (1, 49)], ids=str)
def test_default_shapes_where_powers_of_two_do_not_divide(shape: Shape) -> None:
    for spec in KroneckerSum.candidates(shape, torch.float32):
        spec.check(shape)


@settings(max_examples=200)
@given(out=MULTIPLES, inner=MULTIPLES)
def test_default_shapes_of_layers_are_square_when_rearranged_and_made_for_gemm(out: int, inner: int) -> None:
    assume(max(out, inner) <= 8 * min(out, inner))
    left, right = factor_shapes((out, inner))
    assert left[0] * right[0] == out
    assert left[1] * right[1] == inner
    sizes = math.prod(left), math.prod(right)
    assert max(sizes) <= 2.5 * min(sizes)
    assert max(left) % 8 == max(right) % 8 == 0
    assert 2.5 < min(orders(KroneckerSum(1, left, right))) / 2 / sum(sizes) < 6


@settings(max_examples=100)
@given(out=st.integers(64, 2000), inner=st.integers(64, 2000))
def test_default_shapes_pad_little(out: int, inner: int) -> None:
    assume(max(out, inner) <= 16 * min(out, inner))
    left, right = factor_shapes((out, inner))
    assert math.prod(left) * math.prod(right) <= 1.1 * out * inner


@pytest.mark.parametrize("width", [512, 768, 1024, 2048, 4096])
def test_default_shapes_of_square_layers(width: int) -> None:
    assert factor_shapes((width, width)) == ((width // 4, 4), (4, width // 4))
    spec = KroneckerSum.of((width, width), 8)
    # So a tenth of the parameters costs four tenths of the time, not more.
    assert spec.flops((width, width)) == 4 * 2 * spec.parameters((width, width))


@pytest.mark.parametrize("shape", [(30522, 384), (30522, 768), (8000, 512), (50257, 768), (32000, 4096)], ids=str)
def test_default_shapes_of_embeddings(shape: Shape) -> None:
    left, right = factor_shapes(shape)
    sizes = math.prod(left), math.prod(right)
    assert max(sizes) <= 2.5 * min(sizes)
    assert math.prod(sizes) <= 1.001 * math.prod(shape)
    # All rows asked for at ten times fewer parameters, without the matrix.
    spec = KroneckerSum.of(shape, math.prod(shape) // 10 // sum(sizes))
    assert spec.row_flops(shape) < spec.flops(shape)


# Costs


@given(
    left=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    right=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 3),
    rows=st.integers(1, 4),
)
@settings(max_examples=100)
def test_the_product_takes_the_cheaper_order(left: Shape, right: Shape, rank: int, rows: int) -> None:
    spec = KroneckerSum(rank, left, right)
    shape = left[0] * right[0], left[1] * right[1]
    with FlopCounterMode(display=False) as counter:
        spec.matmul(shape, factors(spec, shape), torch.randn(rows, shape[1], dtype=torch.float64))
    assert counter.get_total_flops() == rows * spec.flops(shape) == rows * min(orders(spec))


def test_both_orders_are_taken() -> None:
    for spec in (KroneckerSum(1, (8, 2), (2, 8)), KroneckerSum(1, (2, 8), (8, 2))):
        assert spec.flops((16, 16)) == min(orders(spec)) < max(orders(spec))
    right_first, left_first = (orders(KroneckerSum(1, *sides)) for sides in (((8, 2), (2, 8)), ((2, 8), (8, 2))))
    assert right_first[0] < right_first[1]
    assert left_first[0] > left_first[1]


# Errors

SQUARE = (24, 24)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (KroneckerSum(1, (5, 6), (4, 4)), r"out = 5 \* 4 = 20 .*24x24 .*left="),
        (KroneckerSum(1, (6, 5), (4, 4)), r"in = 5 \* 4 = 20 .*24x24 .*left="),
        (KroneckerSum(12, (6, 4), (4, 6)), "rank 12 .*dense.*allowed: 1 to 11"),
        (KroneckerSum(5, (2, 2), (12, 12)), "rank 5 .*more terms.*allowed: 1 to 3"),
        (KroneckerSum(1, (24, 24), (1, 1)), "rank 1 .*no less.*keep"),
        (KroneckerSum(1, (9, 6), (4, 4)), "padding.*: 6 of 9 .*out = 24.*left="),
        (KroneckerSum(1, (6, 9), (4, 4)), "padding.*: 6 of 9 .*in = 24.*left="),
    ],
)
def test_shapes_and_ranks_that_do_not_fit(spec: KroneckerSum, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec.check(SQUARE)
    with pytest.raises(ModelError):
        FactorizedLinear(spec, SQUARE)


def test_what_errors_suggest_fits() -> None:
    with pytest.raises(ModelError) as caught:
        KroneckerSum(1, (9, 6), (4, 4)).check(SQUARE)
    left, right = factor_shapes(SQUARE)
    assert f"use left={left}, right={right}" in str(caught.value)
    KroneckerSum(11, left, right).check(SQUARE)


@pytest.mark.parametrize("sides", [(4,), (4, 4, 4), [4, 4], 4, None], ids=str)
@pytest.mark.parametrize("field", ["left", "right"])
@pytest.mark.usefixtures("no_shape_checks")
def test_sides_that_are_no_pair(field: str, sides: object) -> None:
    with pytest.raises(ModelError, match=f"^{field} must be .*two"):
        dataclasses.replace(KroneckerSum(1, (4, 4), (4, 4)), **{field: sides})


@pytest.mark.parametrize(
    "spec",
    [KroneckerSum(2, (9, 10), (10, 10)), KroneckerSum(2, (23, 4), (4, 25)), KroneckerSum(2, (4, 23), (25, 4))],
    ids=["gathered", "selected", "left first"],
)
def test_rows_that_do_not_exist(spec: KroneckerSum) -> None:
    shape = (89, 92)  # all of these sides are padded beyond row 88
    layer = FactorizedEmbedding(spec, shape)
    assert layer(torch.tensor([0, 88])).shape == (2, 92)
    assert layer(torch.tensor([], dtype=torch.long)).shape == (0, 92)
    with pytest.raises(IndexError):
        layer(torch.tensor([[3], [89]]))
    for missing in (-1, -200, 10_000):
        with pytest.raises(IndexError):
            layer(torch.tensor([3, missing]))


# Start from scratch

STARTS: dict[str, tuple[KroneckerSum, Shape]] = {
    "square": (KroneckerSum.of((256, 256), 12), (256, 256)),
    "tall": (KroneckerSum.of((512, 128), 12), (512, 128)),
    "wide": (KroneckerSum.of((128, 512), 12), (128, 512)),
    "padded": (KroneckerSum.of((251, 187), 8), (251, 187)),
    "much padded": (KroneckerSum(3, (16, 15), (16, 16)), (241, 229)),
    "embedding": (KroneckerSum.of((2003, 128), 16), (2003, 128)),
    "rank 1": (KroneckerSum.of((256, 256), 1), (256, 256)),
    "rank 1, padded": (KroneckerSum.of((251, 187), 1), (251, 187)),
    "low-rank, few terms": (KroneckerSum(3, (256, 1), (1, 256)), (256, 256)),
    "high rank": (KroneckerSum.of((256, 256), 127), (256, 256)),
    "right first": (KroneckerSum(4, (64, 4), (4, 64)), (256, 256)),
    "left first": (KroneckerSum(4, (4, 64), (64, 4)), (256, 256)),
    "gathered": (KroneckerSum(4, (16, 16), (16, 16)), (256, 256)),
}


def mean_squares(layer: Callable[[Tensor], Tensor], shape: Shape) -> tuple[float, float]:
    """Of the output for standard normal inputs, and of the input's gradient for standard normal output gradients."""
    x = torch.randn(2048, shape[1], requires_grad=True)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
    return output.square().mean().item(), gradient.square().mean().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", STARTS)
def test_signals_and_gradients_start_as_large_as_in_a_dense_layer(start: str, seed: int) -> None:
    torch.manual_seed(seed)
    spec, shape = STARTS[start]
    actual = mean_squares(FactorizedLinear(spec, shape), shape)
    dense = mean_squares(nn.Linear(shape[1], shape[0], bias=False), shape)
    assert actual == pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_new_weights_have_exactly_the_spread_asked_for(start: str, dtype: torch.dtype) -> None:
    spec, shape = STARTS[start]
    (m1, n1), (m2, n2) = spec.left, spec.right
    padded = m1 * m2, n1 * n2
    new = {name: t.zero_() for name, t in factors(spec, shape, dtype).items()}
    spec.initialize(new, std=0.02)
    new = {name: t.double() for name, t in new.items()}
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert spec.to_dense(padded, new).square().mean().sqrt().item() == pytest.approx(0.02, rel=rounding)
    assert spec.to_dense(shape, new).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.03)
    assert spec.to_dense(shape, new).mean().abs().item() < 0.005
    # Both factors learn at the same speed.
    left, right = (new[name].square().mean().item() for name in ("weight", "right"))
    assert left == pytest.approx(right, rel=0.42)  # worst of three seeds 0.32, times 1.3


def test_signals_keep_their_size_through_many_layers() -> None:
    """As large as through dense ones: no loss or growth that adds up."""
    shape, depth = (128, 128), 12
    gain = 3**0.5  # of a fresh `nn.Linear` keeps a third of the variance
    signal = torch.randn(512, shape[1])
    for _ in range(depth):
        signal = gain * FactorizedLinear(KroneckerSum.of(shape, 12), shape)(signal)
    assert 0.5 < signal.square().mean().item() < 2


def test_two_starts_differ() -> None:
    one, other = (FactorizedLinear(KroneckerSum.of((64, 64), 3), (64, 64)).to_dense() for _ in range(2))
    assert (one - other).norm() > 0.5 * one.norm()


# What it can express


def test_one_product_can_have_full_rank() -> None:
    """Where plain low-rank factors of as many parameters have rank 1."""
    spec, shape = KroneckerSum(1, (8, 8), (8, 8)), (64, 64)
    assert spec.parameters(shape) == LowRank(1).parameters(shape)
    assert torch.linalg.matrix_rank(spec.to_dense(shape, factors(spec, shape))) == 64


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_rearranged_matrix_has_the_rank_of_the_sum(rank: int) -> None:
    spec, shape = KroneckerSum(rank, (6, 4), (4, 5)), (24, 20)
    dense = spec.to_dense(shape, factors(spec, shape))
    assert torch.linalg.matrix_rank(rearranged(dense, spec.left, spec.right)) == rank


def stacked(rank: int, left: Shape, right: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that two stacked layers amount to, and those of both."""
    spec = KroneckerSum(rank, left, right)
    shape = left[0] * right[0], left[1] * right[1]
    first, second = (
        FactorizedLinear(spec, shape, dtype=torch.float64),
        FactorizedLinear(spec, shape, dtype=torch.float64),
    )
    with torch.no_grad():
        product = second(first(torch.eye(shape[1], dtype=torch.float64))).T
    torch.testing.assert_close(product, second.to_dense() @ first.to_dense())
    return product, first.to_dense().detach(), second.to_dense().detach()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [2, 3])
def test_two_layers_reach_what_one_cannot(rank: int, seed: int) -> None:
    """Theorem: stacked sums of `r` products of square factors amount to a sum of up to `r^2`, and not of `r`.

    `(sum_i A_i (x) B_i) (sum_j C_j (x) D_j) = sum_ij A_i C_j (x) B_i D_j`. By Eckart and Young, the distance of the
    rearranged matrix from all sums of `r` products is what remains of its singular values beyond `r`.
    """
    torch.manual_seed(seed)
    left, right = (4, 4), (6, 6)
    product, first, second = stacked(rank, left, right)
    values = torch.linalg.svdvals(rearranged(product, left, right))
    assert (values[: rank**2] > 1e-6 * values[0]).all()  # r^2 terms are needed,
    assert (values[rank**2 :] < 1e-12 * values[0]).all()  # and enough.
    assert values[rank:].norm() > 0.1 * values.norm()
    for one in (first, second):
        assert torch.linalg.svdvals(rearranged(one, left, right))[rank:].max() < 1e-12
    # As layers: one of rank r^2 is the product, and the best of rank r has the distance that the theorem says.
    terms = torch.linalg.svd(rearranged(product, left, right))
    weight = (terms.U[:, : rank**2] * terms.S[: rank**2]).view(*left, -1)
    other = terms.Vh[: rank**2].view(-1, *right).transpose(0, 1)
    wider = KroneckerSum(rank**2, left, right)
    torch.testing.assert_close(wider.to_dense((24, 24), {"weight": weight, "right": other}), product)
    best = KroneckerSum(rank, left, right).to_dense((24, 24), {"weight": weight[..., :rank], "right": other[:, :rank]})
    assert (best - product).norm().item() == pytest.approx(values[rank:].norm().item())


@pytest.mark.parametrize("seed", range(3))
def test_two_layers_of_default_shapes_reach_what_one_cannot(seed: int) -> None:
    torch.manual_seed(seed)
    left, right = factor_shapes((64, 64))
    assert left[0] != left[1]  # the products of factors have other shapes than the factors
    product, first, second = stacked(2, left, right)
    values = torch.linalg.svdvals(rearranged(product, left, right))
    assert values[2:].norm() > 0.1 * values.norm()
    for one in (first, second):
        assert torch.linalg.matrix_rank(rearranged(one, left, right)) == 2


def test_low_rank_layers_gain_nothing_from_stacking() -> None:
    """The contrast: two plain low-rank layers amount to one."""
    layers = [FactorizedLinear(LowRank(3), (24, 24), dtype=torch.float64).to_dense() for _ in range(2)]
    assert torch.linalg.matrix_rank(layers[1] @ layers[0]) == 3


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_inference_in_blocks_of_rows_changes_nothing(bias: bool) -> None:
    layer = FactorizedLinear(KroneckerSum(3, (13, 2), (8, 20)), (100, 37), bias=bias, dtype=torch.float64)
    x = torch.randn(3, ROWS_AT_ONCE // 2 + 1, 37, dtype=torch.float64)
    with torch.no_grad():
        product = layer(x)
    assert product.shape == (3, ROWS_AT_ONCE // 2 + 1, 100)
    torch.testing.assert_close(product, layer(x).detach(), rtol=0, atol=1e-12)
