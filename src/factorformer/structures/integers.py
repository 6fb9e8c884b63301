"""Factors stored in integers of 8, 4 or 3 bits, with scales.

In 8 bits `value = code * scale`, with codes from -127 to 127 and a scale for each row, which is everything under one
index of the factor's first dimension.

In 4 bits `value = code * scale * 2^(-exponent / STEPS)`, with codes from -7 to 7, an exponent of 8 bits for each group
of `GROUP` values of a row, and one scale: a single scale for a row would be that of its largest value, beside which
most others are nothing. Two codes take a byte. In 3 bits codes are from -3 to 3, and eight take three bytes. Products
read such factors as int8 with a scale for each row, which they are turned into once; training rounds twice as well.

All are symmetric. Scales are values of their own, named after the factor, and so are exponents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from factorformer.kernels import Dense
from factorformer.structures.base import GROUP, Factors, TensorSpec, groups, packed

Bits = Literal[8, 4, 3]
"""Of a code."""

TYPES: dict[Bits, torch.dtype] = {bits: getattr(torch, f"int{bits}") for bits in get_args(Bits)}
"""What values of so many bits are called."""

SCALE, EXPONENTS = "_scale", "_exponents"
"""End the names of the scales of a factor, and of its exponents."""

ENDS: dict[Bits, tuple[str, ...]] = {
    bits: ("", SCALE) if bits == 8 else ("", EXPONENTS, SCALE) for bits in get_args(Bits)
}
"""Of the names of all that is stored of a factor."""

LARGEST: dict[Bits, int] = {8: 127, 4: 7, 3: 3}
"""Codes."""

STEPS = 16
"""From a scale to half of it: those of groups can differ by a factor of 2^16, and are up to 4 % larger than need be."""

MIDDLE = 2 ** (-0.5 / STEPS)
"""Of what a code of `LARGEST` stands for: the middle of the largest values that have the same steps."""

SLACK = 24
"""Units in the last place by which an exponent may be too large, so that what is rounded already has the exponents that
it was given, whatever a narrow type loses."""

LOGARITHM = 1e-3
"""As SLACK, for what logarithms lose in float32: an exponent of so much more is 0.004 % of a value."""


def stored(tensors: Mapping[str, TensorSpec], bits: Bits) -> dict[str, TensorSpec]:
    """What takes the place of a structure's tensors: codes and scales of all values; integers stay as they are."""
    result: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        if tensor.dtype is not None:
            result[name] = tensor
        elif bits == 8:
            result |= {name: TensorSpec(tensor.size, torch.int8), name + SCALE: TensorSpec(tensor.size[:1])}
        else:
            result[name] = TensorSpec(packed(tensor.size, bits), torch.int8)
            result[name + EXPONENTS] = TensorSpec(groups(tensor.size), torch.uint8)
            result[name + SCALE] = TensorSpec((1,))
    return result


def is_stored(factors: Factors) -> bool:
    """Whether factors are codes and scales."""
    return "weight" + SCALE in factors


