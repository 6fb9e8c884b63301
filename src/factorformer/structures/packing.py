"""Codes of few bits, several of which share a byte."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(rows, values)` as bytes `(rows, bytes)`, of which each value takes the lowest bits that are left.

    Bytes are int8 as well: some architectures look whether a weight is, before they cast activations to its type.
    """
    fields, count = _word(bits)
    words = _joined(codes.to(torch.int8), fields, bits)
    parts = [(words >> 8 * place & 255).to(torch.uint8) for place in range(count)]
    packed = torch.stack(parts, 2).flatten(1)[:, : -(-codes.shape[1] * bits // 8)]
    return packed.contiguous().view(torch.int8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes `(rows, width)` that `pack` made bytes of, int8; that of the largest level comes out negative."""
    fields, count = _word(bits)
    words, half = _joined(packed, count, 8), 2 ** (bits - 1)  # from which on codes are negative
    codes = [(((words >> bits * place & (2 * half - 1)) ^ half) - half).to(torch.int8) for place in range(fields)]
    return torch.stack(codes, 2).flatten(1)[:, :width]


def _word(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and these."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _joined(fields: Tensor, count: int, bits: int) -> Tensor:
    """Integers `(rows, fields)` as words `(rows, words)`, so many bits of so many fields in each, the first lowest."""
    columns = F.pad(fields, (0, -fields.shape[1] % count)).unflatten(1, (-1, count)).unbind(2)
    words = torch.zeros_like(columns[0], dtype=torch.int32)
    for place, column in enumerate(columns):
        words |= (column.to(torch.int32) & (2**bits - 1)) << bits * place
    return words
