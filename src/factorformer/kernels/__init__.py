"""Products on raw tensors. Importing this package registers its operators with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels import cpu, cuda, sparse, support
from factorformer.kernels.cpu import sparse_matmul as _sparse_matmul
from factorformer.kernels.cpu import sparse_matmul_transposed as _sparse_matmul_transposed
from factorformer.kernels.cpu import variant
from factorformer.kernels.dense import Dense, chain, gelu, kronecker, rounds, served
from factorformer.kernels.lookup import dense_rows, kronecker_rows, sparse_rows

cuda.register()


def sparse_product(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    atoms: int,
    *,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """`x @ S.T + bias`, `(..., atoms)` to `(..., rows)`, or transposed `x @ S`, `(..., rows)` to `(..., atoms)`.

    Args:
        x: the input.
        values: `(rows, nonzeros)`, in the order of their positions; floats, or int8 with scales.
        support: packed positions, uint8, `(rows, bytes)`, on the device of the values.
        atoms: columns of `S`.
        scales: of int8 values, one for each row.
        bias: `(rows)`; not for the transposed product.
        transposed: which of the two products.

    Raises:
        ModelError: the support is not of bytes or on another device, or sizes do not fit together.
    """
    if support.dtype != torch.uint8:
        raise ModelError(
            f"a sparse support is torch.uint8, got {support.dtype}: its bytes are codes, not numbers to convert"
        )
    if support.device != values.device:
        raise ModelError(f"a sparse support is on {support.device}, and the values are on {values.device}")
    shape = (*x.shape[:-1], atoms if transposed else values.shape[0])
    if served(x, values, scales, bias, support=support) and not torch.compiler.is_compiling():
        flat = x.reshape(-1, x.shape[-1])
        if transposed:
            return _sparse_matmul_transposed(flat, values, support, atoms, scales).view(shape)
        return _sparse_matmul(flat, values, support, atoms, scales, bias).view(shape)
    if scales is not None:
        values = values.to(x.dtype) * scales.to(x.dtype)[:, None]
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
    operator = sparse.sparse_matmul_transposed if transposed else sparse.sparse_matmul
    product = operator(x.reshape(-1, x.shape[-1]), values, support, atoms).view(shape)
    return product if bias is None else product + bias.to(product.dtype)


__all__ = [
    "Dense",
    "chain",
    "cpu",
    "dense_rows",
    "gelu",
    "kronecker",
    "kronecker_rows",
    "rounds",
    "served",
    "sparse",
    "sparse_product",
    "sparse_rows",
    "support",
    "variant",
]
