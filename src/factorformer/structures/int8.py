"""Factors stored in int8: one byte a value, and a scale for each row.

Symmetric, `value = code * scale` with codes from -127 to 127; a row is everything under one index of the factor's first
dimension. The scales are values of their own, named after the factor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from factorformer.kernels import Dense
from factorformer.structures.base import Factors, TensorSpec

SCALE = "_scale"
"""Ends the name of the scales of a factor."""

LARGEST = 127


def stored(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """What takes the place of a structure's tensors: codes and scales of all values; integers stay as they are."""
    result: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        result[name] = TensorSpec(tensor.size, tensor.dtype or torch.int8)
        if tensor.dtype is None:
            result[name + SCALE] = TensorSpec(tensor.size[:1])
    return result


def is_stored(factors: Factors) -> bool:
    """Whether factors are codes and scales."""
    return "weight" + SCALE in factors


@torch.no_grad()
def quantize(factors: Factors) -> dict[str, Tensor]:
    """Codes and scales of the values; the largest of each row gets the largest code.

    Rows are not clipped: what a search for the best clipping gains is small beside the error of the fit, and `rounded`
    would have to search in every step.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in factors.items():
        if tensor.is_floating_point():
            codes, result[name + SCALE] = _quantized(tensor)
            tensor = codes.to(torch.int8)
        result[name] = tensor
    return result


def floats(factors: Factors, dtype: torch.dtype | None = None) -> Factors:
    """The factors as values; in the type of their scales, unless told otherwise."""
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
    rows, scale = F.embedding(index, factors[name]), factors.get(name + SCALE)
    return rows if scale is None else rows.to(scale.dtype) * F.embedding(index, scale[:, None])


def rounded(factors: Factors) -> dict[str, Tensor]:
    """The very values that `quantize` would store, through which gradients pass as if nothing had been rounded.

    The straight-through estimator of Bengio, Léonard and Courville (arXiv 1308.3432), for training that is to end in
    int8.
    """
    result = dict(factors)
    for name, tensor in factors.items():
        if tensor.is_floating_point():
            fixed = tensor.detach()
            result[name] = _values(*_quantized(fixed)) + (tensor - fixed)
    return result


def _quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, in floats, and the scales of rows, in the type of the values."""
    whole = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # bfloat16 has no 127.5
    scale = (whole.abs()[..., None].flatten(1).amax(1) / LARGEST).to(tensor.dtype)
    divisor = torch.where(scale > 0, scale, 1).to(whole.dtype)  # rows of zeros, or too small for a scale
    return (whole / _over_rows(whole, divisor)).round().clamp(-LARGEST, LARGEST), scale


def _values(codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    scale = scale.to(dtype or scale.dtype)
    return codes.to(scale.dtype) * _over_rows(codes, scale)


def _over_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """One scale for each row, shaped to meet the rows."""
    return scale.view(-1, *[1] * (tensor.dim() - 1))
