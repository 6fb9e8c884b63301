"""Which units stay when those of all matrices compete for one budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.structures import Structure
from factorformer.training.units import Units


def compete(units: Sequence[Units], scores: Sequence[Tensor], budget: int, left: float = 0.0) -> list[Tensor]:
    """The units that each matrix keeps: those of the highest importance per byte in all matrices together.

    While matrices are above their break-even rank, removing a unit frees no bytes. The way down is therefore measured
    in bytes of units, from the full rank of everything to what the units cost that meet the budget.

    Args:
        units: of every matrix.
        scores: importance of each unit that remains, `(count,)` for each matrix.
        budget: bytes that all matrices together may take in the end; each keeps its fewest units whatever they take.
        left: part of the way to the budget that is still to go, from 1 to 0.

    Returns:
        For each matrix the numbers of the units that stay, in order.
    """
    bytes_of = [matrix.unit_bytes() for matrix in units]
    density = torch.cat([score.cpu().double() / size for score, size in zip(scores, bytes_of, strict=True)])
    owner = torch.cat([torch.full((len(score),), place) for place, score in enumerate(scores)])
    least = [_fewest(matrix.full) for matrix in units]
    first = 0
    for score, count in zip(scores, least, strict=True):
        best = score.cpu().topk(count).indices
        density[first + best] = float("inf")
        first += len(score)
    order = density.argsort(descending=True, stable=True)
    owner = owner[order]

    def stored(number: int) -> int:
        counts = owner[:number].bincount(minlength=len(units)).tolist()
        return sum(matrix.bytes(count) for matrix, count in zip(units, counts, strict=True))

    low, high = sum(least), len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored(middle) <= budget else (low, middle - 1)
    number = low
    if left > 0:
        sizes = torch.tensor(bytes_of, dtype=torch.float64)
        whole = sum(matrix.full.units * size for matrix, size in zip(units, bytes_of, strict=True))
        spent = sizes[owner].cumsum(0)
        allowed = spent[number - 1] + (whole - spent[number - 1]) * left
        number = max(number, int(torch.searchsorted(spent, allowed, right=True)))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:number]] = True
    masks = chosen.split([len(score) for score in scores])
    return [mask.nonzero()[:, 0].to(score.device) for mask, score in zip(masks, scores, strict=True)]


def _fewest(full: Structure) -> int:
    """The least number of units that a matrix can have."""
    for count in (1, 2):
        try:
            full.with_units(count)
            return count
        except ModelError:
            continue
    return full.units
