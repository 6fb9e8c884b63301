"""Supports of sparse matrices, packed into bytes: which entries of each row are stored.

A row of `atoms` entries is cut into `blocks` equal blocks, and holds the same number of nonzeros in each (N:M
sparsity; one block is unstructured). Each row is stored as the cheapest of three codes: a bitmap, or the positions
inside of the blocks in one byte or two. Bytes are the tensor's type in every case, so that files, devices and process
groups carry supports as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from factorformer.errors import ModelError

Code = Literal["bitmap", "uint8", "uint16"]

LARGEST = 2**16
"""Positions inside of a block fit into two bytes."""


def code_of(atoms: int, nonzeros: int, blocks: int) -> Code:
    """The code that takes the fewest bytes a row; positions where a bitmap takes as many, for they read faster."""
    positions: Code = "uint8" if atoms // blocks <= 256 else "uint16"
    return positions if _bytes(positions, atoms, nonzeros) <= _bytes("bitmap", atoms, nonzeros) else "bitmap"


def row_bytes(atoms: int, nonzeros: int, blocks: int) -> int:
    """Stored bytes of the support of one row.

    >>> row_bytes(288, 56, 1), row_bytes(256, 8, 1), row_bytes(1024, 8, 1), row_bytes(1024, 8, 4)
    (36, 8, 16, 8)
    """
    return _bytes(code_of(atoms, nonzeros, blocks), atoms, nonzeros)


def _bytes(code: Code, atoms: int, nonzeros: int) -> int:
    return {"bitmap": -(-atoms // 8), "uint8": nonzeros, "uint16": 2 * nonzeros}[code]


def pack(positions: Int[Tensor, "rows nonzeros"], atoms: int, blocks: int = 1) -> UInt8[Tensor, "rows bytes"]:
    """Encode ascending positions of the nonzeros of each row."""
    rows, nonzeros = positions.shape
    code = code_of(atoms, nonzeros, blocks)
    if code == "bitmap":
        mask = torch.zeros(rows, -(-atoms // 8) * 8, dtype=torch.bool, device=positions.device)
        bits = mask.scatter_(1, positions.long(), True).view(rows, -1, 8)
        return (bits * _bits(positions.device)).sum(2, dtype=torch.uint8)
    offsets = positions.long() % (atoms // blocks)
    if code == "uint8":
        return offsets.to(torch.uint8)
    return torch.stack((offsets & 255, offsets >> 8), dim=2).to(torch.uint8).flatten(1)  # low byte first


def unpack(
    support: UInt8[Tensor, "rows bytes"], atoms: int, nonzeros: int, blocks: int = 1
) -> Int[Tensor, "rows nonzeros"]:
    """Ascending positions of the nonzeros of each row, int64."""
    code = code_of(atoms, nonzeros, blocks)
    if code == "bitmap":
        return unpack_bitmap(support, atoms).nonzero()[:, 1].view(len(support), nonzeros)
    offsets = support.long()
    if code == "uint16":
        pairs = offsets.view(len(support), nonzeros, 2)
        offsets = pairs[..., 0] + 256 * pairs[..., 1]
    if blocks > 1:
        starts = torch.arange(blocks, device=support.device) * (atoms // blocks)
        offsets = (offsets.view(len(support), blocks, -1) + starts[:, None]).flatten(1)
    return offsets


def unpack_bitmap(support: UInt8[Tensor, "rows bytes"], atoms: int) -> Bool[Tensor, "rows atoms"]:
    """The bits of a bitmap, one each."""
    return (support[:, :, None] & _bits(support.device)).bool().flatten(1)[:, :atoms]


def _bits(device: torch.device) -> UInt8[Tensor, " 8"]:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def check(support: UInt8[Tensor, "rows bytes"], atoms: int, nonzeros: int, blocks: int = 1) -> None:
    """Raise `ModelError` unless each row names exactly `nonzeros` positions, in order, each inside of its block."""
    if code_of(atoms, nonzeros, blocks) == "bitmap":
        padded = unpack_bitmap(support, 8 * support.shape[1])
        if padded[:, atoms:].any():
            raise ModelError(f"a row of the sparse support marks positions beyond its {atoms} atoms")
        counts = padded[:, :atoms].reshape(len(support), blocks, -1).sum(2)
        wrong = (counts != nonzeros // blocks).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ModelError(
                f"row {row} of the sparse support marks {counts[row].tolist()} positions, but holds "
                f"{nonzeros // blocks} in each of {blocks} blocks"
            )
        return
    size = atoms // blocks
    positions = unpack(support, atoms, nonzeros, blocks).view(len(support), blocks, -1)
    starts = torch.arange(blocks, device=support.device)[:, None] * size
    if ((positions - starts) >= size).any():
        raise ModelError(f"a row of the sparse support names a position of {size} or more in a block of {size} atoms")
    if (positions.diff(dim=2) <= 0).any():
        raise ModelError("the positions of a row of the sparse support do not ascend")
