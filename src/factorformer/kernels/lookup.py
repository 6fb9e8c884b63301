"""Rows of tables in factors, by the compiled kernels; where these do not serve, structures have products of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from factorformer.kernels import cpu
from factorformer.kernels.dense import Dense, served


def dense_rows(index: Tensor, table: Dense, right: Dense | None = None) -> Tensor | None:
    """Rows of a table, or of the product of two matrices, `(...)` to `(..., width)`; None where no kernel serves.

    Args:
        index: of rows.
        table: `(rows, width)`, or `(rows, rank)`.
        right: `(rank, width)`.

    Raises:
        IndexError: an index that is no row.
    """
    others = () if right is None else right[:2]
    if not _serve(index, *table[:2], *others) or table.weight.shape[1] > cpu.WIDEST:
        return None
    found = cpu.dense_rows(index.flatten(), table[:2], None if right is None else right[:2])
    return found.view(*index.shape, found.shape[1])


def kronecker_rows(
    index: Tensor,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    rank: int,
    shape: tuple[int, int],
) -> Tensor | None:
    """Rows of a sum of Kronecker products, `(...)` to `(..., width)`; None where the kernels do not serve.

    Args:
        index: of rows.
        left: `(m1, n1, rank)`, and the scales of int8, one for each of `m1`.
        right: `(m2, rank, n2)`, and the same for `m2`.
        rank: number of products.
        shape: of the table, `(rows, width)`.

    Raises:
        IndexError: an index that is no row.
    """
    if not _serve(index, *left, *right):
        return None
    return cpu.kronecker_rows(index.flatten(), left, right, rank, shape).view(*index.shape, shape[1])


def sparse_rows(
    index: Tensor, values: Tensor, scales: Tensor | None, support: Tensor, dictionary: tuple[Tensor, Tensor | None]
) -> Tensor | None:
    """Rows of a sparse matrix times a dictionary, `(...)` to `(..., width)`; None where the kernels do not serve.

    Args:
        index: of rows.
        values: `(rows, nonzeros)`, floats or int8.
        scales: of int8, one for each row.
        support: packed positions.
        dictionary: `(atoms, width)`, and the scales of int8, one for each atom.

    Raises:
        IndexError: an index that is no row.
    """
    if not _serve(index, values, scales, *dictionary, support=support):
        return None
    found = cpu.sparse_rows(index.flatten(), values, scales, support, dictionary)
    return found.view(*index.shape, found.shape[1])


def _serve(
    index: Tensor, weight: Tensor, scales: Tensor | None, *others: Tensor | None, support: Tensor | None = None
) -> bool:
    """Whether the compiled kernels do: results are float32, and nothing asks for a derivative."""
    if torch.compiler.is_compiling() or not index.is_cpu or index.dtype not in (torch.int64, torch.int32):
        return False
    values = weight if scales is None else scales  # of the type of the results
    return served(values, weight, scales, *others, support=support)
