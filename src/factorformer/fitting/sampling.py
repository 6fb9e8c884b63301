"""A few rows that stand for all those of a tall matrix, such as a table of embeddings."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer.fitting.metric import Metric

FEWEST, FOR_EACH = 2**13, 16
"""Rows of a sample, on average: so many, or so many for each column where that is more."""

WORTH = 2
"""A matrix is taken whole that has less than so many times the rows of a sample."""


def sampled(weight: Float[Tensor, "out inner"], metric: Metric) -> tuple[Float[Tensor, "rows inner"], Metric] | None:
    """Rows of a matrix and a metric under which they are, on average, as far from anything as the whole matrix is.

    Each row is drawn with a probability in proportion to its part of `||R W L||^2`, but those that have much of it
    always; and its error is divided by that probability (Horvitz and Thompson, 1952). What is learned from all rows,
    such as a dictionary, can be learned from these: a tenth of the rows of a large vocabulary. The draw is always the
    same.

    Args:
        weight: the matrix.
        metric: of errors.

    Returns:
        Rows and their metric; None where the matrix is small, or few of its rows matter, or the metric couples rows.
    """
    wanted = max(FEWEST, FOR_EACH * weight.shape[1])
    if len(weight) < WORTH * wanted or (metric.rows is not None and metric.rows.dim() != 1):
        return None
    energy = metric.apply(weight).square().sum(1, dtype=torch.float64).cpu()
    if not bool(energy.isfinite().all()) or not bool(energy.any()):
        return None
    chance = _probabilities(energy, wanted)
    drawn = torch.rand(len(energy), generator=torch.Generator().manual_seed(0), dtype=torch.float64) < chance
    kept = drawn.nonzero().flatten()
    if len(kept) < wanted // 2:  # few rows have all the energy
        return None
    rows = chance[kept].rsqrt().to(weight.device)
    if metric.rows is not None:
        rows = rows * metric.rows[kept.to(weight.device)]
    return weight[kept.to(weight.device)], dataclasses.replace(metric, rows=rows)


def _probabilities(energy: Float[Tensor, " rows"], wanted: int) -> Float[Tensor, " rows"]:
    """In proportion to the energy, at most 1, and `wanted` in all, as far as there are rows with any."""
    chance = wanted * energy / energy.sum()
    for _ in range(8):  # what rows that are certain do not need goes to the others
        sure = chance >= 1
        others = chance[~sure].sum()
        left = wanted - int(sure.sum())
        if not bool(others > 0) or left <= 0:
            break
        chance = torch.where(sure, chance, chance * (left / others)).clamp_max(1)
    return chance.clamp_max(1)
