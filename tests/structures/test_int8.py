"""Codes and scales: what rounding loses, and that training rounds to what is stored in the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factorformer.structures import LowRank, TensorSpec, int8

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (7, 5), (4, 3, 6), (0, 4)]


def draw(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype)


def restored(tensor: Tensor) -> Tensor:
    return int8.floats(int8.quantize({"weight": tensor}))["weight"]


def scale_of(tensor: Tensor) -> Tensor:
    scale = int8.quantize({"weight": tensor})["weight_scale"]
    return scale.view(-1, *[1] * (tensor.dim() - 1)).double()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_stored(size: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = int8.quantize({"weight": draw(size, dtype)})
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "weight": (size, torch.int8),
        "weight_scale": (size[:1], dtype),
    }
    assert int8.is_stored(stored)
    assert restored(draw(size, dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_value_is_off_by_half_a_scale_at_most(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = draw(size, dtype)
    # In a narrow type, the product of code and scale is rounded once more.
    slack = 0.5 * torch.finfo(dtype).eps * tensor.double().abs()
    assert ((restored(tensor).double() - tensor.double()).abs() <= 0.501 * scale_of(tensor) + slack).all()


@given(st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
def test_rows_of_any_magnitude(width: int, exponent: float, seed: int) -> None:
    tensor = 10**exponent * torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    codes = int8.quantize({"weight": tensor})["weight"]
    assert (codes.abs().amax(1) == 127).all()
    assert ((restored(tensor) - tensor).abs() <= 0.501 * scale_of(tensor)).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_row_does_not_touch_another(dtype: torch.dtype) -> None:
    """In float16, 1e-3 has a scale that is no normal number any more."""
    tensor = draw((5, 8), dtype)
    factors = torch.tensor([1.0, 1e-3, 0.0, 1e3, 1.0], dtype=torch.float64)
    spread = (tensor * factors[:, None]).to(dtype)
    errors = (restored(spread).double() - spread.double()).norm(dim=1) / spread.double().norm(dim=1)
    assert (errors[[0, 1, 3, 4]] < 0.02).all()
    assert torch.equal(restored(spread)[2], torch.zeros(8, dtype=dtype))
    assert torch.equal(restored(spread)[4], restored(tensor)[4])


def test_no_row_can_be_too_small_or_too_large() -> None:
    for dtype in TYPES:
        limits = torch.finfo(dtype)
        rows = [[limits.max / 2, -limits.max / 2], [limits.tiny, 0], [limits.tiny / 4, 0]]
        tensor = torch.tensor(rows, dtype=dtype)
        assert torch.isfinite(restored(tensor)).all()
        assert torch.isfinite(int8.rounded({"weight": tensor})["weight"]).all()
        torch.testing.assert_close(restored(tensor)[0], tensor[0], rtol=0.01, atol=0)


def test_integers_are_left_alone() -> None:
    support = torch.randint(0, 255, (4, 3), dtype=torch.uint8)
    factors = {"weight": draw((4, 3)), "support": support}
    stored = int8.quantize(factors)
    assert stored["support"] is support
    assert int8.floats(stored)["support"] is support
    assert int8.rounded(factors)["support"] is support
    assert list(int8.floats(stored)) == list(factors)
    assert int8.floats(factors) is factors


def test_names_and_sizes_are_those_of_the_description() -> None:
    tensors = {"weight": TensorSpec((4, 3)), "support": TensorSpec((4, 2), torch.uint8)}
    stored = int8.quantize({"weight": draw((4, 3)), "support": torch.zeros(4, 2, dtype=torch.uint8)})
    described = int8.stored(tensors)
    assert {name: t.size for name, t in described.items()} == {name: tuple(t.shape) for name, t in stored.items()}
    assert described["weight"].dtype == torch.int8
    assert described["weight_scale"].dtype is None
    assert sum(t.bytes(torch.float32) for t in described.values()) == sum(t.bytes(torch.int8) for t in tensors.values())
    assert LowRank(3).bytes((4, 5), torch.int8) == (4 * 3 + 3 * 5) + 4 * (4 + 3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_rounds_to_what_is_stored(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = draw(size, dtype)
    assert torch.equal(int8.rounded({"weight": tensor})["weight"], restored(tensor))


def test_rounding_twice_is_rounding_once() -> None:
    once = restored(draw((6, 20)))
    torch.testing.assert_close(restored(once), once, rtol=1e-6, atol=0)


def test_gradients_pass_through_the_rounding() -> None:
    tensor, target = draw((6, 4)).requires_grad_(), draw((6, 4))
    (int8.rounded({"weight": tensor})["weight"] * target).sum().backward()
    assert torch.equal(tensor.grad, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_of_a_factor(quantized: bool) -> None:
    factors = {"weight": draw((6, 4))}
    factors = int8.quantize(factors) if quantized else factors
    index = torch.tensor([[3, 0], [5, 3]])
    assert torch.equal(int8.look_up(factors, "weight", index), int8.floats(factors)["weight"][index])


@pytest.mark.parametrize("columns", [False, True])
def test_a_factor_to_multiply_by(columns: bool) -> None:
    stored = int8.quantize({"weight": draw((6, 4))})
    values = int8.floats(stored)["weight"]
    dense = int8.dense(stored, "weight", columns=columns)
    assert torch.equal(dense.values(torch.float32), values.T if columns else values)


def test_values_in_another_type() -> None:
    stored = int8.quantize({"weight": draw((6, 4))})
    low = int8.floats(stored, torch.bfloat16)["weight"]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), int8.floats(stored)["weight"], rtol=0.02, atol=0)
