"""Supports survive packing bit for bit, in the fewest bytes, and nothing that they cannot mean passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factorformer.errors import ModelError
from factorformer.kernels import support


def positions(rows: int, atoms: int, nonzeros: int, seed: int = 0) -> torch.Tensor:
    """Random ascending positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, atoms, generator=generator).topk(nonzeros, dim=1).indices.sort(1).values


@given(st.integers(1, 9), st.integers(1, 540), st.data())
def test_packing_is_undone_by_unpacking(rows: int, atoms: int, data: st.DataObject) -> None:
    nonzeros = data.draw(st.integers(1, atoms))
    expected = positions(rows, atoms, nonzeros, seed=rows + atoms)
    packed = support.pack(expected, atoms)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, support.row_bytes(atoms, nonzeros))
    assert torch.equal(support.unpack(packed, atoms, nonzeros), expected)
    support.check(packed, atoms, nonzeros)


def test_the_cheapest_code_is_taken() -> None:
    for atoms, nonzeros, code, size in (
        (288, 56, "bitmap", 36),
        (256, 8, "uint8", 8),
        (256, 32, "uint8", 32),  # a bitmap would take as many bytes
        (256, 33, "bitmap", 32),
        (257, 8, "uint16", 16),
        (65536, 2, "uint16", 4),
        (20, 6, "bitmap", 3),
    ):
        assert support.code_of(atoms, nonzeros) == code
        assert support.row_bytes(atoms, nonzeros) == size
        expected = positions(5, atoms, nonzeros)
        assert torch.equal(support.unpack(support.pack(expected, atoms), atoms, nonzeros), expected)


def test_the_last_position_of_two_bytes() -> None:
    expected = torch.tensor([[0, 65535], [256, 257]])
    assert torch.equal(support.unpack(support.pack(expected, 65536), 65536, 2), expected)


@pytest.mark.parametrize(
    ("atoms", "nonzeros", "value", "message"),
    [
        (20, 6, 255, "beyond its 20 atoms"),
        (24, 6, 255, "row 2 .* 24 positions, not 6"),
        (24, 6, 0, "row 2 .* 0 positions, not 6"),
        (40, 3, 40, "position of 40"),
        (40, 3, 7, "ascend"),
        (300, 6, 255, "position of 300"),
        (300, 6, 0, "ascend"),
    ],
)
def test_what_a_support_cannot_mean(atoms: int, nonzeros: int, value: int, message: str) -> None:
    packed = support.pack(positions(5, atoms, nonzeros), atoms)
    packed[2] = value
    with pytest.raises(ModelError, match=message):
        support.check(packed, atoms, nonzeros)
