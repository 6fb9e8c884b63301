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
CLIPPINGS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)
"""Parts of a row's largest value that are tried as the largest code: the rest of the row gains what that one loses."""


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
    """Codes and scales of the values that leave the smallest squared error in each row, by a search over clippings."""
    result: dict[str, Tensor] = {}
    for name, tensor in factors.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        scale = _scales(tensor)
        result[name] = _codes(tensor, scale).to(torch.int8)
        result[name + SCALE] = scale
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
    """The values that int8 would hold, through which gradients pass as if nothing had been rounded.

    The straight-through estimator of Bengio, Léonard and Courville (arXiv 1308.3432), for training that is to end in
    int8.
    """
    result = dict(factors)
    for name, tensor in factors.items():
        if tensor.is_floating_point():
            with torch.no_grad():
                scale = _spread(tensor.detach(), tensor.detach().abs().flatten(1).amax(1) / LARGEST)
                error = (tensor / scale).round() * scale - tensor
            result[name] = tensor + error
    return result


def _scales(tensor: Tensor) -> Tensor:
    """For each row, the scale that leaves the smallest squared error."""
    whole = tensor.float()
    largest = whole.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny * LARGEST)
    best, least = largest / LARGEST, torch.full_like(largest, torch.inf)
    for part in CLIPPINGS:
        scale = (part * largest / LARGEST).to(tensor.dtype).float()
        error = (_codes(whole, scale) * _spread(whole, scale) - whole).square().flatten(1).sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.to(tensor.dtype)


def _codes(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor.float() / _spread(tensor, scale.float())).round().clamp(-LARGEST, LARGEST)


def _values(codes: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    scale = scale.to(dtype or scale.dtype)
    return codes.to(scale.dtype) * _spread(codes, scale)


def _spread(tensor: Tensor, scale: Tensor) -> Tensor:
    """One scale for each row, shaped to meet the rows; never 0."""
    tiny = torch.finfo(scale.dtype).tiny
    return scale.clamp_min(tiny).view(-1, *[1] * (tensor.dim() - 1))
