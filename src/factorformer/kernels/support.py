"""Supports of sparse matrices, packed into bytes: which entries of each row are stored.

A row of `atoms` entries holds the same number of nonzeros as any other. Each row is stored as the cheapest of three
codes: a bitmap, or the positions in one byte or two. Bytes are the tensor's type in every case, so that files, devices
and process groups carry supports as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from factorformer.errors import ModelError

Code = Literal["bitmap", "uint8", "uint16"]

CODES: dict[Code, int] = {"bitmap": 0, "uint8": 1, "uint16": 2}
"""The numbers by which compiled kernels know the codes."""

LARGEST = 2**16
"""Atoms, at most: positions fit into two bytes."""


def code_of(atoms: int, nonzeros: int) -> Code:
    """The code that takes the fewest bytes a row; positions where a bitmap takes as many, for they read faster."""
    positions: Code = "uint8" if atoms <= 256 else "uint16"
    return positions if _bytes(positions, atoms, nonzeros) <= _bytes("bitmap", atoms, nonzeros) else "bitmap"


def row_bytes(atoms: int, nonzeros: int) -> int:
    """Stored bytes of the support of one row.

    >>> row_bytes(288, 56), row_bytes(256, 8), row_bytes(1024, 8)
    (36, 8, 16)
    """
    return _bytes(code_of(atoms, nonzeros), atoms, nonzeros)


def _bytes(code: Code, atoms: int, nonzeros: int) -> int:
    return {"bitmap": -(-atoms // 8), "uint8": nonzeros, "uint16": 2 * nonzeros}[code]


def pack(positions: Int[Tensor, "rows nonzeros"], atoms: int) -> UInt8[Tensor, "rows bytes"]:
    """Encode ascending positions of the nonzeros of each row."""
    rows, nonzeros = positions.shape
    code = code_of(atoms, nonzeros)
    if code == "bitmap":
        mask = torch.zeros(rows, -(-atoms // 8) * 8, dtype=torch.bool, device=positions.device)
        bits = mask.scatter_(1, positions.long(), True).view(rows, -1, 8)
        return (bits * _bits(positions.device)).sum(2, dtype=torch.uint8)
    offsets = positions.long()
    if code == "uint8":
        return offsets.to(torch.uint8)
    return torch.stack((offsets & 255, offsets >> 8), dim=2).to(torch.uint8).flatten(1)  # low byte first


def unpack(support: UInt8[Tensor, "rows bytes"], atoms: int, nonzeros: int) -> Int[Tensor, "rows nonzeros"]:
    """Ascending positions of the nonzeros of each row, int64."""
    code = code_of(atoms, nonzeros)
    if code == "bitmap":
        return unpack_bitmap(support, atoms).nonzero()[:, 1].view(len(support), nonzeros)
    offsets = support.long()
    if code == "uint16":
        pairs = offsets.view(len(support), nonzeros, 2)
        offsets = pairs[..., 0] + 256 * pairs[..., 1]
    return offsets


def unpack_bitmap(support: UInt8[Tensor, "rows bytes"], atoms: int) -> Bool[Tensor, "rows atoms"]:
    """The bits of a bitmap, one each."""
    return (support[:, :, None] & _bits(support.device)).bool().flatten(1)[:, :atoms]


def _bits(device: torch.device) -> UInt8[Tensor, " 8"]:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def check(support: UInt8[Tensor, "rows bytes"], atoms: int, nonzeros: int) -> None:
    """Raise `ModelError` unless each row names exactly `nonzeros` positions below `atoms`, in order."""
    if code_of(atoms, nonzeros) == "bitmap":
        padded = unpack_bitmap(support, 8 * support.shape[1])
        if padded[:, atoms:].any():
            raise ModelError(f"a row of the sparse support marks positions beyond its {atoms} atoms")
        counts = padded[:, :atoms].sum(1)
        wrong = counts != nonzeros
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ModelError(f"row {row} of the sparse support marks {int(counts[row])} positions, not {nonzeros}")
        return
    positions = unpack(support, atoms, nonzeros)
    if (positions >= atoms).any():
        raise ModelError(f"a row of the sparse support names a position of {atoms} or more among {atoms} atoms")
    if (positions.diff(dim=1) <= 0).any():
        raise ModelError("the positions of a row of the sparse support do not ascend")