@torch.no_grad()
def quantize(factors: Factors, bits: Bits) -> dict[str, Tensor]:
    """Codes and scales of the values, as they are stored.

    Nothing is clipped: in 8 bits, what a search for the best clipping gains is small beside the error of the fit, and
    `rounded` would have to search in every step; in fewer groups keep large values from doing harm beyond them, and
    where these are cut off nevertheless is up to `fitting.rounding`.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in factors.items():
        if not tensor.is_floating_point():
            result[name] = tensor
        elif bits == 8:
            codes, result[name + SCALE] = _by_row(tensor)
            result[name] = codes.to(torch.int8)
        else:
            codes, result[name + EXPONENTS], result[name + SCALE] = _by_group(tensor, bits)
            result[name] = _pack(codes.flatten(1)[:, : math.prod(tensor.shape[1:])], bits)
    return result


def _pack(codes: Tensor, bits: Bits) -> Tensor:
    """Codes `(rows, values)` as bytes `(rows, bytes)`, of which each value takes the lowest bits that are left.

    Bytes are int8 as well: some architectures look whether a weight is, before they cast activations to its type.
    """
    fields, count = _word(bits)
    words = _joined(codes.to(torch.int8), fields, bits)
    parts = [(words >> 8 * place & 255).to(torch.uint8) for place in range(count)]
    packed = torch.stack(parts, 2).flatten(1)[:, : -(-codes.shape[1] * bits // 8)]
    return packed.contiguous().view(torch.int8)


def _unpack(packed: Tensor, bits: Bits, width: int) -> Tensor:
    """The codes `(rows, width)` that `_pack` made bytes of, int8."""
    fields, count = _word(bits)
    words, half = _joined(packed, count, 8), 2 ** (bits - 1)  # from which on codes are negative
    codes = [(((words >> bits * place & (2 * half - 1)) ^ half) - half).to(torch.int8) for place in range(fields)]
    return torch.stack(codes, 2).flatten(1)[:, :width]


def _word(bits: Bits) -> tuple[int, int]:
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


def in_int8(factors: Factors, tensors: Mapping[str, TensorSpec], bits: Bits) -> dict[str, Tensor]:
    """Factors that are stored in fewer bits as they would be in 8, for products; sizes are those of the structure."""
    return quantize(restored(factors, tensors, bits), 8)


@torch.no_grad()
def restored(factors: Factors, tensors: Mapping[str, TensorSpec], bits: Bits) -> dict[str, Tensor]:
    """The values of factors that are stored in fewer than 8 bits; sizes are those of the structure."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype is not None:
            result[name] = factors[name]
            continue
        width, scale = math.prod(tensor.size[1:]), factors[name + SCALE]
        codes = _unpack(factors[name], bits, width)
        values = in_groups(codes.to(scale.dtype)) * _steps(factors[name + EXPONENTS], scale)[:, :, None]
        result[name] = _of_groups(values, tensor.size)
    return result


@torch.no_grad()
def settled(factor: Tensor, bits: Bits) -> Tensor:
    """A factor with the same codes whose first changes in training leave its steps alone.

    The largest value of each group moves to the middle of those that have the same steps; in what was stored it lies at
    their end, from where the first step of an optimizer would change half of all groups. The largest of all stay.
    """
    values = in_groups(factor[..., None].flatten(1))
    exponents, scale = _by_group(factor, bits)[1:]
    middle = (LARGEST[bits] * MIDDLE * _steps(exponents, scale))[:, :, None]
    largest, moves = values.abs().amax(2, keepdim=True), ((exponents > 0) & (exponents < 255))[:, :, None]
    lowered = torch.where(values.abs() == largest, values.sign() * middle, values.clamp(-middle, middle))
    return _of_groups(torch.where(moves, lowered, values), factor.shape)


def floats(factors: Factors, dtype: torch.dtype | None = None) -> Factors:
    """Factors in int8 as values, in the type of their scales, unless told otherwise; floats as they are."""
    if not is_stored(factors):
        return factors
    return {
        name: tensor if name + SCALE not in factors else _values(tensor, factors[name + SCALE], dtype)
        for name, tensor in factors.items()
        if not name.endswith(SCALE)
    }


def dense(factors: Factors, name: str, *, columns: bool = False) -> Dense:
    """A factor as a matrix to multiply by."""
    return Dense(factors[name], factors.get(name + SCALE), columns)


def look_up(factors: Factors, name: str, index: Tensor) -> Tensor:
    """Rows of a factor, as values."""
    if isinstance(factors, Rounded):
        table = factors.values_of(name).flatten(1)
        rows = rounded(F.embedding(index.flatten(), table), factors.bits, table)
        return rows.view(*index.shape, table.shape[1])
    rows, scale = F.embedding(index, factors[name].flatten(1)), factors.get(name + SCALE)
    return rows if scale is None else rows.to(scale.dtype) * F.embedding(index, scale[:, None])


class Rounded(Mapping[str, Tensor]):
    """Factors that are rounded when they are asked for: of a table of which few rows are looked up, these alone.

    Args:
        factors: values, and integers, which stay as they are.
        bits: of codes.
    """

    def __init__(self, factors: Factors, bits: Bits) -> None:
        self._factors = factors
        self.bits: Bits = bits
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            tensor = self._factors[name]
            self._made[name] = rounded(tensor, self.bits) if tensor.is_floating_point() else tensor
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def values_of(self, name: str) -> Tensor:
        """A factor before it is rounded."""
        return self._factors[name]


