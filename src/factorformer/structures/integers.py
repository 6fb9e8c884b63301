"""Factors stored in integers of 8, 4 or 3 bits, with scales.

In 8 bits `value = code * scale`, with codes from -127 to 127 and a scale for each row, which is everything under one
index of the factor's first dimension.

In 4 bits `value = level * scale * 2^(-exponent / STEPS)`: a code from -7 to 8 is the number of one of 16 `LEVELS`, and
each group of `GROUP` values of a row has an exponent of its own, since a single scale for a row would be that of its
largest value, beside which most others are nothing. Levels lie where values do, closer to each other near 0, which is
one of them. The largest one, 1, has none opposite of it: exponents have a sign, that of the largest value of the group.
Two codes take a byte. In 3 bits there are 8 levels, with codes from -3 to 4, and eight codes take three bytes. Products
read such factors as int8 with a scale for each row, which they are turned into once; training rounds twice as well.

Scales are values of their own, named after the factor, and so are exponents.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from factorformer.kernels import Dense, cpu, rounds
from factorformer.kernels.cpu import GROUP
from factorformer.structures.base import Factors, TensorSpec, groups, packed
from factorformer.structures.packing import pack, unpack

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

LARGEST = 127
"""Code of 8 bits."""

LEVELS: dict[Bits, tuple[float, ...]] = {
    3: (-0.763, -0.445, -0.209, 0.0, 0.181, 0.379, 0.625, 1.0),
    4: (
        *(-0.867, -0.669, -0.518, -0.394, -0.285, -0.185, -0.091, 0.0),
        *(0.087, 0.177, 0.271, 0.372, 0.484, 0.614, 0.776, 1.0),
    ),
}
"""What the codes of few bits stand for, from the lowest, negative one. They leave the least squared error of normally
distributed values in groups of `GROUP` whose exponents are the best (Lloyd, 1982): 16.2 dB below them in 3 bits and
22.3 in 4, where equal steps leave 14.2 and 20.8. Rotated factors are distributed so."""

BOUNDS: dict[Bits, tuple[float, ...]] = {
    bits: tuple((low + high) / 2 for low, high in itertools.pairwise(levels)) for bits, levels in LEVELS.items()
}
"""Between levels."""

STEPS = 10
"""From a scale to half of it: those of groups can differ by a factor of 2^12.7, and are up to 7 % too large."""

LAST = 127
"""Exponent, and the lowest bits of all: the highest bit is a sign. Groups that are smaller have this one, without a
sign: their largest values may be rounded to any level."""

MIDDLE = 2 ** (-0.5 / STEPS)
"""Of the reach of a group: the middle of the largest values that have the same exponent."""

OPPOSITE = 0.92
"""Of the reach of a group: what values of the other sign than the largest one may have, so that it remains that."""

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
    `rounded` would have to search in every step; in fewer bits groups keep large values from doing harm beyond them,
    and where these are cut off nevertheless is up to `fitting.rounding`.
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
            result[name] = pack(codes.flatten(1)[:, : math.prod(tensor.shape[1:])], bits)
    return result


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
        codes = unpack(factors[name], bits, width)
        values = in_groups(levels_of(codes, bits, scale.dtype)) * _reach(factors[name + EXPONENTS], scale)[:, :, None]
        result[name] = _of_groups(values, tensor.size)
    return result


@torch.no_grad()
def settled(factor: Tensor, bits: Bits) -> Tensor:
    """A factor with the same codes whose first changes in training leave its exponents and their signs alone.

    The largest value of each group moves to the middle of those that have the same exponent; in what was stored it lies
    at their end, from where the first step of an optimizer would change half of all groups. The largest of all stay.
    """
    values = in_groups(factor[..., None].flatten(1))
    ends = extremes(_whole(values))
    exponents, scale = _scales(ends, ends, factor.dtype)
    reach = _reach(exponents, scale)[:, :, None]
    parts = (values / torch.where(reach == 0, 1, reach)).clamp_min(-OPPOSITE)
    below = (exponents & LAST)[:, :, None]
    moves = (parts == parts.amax(2, keepdim=True)) & (below > 0) & (below < LAST)  # smaller ones have the last anyway
    lowered = torch.where(below > 0, parts.clamp_max(MIDDLE), parts)
    return _of_groups(torch.where(moves, MIDDLE, lowered) * reach, factor.shape)


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
    factor = None if factor is None else factor.detach()
    if rounds(fixed):
        return _StraightThrough.apply(tensor, bits, factor)
    if bits != 8:
        codes, exponents, scale = _by_group(fixed, bits, factor)
        values = _of_groups(levels_of(codes, bits, scale.dtype) * _reach(exponents, scale)[:, :, None], tensor.shape)
    return _values(*_by_row(values)) + (tensor - fixed)


class _StraightThrough(torch.autograd.Function):
    """The same by the compiled kernel, which gradients pass as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bits: Bits, factor: Tensor | None) -> Tensor:
        if bits == 8:
            return cpu.round_rows(tensor)
        ends = cpu.extremes(tensor)
        reach = _reach(*_scales(ends, ends if factor is None else factor, tensor.dtype))
        return cpu.round_rows(tensor, reach, *_tables(bits))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def at_levels(
    values: Float[Tensor, "rows width"], reach: Float[Tensor, "rows groups"], bits: Bits
) -> Float[Tensor, "rows width"]:
    """Rows of a factor at the levels that are nearest, where groups have this reach, before they become int8."""
    if rounds(values):
        return cpu.round_rows(values, reach.to(values.dtype).contiguous(), *_tables(bits), in_int8=False)
    grouped = levels_of(nearest(in_groups(values) / reach[:, :, None], bits), bits, values.dtype) * reach[:, :, None]
    return _of_groups(grouped, values.shape)


