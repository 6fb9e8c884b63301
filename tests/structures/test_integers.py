"""Codes and scales: what rounding loses, and that training rounds to what is stored in the end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factorformer.kernels.cpu import GROUP
from factorformer.structures import LowRank, TensorSpec, integers

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (7, 5), (4, 3, 6), (0, 4)]


def draw(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype)


def restored(tensor: Tensor) -> Tensor:
    return integers.floats(integers.quantize({"weight": tensor}, 8))["weight"]


def scale_of(tensor: Tensor) -> Tensor:
    scale = integers.quantize({"weight": tensor}, 8)["weight_scale"]
    return scale.view(-1, *[1] * (tensor.dim() - 1)).double()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_stored(size: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = integers.quantize({"weight": draw(size, dtype)}, 8)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "weight": (size, torch.int8),
        "weight_scale": (size[:1], dtype),
    }
    assert integers.is_stored(stored)
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
    codes = integers.quantize({"weight": tensor}, 8)["weight"]
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
        assert torch.isfinite(integers.rounded(tensor, 8)).all()
        torch.testing.assert_close(restored(tensor)[0], tensor[0], rtol=0.01, atol=0)


def test_integers_are_left_alone() -> None:
    support = torch.randint(0, 255, (4, 3), dtype=torch.uint8)
    factors = {"weight": draw((4, 3)), "support": support}
    stored = integers.quantize(factors, 8)
    assert stored["support"] is support
    assert integers.floats(stored)["support"] is support
    assert integers.Rounded(factors, 8)["support"] is support
    assert list(integers.floats(stored)) == list(factors)
    assert integers.floats(factors) is factors


def test_names_and_sizes_are_those_of_the_description() -> None:
    tensors = {"weight": TensorSpec((4, 3)), "support": TensorSpec((4, 2), torch.uint8)}
    stored = integers.quantize({"weight": draw((4, 3)), "support": torch.zeros(4, 2, dtype=torch.uint8)}, 8)
    described = integers.stored(tensors, 8)
    assert {name: t.size for name, t in described.items()} == {name: tuple(t.shape) for name, t in stored.items()}
    assert described["weight"].dtype == torch.int8
    assert described["weight_scale"].dtype is None
    assert sum(t.bytes(torch.float32) for t in described.values()) == sum(t.bytes(torch.int8) for t in tensors.values())
    assert LowRank(3).bytes((4, 5), torch.int8) == (4 * 3 + 3 * 5) + 4 * (4 + 3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_rounds_to_what_is_stored(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = draw(size, dtype)
    assert torch.equal(integers.rounded(tensor, 8), restored(tensor))


def test_rounding_twice_is_rounding_once() -> None:
    once = restored(draw((6, 20)))
    torch.testing.assert_close(restored(once), once, rtol=1e-6, atol=0)


def test_gradients_pass_through_the_rounding() -> None:
    tensor, target = draw((6, 4)).requires_grad_(), draw((6, 4))
    (integers.rounded(tensor, 8) * target).sum().backward()
    assert torch.equal(tensor.grad, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_of_a_factor(quantized: bool) -> None:
    factors = {"weight": draw((6, 4))}
    factors = integers.quantize(factors, 8) if quantized else factors
    index = torch.tensor([[3, 0], [5, 3]])
    assert torch.equal(integers.look_up(factors, "weight", index), integers.floats(factors)["weight"][index])


@pytest.mark.parametrize("columns", [False, True])
def test_a_factor_to_multiply_by(columns: bool) -> None:
    stored = integers.quantize({"weight": draw((6, 4))}, 8)
    values = integers.floats(stored)["weight"]
    dense = integers.dense(stored, "weight", columns=columns)
    assert torch.equal(dense.values(torch.float32), values.T if columns else values)


def test_values_in_another_type() -> None:
    stored = integers.quantize({"weight": draw((6, 4))}, 8)
    low = integers.floats(stored, torch.bfloat16)["weight"]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), integers.floats(stored)["weight"], rtol=0.02, atol=0)


# In few bits

FEW: list[integers.Bits] = [4, 3]


def narrow(tensor: Tensor, bits: integers.Bits) -> Tensor:
    spec = {"weight": TensorSpec(tuple(tensor.shape))}
    return integers.restored(integers.quantize({"weight": tensor}, bits), spec, bits)["weight"]


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (3, 32), (3, 33), (5, 1, 70)], ids=str)
def test_values_share_bytes(size: tuple[int, ...], dtype: torch.dtype, bits: integers.Bits) -> None:
    tensor, spec = draw(size, dtype), TensorSpec(size)
    stored = integers.quantize({"weight": tensor}, bits)
    described = integers.stored({"weight": spec}, bits)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == {
        n: (t.size, t.dtype or dtype) for n, t in described.items()
    }
    assert sum(t.numel() * t.element_size() for t in stored.values()) == spec.bytes(integers.TYPES[bits], dtype)
    again = narrow(tensor, bits)
    assert again.shape == tensor.shape
    assert again.dtype == dtype
    multiplied = integers.in_int8(stored, {"weight": spec}, bits)
    assert {n: (tuple(t.shape), t.dtype) for n, t in multiplied.items()} == {
        "weight": (size, torch.int8),
        "weight_scale": (size[:1], dtype),
    }
    assert torch.equal(integers.rounded(tensor, bits), integers.floats(multiplied)["weight"])
    torch.testing.assert_close(narrow(again, bits), again, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_the_first_value_has_the_lowest_bits() -> None:
    """As files say that were written before."""
    codes = torch.tensor([[1, -1, 8, -7, 3]])
    assert integers.quantize({"weight": integers.levels_of(codes, 4, torch.float32)}, 4)["weight"].view(
        torch.uint8
    ).tolist() == [[0xF1, 0x98, 0x03]]
    codes = torch.tensor([[1, -1, 4, -3, 0, 2, -2, 1, -3]])
    word = sum((code & 7) << 3 * place for place, code in enumerate(codes[0, :8].tolist()))
    expected = [word & 255, word >> 8 & 255, word >> 16, 0b101]
    assert integers.quantize({"weight": integers.levels_of(codes, 3, torch.float32)}, 3)["weight"].view(
        torch.uint8
    ).tolist() == [expected]


@pytest.mark.parametrize("bits", FEW)
def test_a_group_has_the_sign_of_its_largest_value(bits: integers.Bits) -> None:
    """Opposite of which no level lies."""
    tensor = torch.tensor(integers.LEVELS[bits])
    for values in (tensor, -tensor, 1000 * tensor):
        assert torch.equal(narrow(values[None], bits)[0], values)
    mirrored = torch.cat([tensor, -tensor])[None]
    assert float((narrow(mirrored, bits) - mirrored).abs().max()) == pytest.approx(1 + integers.LEVELS[bits][0])


@pytest.mark.parametrize(("bits", "decibels"), [(4, 22.3), (3, 16.2)])
def test_levels_lie_where_values_do(bits: integers.Bits, decibels: float) -> None:
    """Of normally distributed values, whose groups have the exponents that suit them best."""
    values = torch.randn(20_000, GROUP, generator=torch.Generator().manual_seed(0))
    least = values.new_full((len(values),), torch.inf)
    for cut in range(8):
        reach = integers.extremes(values[None])[0] * 2 ** (-cut / integers.STEPS)
        read = integers.levels_of(integers.nearest(values / reach[:, None], bits), bits, torch.float32)
        least = least.minimum((values - read * reach[:, None]).square().mean(1))
    assert -10 * math.log10(float(least.mean())) == pytest.approx(decibels, abs=0.2)


@pytest.mark.parametrize("bits", FEW)
@given(st.integers(1, 80), st.floats(-30, 30), st.floats(-3, 0), st.integers(0, 1000))
def test_a_value_is_off_by_a_part_of_the_largest_of_its_group(
    bits: integers.Bits, width: int, exponent: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // 32)
    scales = 10 ** (exponent + spread * torch.rand(3, groups, generator=generator)).repeat_interleave(32, 1)[:, :width]
    tensor = scales * torch.randn(3, width, generator=generator)
    error, levels = (narrow(tensor, bits) - tensor).abs(), torch.tensor(integers.LEVELS[bits])
    # On the side of the largest value half of the widest gap, of a reach that may be too large; opposite of it nothing
    # lies beyond the lowest level.
    beside, opposite = float(levels.diff().max()) / 2 * 2 ** (1 / integers.STEPS), 1 + float(levels[0])
    for first in range(0, width, 32):
        part = tensor[:, first : first + 32]
        largest = integers.extremes(part[:, None])
        most = torch.where(part.sign() == largest.sign(), beside, opposite) * largest.abs()
        assert (error[:, first : first + 32] <= 1.001 * most).all()


def test_a_large_value_costs_its_neighbours_alone() -> None:
    tensor = draw((4, 128))
    tensor[0, 3] = 1000.0
    error = (narrow(tensor, 4) - tensor).square().mean(1)
    assert (narrow(tensor, 4)[0, 32:] - tensor[0, 32:]).square().mean() < 2 * error[1:].mean()
    assert narrow(tensor, 4)[0, 3] == pytest.approx(1000, rel=1e-3)
    # Products read int8 with a scale for each row, and training sees what that costs.
    assert (integers.rounded(tensor, 4)[0, 32:] == 0).all()
    torch.testing.assert_close(integers.rounded(tensor, 4)[1:], narrow(tensor, 4)[1:], rtol=0, atol=0.03)


@pytest.mark.parametrize("bits", FEW)
def test_zeros_stay_zeros(bits: integers.Bits) -> None:
    tensor = torch.zeros(3, 70)
    assert torch.equal(narrow(tensor, bits), tensor)
    tensor[1] = draw((70,))
    assert torch.equal(narrow(tensor, bits)[[0, 2]], tensor[[0, 2]])


@pytest.mark.parametrize("bits", [8, *FEW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_usual_types_and_devices_change_nothing(dtype: torch.dtype, bits: integers.Bits) -> None:
    tensor = draw((6, 40))
    expected = integers.rounded(tensor, bits)
    integers._tables.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert torch.equal(integers.rounded(tensor, bits), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bits", [8, *FEW])
def test_what_is_rounded_may_be_changed_in_place(bits: integers.Bits) -> None:
    """As the outputs of embeddings are in some models."""
    tensor = draw((6, 40)).requires_grad_()
    rows = integers.rounded(tensor, bits)
    rows += 1
    rows.sum().backward()
    assert torch.equal(tensor.grad, torch.ones(6, 40))  # type: ignore[arg-type]


def test_groups_beside_which_others_are_huge_have_few_levels_left() -> None:
    for largest in (1.0, 0.9, -0.9, 0.5, -0.5):  # of what the last exponent reaches
        part = draw((1, 32)) / 4
        part = part.clamp(-0.4, 0.4).scatter(1, torch.tensor([[7]]), largest)
        tensor = torch.cat([torch.full((1, 32), 2.0**20), part * 2 ** (20 - integers.LAST / integers.STEPS)])
        stored = integers.quantize({"weight": tensor}, 4)
        assert stored["weight_exponents"].flatten().tolist() == [0, integers.LAST]
        found = narrow(tensor, 4)
        assert float((found[1] - tensor[1]).norm() / tensor[1].norm()) < 0.2
        assert torch.equal(narrow(found, 4), found)
        settled = integers.settled(found, 4)
        for change in (0.99, 1.0, 1.01):
            moved = torch.cat([settled[:1], change * settled[1:]])
            assert torch.equal(narrow(moved, 4)[1], found[1])
    tensor[1] *= 2**-6
    assert torch.equal(narrow(tensor, 4)[1], torch.zeros(32))


@pytest.mark.parametrize("bits", FEW)
def test_rows_at_levels(bits: integers.Bits) -> None:
    values, reach = draw((5, 70)), torch.rand(5, 3) + 0.5
    found = integers.at_levels(values, reach, bits)
    grouped = integers.in_groups(values)
    expected = integers.levels_of(integers.nearest(grouped / reach[:, :, None], bits), bits, torch.float32)
    assert torch.equal(found, (expected * reach[:, :, None]).flatten(1)[:, :70])
    torch.testing.assert_close(integers.at_levels(values.double(), reach.double(), bits).float(), found)
    assert torch.equal(integers.at_levels(values, reach.double(), bits), found)


@pytest.mark.parametrize("bits", FEW)
def test_gradients_pass_in_few_bits_too(bits: integers.Bits) -> None:
    tensor, target = draw((6, 40)).requires_grad_(), draw((6, 40))
    (integers.rounded(tensor, bits) * target).sum().backward()
    assert torch.equal(tensor.grad, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [8, *FEW])
def test_rows_that_are_looked_up_are_rounded_alone(bits: integers.Bits) -> None:
    factors = {"weight": draw((50, 40)), "right": draw((40, 6))}
    index, lazy = torch.tensor([[3, 0], [5, 3]]), integers.Rounded(factors, bits)
    found = integers.look_up(lazy, "weight", index)
    assert torch.equal(found, integers.rounded(factors["weight"], bits)[index])
    assert lazy["right"] is lazy["right"]
    assert list(lazy) == ["weight", "right"]
    assert "weight_scale" not in lazy