def rounded(tensor: Tensor, bits: Bits, factor: Tensor | None = None) -> Tensor:
    """The very values that products read of what `quantize` stores; gradients pass as if nothing had been rounded.

    The straight-through estimator of Bengio, Léonard and Courville (arXiv 1308.3432), for training that is to end in
    integers.

    Args:
        tensor: a factor, or rows of one.
        bits: of the integers.
        factor: whose rows they are.
    """
    fixed = values = tensor.detach()
    if bits != 8:
        codes, exponents, scale = _by_group(fixed, bits, None if factor is None else factor.detach())
        values = _of_groups(codes.to(scale.dtype) * _steps(exponents, scale)[:, :, None], tensor.shape)
    return _values(*_by_row(values)) + (tensor - fixed)


def _by_row(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits, in floats, and the scales of rows, in the type of the values."""
    whole = _whole(tensor)
    scale = (whole[..., None].flatten(1).abs().amax(1) / LARGEST[8]).to(tensor.dtype)
    divisor = torch.where(scale > 0, scale, 1).to(whole.dtype)  # rows of zeros, or too small for a scale
    return (whole / _over_rows(whole, divisor)).round().clamp(-LARGEST[8], LARGEST[8]), scale


def _by_group(tensor: Tensor, bits: Bits, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `(rows, groups, GROUP)` in floats, exponents `(rows, groups)`, the scale of the factor `(1,)`.

    Args:
        tensor: a factor, or rows of one.
        bits: of codes.
        factor: whose rows they are.
    """
    values = in_groups(_whole(tensor)[..., None].flatten(1))
    largest = values.abs().amax(2)
    exponents, scale, steps = _scales(largest, largest if factor is None else _whole(factor), tensor.dtype, bits)
    return (values / steps[:, :, None]).round().clamp(-LARGEST[bits], LARGEST[bits]), exponents, scale


def _scales(
    largest: Float[Tensor, "rows groups"], factor: Tensor, dtype: torch.dtype, bits: Bits
) -> tuple[UInt8[Tensor, "rows groups"], Float[Tensor, 1], Float[Tensor, "rows groups"]]:
    """Exponents of groups and the scale of a factor, in a type, for the largest values; and steps, in that of these."""
    of_all = torch.linalg.vector_norm(factor, math.inf) if factor.numel() else largest.new_zeros(())
    scale = (of_all / LARGEST[bits]).to(dtype).view(1)
    tiny = torch.finfo(largest.dtype).tiny
    below = STEPS * (scale.to(largest.dtype).clamp_min(tiny) * LARGEST[bits] / largest.clamp_min(tiny)).log2()
    slack = max(SLACK * torch.finfo(dtype).eps, LOGARITHM)
    exponents = (below + slack).floor().clamp(0, 255).to(torch.uint8)
    return exponents, scale, _steps(exponents, scale).to(largest.dtype).clamp_min(tiny)


def group_steps(largest: Float[Tensor, "rows groups"], dtype: torch.dtype, bits: Bits) -> Float[Tensor, "rows groups"]:
    """What a code is worth in each group of a factor of this type, by its largest value; never 0."""
    return _scales(largest, largest, dtype, bits)[2]


def in_groups(rows: Float[Tensor, "rows values"]) -> Float[Tensor, "rows groups group"]:
    """Rows of a factor in groups of `GROUP` values, padded with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _of_groups(values: Float[Tensor, "rows groups group"], size: Sequence[int]) -> Tensor:
    """A factor of that size, without what its groups are padded with."""
    return values.flatten(1)[:, : math.prod(size[1:])].reshape(size).contiguous()


def _steps(exponents: Tensor, scale: Tensor) -> Tensor:
    """What a code of each group is multiplied by, in the type of the scale."""
    whole = _whole(scale)
    powers = torch.exp2(torch.arange(256, device=scale.device, dtype=whole.dtype) / -STEPS)
    return (whole * powers[exponents.long()]).to(scale.dtype)


def _whole(tensor: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has no 127.5."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _values(codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    scale = scale.to(dtype or scale.dtype)
    return codes.to(scale.dtype) * _over_rows(codes, scale)


def _over_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """One scale for each row, shaped to meet the rows."""
    return scale.view(-1, *[1] * (tensor.dim() - 1))