@functools.cache
def _tables(bits: Bits) -> tuple[Tensor, Tensor]:
    """Levels and bounds for the compiled kernel, whatever types and devices are usual."""
    levels, bounds = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (LEVELS[bits], BOUNDS[bits]))
    return levels, bounds


def _by_row(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits, in floats, and the scales of rows, in the type of the values."""
    whole = _whole(tensor)
    scale = (whole[..., None].flatten(1).abs().amax(1) / LARGEST).to(tensor.dtype)
    divisor = torch.where(scale > 0, scale, 1).to(whole.dtype)  # rows of zeros, or too small for a scale
    return (whole / _over_rows(whole, divisor)).round().clamp(-LARGEST, LARGEST), scale


def _by_group(tensor: Tensor, bits: Bits, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `(rows, groups, GROUP)`, exponents `(rows, groups)`, the scale of the factor `(1,)`.

    Args:
        tensor: a factor, or rows of one.
        bits: of codes.
        factor: whose rows they are.
    """
    values = in_groups(_whole(tensor)[..., None].flatten(1))
    ends = extremes(values)
    exponents, scale = _scales(ends, ends if factor is None else _whole(factor), tensor.dtype)
    return nearest(values / _divisor(exponents, scale, values.dtype)[:, :, None], bits), exponents, scale


def extremes(values: Float[Tensor, "rows groups group"]) -> Float[Tensor, "rows groups"]:
    """The value of each group that is farthest from 0; of two such the positive one."""
    low, high = values.aminmax(dim=2)
    return torch.where(high >= -low, high, low)


def _scales(
    ends: Float[Tensor, "rows groups"], factor: Tensor, dtype: torch.dtype
) -> tuple[UInt8[Tensor, "rows groups"], Float[Tensor, 1]]:
    """Exponents of groups that have these extremes, and the scale of a factor in a type."""
    of_all = torch.linalg.vector_norm(factor, math.inf) if factor.numel() else ends.new_zeros(())
    scale, tiny = of_all.to(dtype).view(1), torch.finfo(ends.dtype).tiny
    below = STEPS * (scale.to(ends.dtype).clamp_min(tiny) / ends.abs().clamp_min(tiny)).log2()
    slack = max(SLACK * torch.finfo(dtype).eps, LOGARITHM)
    exponents = (below + slack).floor().clamp(0, LAST).to(torch.uint8)
    return exponents | ((ends < 0) & (exponents < LAST)).to(torch.uint8) * (LAST + 1), scale


def group_reach(ends: Float[Tensor, "rows groups"], dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """The extremes of the groups of a factor of this type as they would be stored; never 0."""
    return _divisor(*_scales(ends, ends, dtype), ends.dtype)


def _divisor(exponents: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    reach, tiny = _reach(exponents, scale).to(dtype), torch.finfo(dtype).tiny
    return torch.where(reach.abs() < tiny, tiny, reach)


def nearest(values: Tensor, bits: Bits) -> Tensor:
    """The codes, int32, of the levels that are nearest to the values."""
    return torch.bucketize(values.contiguous(), values.new_tensor(BOUNDS[bits]), out_int32=True) - _zero(bits)


def levels_of(codes: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """What codes stand for."""
    levels = torch.tensor(LEVELS[bits], dtype=dtype, device=codes.device).roll(-_zero(bits))
    return levels.index_select(0, codes.flatten().int() & (len(levels) - 1)).view(codes.shape)


def _zero(bits: Bits) -> int:
    """The place of 0 among levels, whose code is 0."""
    return 2 ** (bits - 1) - 1


def in_groups(rows: Float[Tensor, "rows values"]) -> Float[Tensor, "rows groups group"]:
    """Rows of a factor in groups of `GROUP` values, padded with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _of_groups(values: Float[Tensor, "rows groups group"], size: Sequence[int]) -> Tensor:
    """A factor of that size, without what its groups are padded with."""
    return values.flatten(1)[:, : math.prod(size[1:])].reshape(size).contiguous()


def _reach(exponents: Tensor, scale: Tensor) -> Tensor:
    """What the largest level of each group stands for, with its sign, in the type of the scale."""
    whole = _whole(scale)
    powers = torch.exp2(torch.arange(LAST + 1, device=scale.device, dtype=whole.dtype) / -STEPS)
    return (whole * torch.cat([powers, -powers])[exponents.long()]).to(scale.dtype)


def _whole(tensor: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has no 127.5."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _values(codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    scale = scale.to(dtype or scale.dtype)
    return codes.to(scale.dtype) * _over_rows(codes, scale)


def _over_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """One scale for each row, shaped to meet the rows."""
    return scale.view(-1, *[1] * (tensor.dim() - 1))
