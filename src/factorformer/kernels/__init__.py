"""Products on raw tensors. Importing this package registers its operators with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from factorformer.kernels import sparse, support


def sparse_product(
    x: Tensor, values: Tensor, support: Tensor, atoms: int, blocks: int = 1, *, transposed: bool = False
) -> Tensor:
    """`x @ S.T`, `(..., atoms)` to `(..., rows)`, or transposed `x @ S`, `(..., rows)` to `(..., atoms)`.

    Args:
        x: the input.
        values: `(rows, nonzeros)`, in the order of their positions.
        support: packed positions, uint8, `(groups, bytes)`; consecutive rows share one where there are fewer than rows.
        atoms: columns of `S`.
        blocks: equal blocks of columns that each hold the same number of nonzeros.
        transposed: which of the two products.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
    width = atoms if transposed else values.shape[0]
    operator = sparse.sparse_matmul_transposed if transposed else sparse.sparse_matmul
    flat = x.reshape(-1, x.shape[-1])
    return operator(flat, values, support, atoms, blocks).view(*x.shape[:-1], width)


__all__ = ["sparse", "sparse_product", "support"]
