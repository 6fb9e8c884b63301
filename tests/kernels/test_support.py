"""Supports survive packing bit for bit, in the fewest bytes, and nothing that they cannot mean passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factorformer.errors import ModelError
from factorformer.kernels import support


def positions(rows: int, atoms: int, nonzeros: int, blocks: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ascending positions, as many in each block."""
    generator = torch.Generator().manual_seed(seed)
    size = atoms // blocks
    chosen = torch.rand(rows, blocks, size, generator=generator).topk(nonzeros // blocks, dim=2).indices.sort(2).values
    return (chosen + size * torch.arange(blocks)[:, None]).flatten(1)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 90), st.data())
def test_packing_is_undone_by_unpacking(rows: int, blocks: int, size: int, data: st.DataObject) -> None:
    inside = data.draw(st.integers(1, size))
    atoms, nonzeros = blocks * size, blocks * inside
    expected = positions(rows, atoms, nonzeros, blocks, seed=rows + size)
    packed = support.pack(expected, atoms, blocks)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, support.row_bytes(atoms, nonzeros, blocks))
    assert torch.equal(support.unpack(packed, atoms, nonzeros, blocks), expected)
    support.check(packed, atoms, nonzeros, blocks)


@pytest.mark.parametrize(
    ("atoms", "nonzeros", "blocks", "code", "size"),
    [
        (288, 56, 1, "bitmap", 36),
        (256, 8, 1, "uint8", 8),
        (256, 32, 1, "uint8", 32),  # a bitmap would take as many bytes
        (256, 33, 1, "bitmap", 32),
        (257, 8, 1, "uint16", 16),
        (1024, 8, 4, "uint8", 8),
        (65536, 2, 1, "uint16", 4),
        (20, 6, 1, "bitmap", 3),
    ],
)
def test_the_cheapest_code_is_taken(atoms: int, nonzeros: int, blocks: int, code: str, size: int) -> None:
    assert support.code_of(atoms, nonzeros, blocks) == code
    assert support.row_bytes(atoms, nonzeros, blocks) == size
    expected = positions(5, atoms, nonzeros, blocks)
    assert torch.equal(support.unpack(support.pack(expected, atoms, blocks), atoms, nonzeros, blocks), expected)


def test_the_last_position_of_two_bytes() -> None:
    expected = torch.tensor([[0, 65535], [256, 257]])
    assert torch.equal(support.unpack(support.pack(expected, 65536), 65536, 2), expected)


@pytest.mark.parametrize(
    ("atoms", "nonzeros", "blocks", "value", "message"),
    [
        (20, 6, 1, 255, r"marks positions beyond its 20 atoms"),
        (24, 6, 1, 255, r"row 2 of the sparse support marks \[24\] positions, but holds 6 in each of 1 blocks"),
        (24, 6, 3, 0, r"marks \[0, 0, 0\] positions, but holds 2 in each of 3 blocks"),
        (40, 3, 1, 40, "a position of 40 or more in a block of 40 atoms"),
        (40, 3, 1, 7, "do not ascend"),
        (300, 6, 1, 255, "a position of 300 or more in a block of 300 atoms"),
        (300, 6, 1, 0, "do not ascend"),
        (600, 6, 3, 201, "a position of 200 or more in a block of 200 atoms"),
    ],
)
def test_what_a_support_cannot_mean(atoms: int, nonzeros: int, blocks: int, value: int, message: str) -> None:
    packed = support.pack(positions(5, atoms, nonzeros, blocks), atoms, blocks)
    packed[2] = value
    with pytest.raises(ModelError, match=message):
        support.check(packed, atoms, nonzeros, blocks)
