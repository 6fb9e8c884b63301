"""The compiled kernels for CPUs, called through plain C.

They take contiguous float32 input, and weights as float32 or as int8 with scales. Threads are those of torch: both use
the OpenMP of the process. `FACTORFORMER_CPU` names the variant to use in place of the best that the processor has
(`avx512_vnni`, `avx512`, `avx2`, `baseline`), or `reference` for none of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from factorformer.errors import FactorformerError, one_of
from factorformer.kernels.compile import LIBRARY, VARIANTS
from factorformer.kernels.support import code_of

LONGEST = 4
"""Matrices in a chain, at most."""

REFERENCE = "reference"
_CODES = {"bitmap": 0, "uint8": 1, "uint16": 2}
_VALUES = (torch.float32, torch.int8)
_pointer, _count, _fields = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)


def _load() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built, or not wanted.

    Raises:
        FactorformerError: `FACTORFORMER_CPU` names a variant that does not exist, or that this processor does not have.
    """
    wanted = os.environ.get("FACTORFORMER_CPU", "")
    if wanted == REFERENCE or (not wanted and not LIBRARY.exists()):
        return None
    if wanted and wanted not in VARIANTS:
        raise FactorformerError(f"FACTORFORMER_CPU: unknown variant {one_of(wanted, [*VARIANTS, REFERENCE])}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        if wanted:
            raise FactorformerError(f"FACTORFORMER_CPU is '{wanted}', but there are no kernels: {error}") from error
        return None
    loaded.factorformer_variant.restype = ctypes.c_char_p
    arguments = {
        "sparse": (_pointer, _count, _fields, _pointer, _pointer),
        "sparse_transposed": (_pointer, _count, _fields, _pointer),
        "sparse_outer": (_pointer, _pointer, _count, _fields, _pointer),
        "chain": (_pointer, _count, _fields, _count, _pointer, _pointer),
        "gelu": (_pointer, _count, _pointer),
        "attention": (_fields, ctypes.c_float),
    }
    for name, types in arguments.items():
        function = getattr(loaded, f"factorformer_{name}")
        function.argtypes, function.restype = types, None
    if wanted and loaded.factorformer_variant().decode() != wanted:
        raise FactorformerError(f"FACTORFORMER_CPU is '{wanted}', which this processor does not have")
    return loaded


_library = _load()
AVAILABLE = _library is not None
"""Whether there are compiled kernels; a constant, so that compilers of graphs need not look further."""


def variant() -> str:
    """Which kernels multiply on the CPU."""
    return REFERENCE if _library is None else _library.factorformer_variant().decode()


def serves(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the library takes these tensors: float32 and int8 in memory, one after the other."""
    if not AVAILABLE or not x.is_cpu or x.dtype != torch.float32:
        return False
    for weight in weights:
        if weight is not None and not (weight.dtype in _VALUES and weight.is_cpu and weight.is_contiguous()):
            return False
    return True


def sparse_matmul(
    x: Tensor, values: Tensor, support: Tensor, atoms: int, blocks: int, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x @ S.T + bias`, `(n, atoms)` to `(n, rows)`."""
    x, y = x.contiguous(), x.new_empty(x.shape[0], values.shape[0])
    fields = _sparse_fields(values, support, atoms, blocks, scales)
    _loaded().factorformer_sparse(x.data_ptr(), len(x), fields, _address(bias), y.data_ptr())
    return y


def sparse_matmul_transposed(
    x: Tensor, values: Tensor, support: Tensor, atoms: int, blocks: int, scales: Tensor | None
) -> Tensor:
    """`x @ S`, `(n, rows)` to `(n, atoms)`."""
    x, y = x.contiguous(), x.new_empty(x.shape[0], atoms)
    fields = _sparse_fields(values, support, atoms, blocks, scales)
    _loaded().factorformer_sparse_transposed(x.data_ptr(), len(x), fields, y.data_ptr())
    return y


def sparse_outer(left: Tensor, right: Tensor, support: Tensor, nonzeros: int, blocks: int) -> Tensor:
    """The entries of `left.T @ right` on the support: `(n, rows)` and `(n, atoms)` to `(rows, nonzeros)`."""
    left, right = left.contiguous(), right.contiguous()
    (n, rows), atoms = left.shape, right.shape[1]
    y = left.new_empty(rows, nonzeros)
    code = _CODES[code_of(atoms, nonzeros, blocks)]
    fields = _array(support.data_ptr(), *support.shape, rows, nonzeros, atoms, blocks, code, 0, 0, 0)
    _loaded().factorformer_sparse_outer(left.data_ptr(), right.data_ptr(), n, fields, y.data_ptr())
    return y


def chain(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    columns: Sequence[bool],
    bias: Tensor | None,
) -> Tensor:
    """`x @ W_1.T @ W_2.T ... + bias`: `(n, in)` to `(n, out)`.

    Args:
        x: the input.
        weights: `(out, in)` each, or `(in, out)` where `columns` says so; float32, or int8 with scales.
        scales: one for each row as stored.
        columns: which of the weights are stored transposed.
        bias: added to the last product.
    """
    numbers: list[int] = []
    out = x.shape[-1]
    for weight, scale, column in zip(weights, scales, columns, strict=True):
        rows, inner = weight.shape
        out, wide = (inner, rows) if column else (rows, inner)
        numbers += (weight.data_ptr(), _address(scale), out, wide, scale is not None, column)
    x, y = x.contiguous(), x.new_empty(x.shape[0], out)
    _loaded().factorformer_chain(x.data_ptr(), len(x), _array(*numbers), len(weights), _address(bias), y.data_ptr())
    return y


def gelu(x: Tensor, y: Tensor) -> Tensor:
    """The exact GELU, within 2e-7; both contiguous, and perhaps the same."""
    _loaded().factorformer_gelu(x.data_ptr(), x.numel(), y.data_ptr())
    return y


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query @ key.T) @ value` over the keys that the mask allows.

    Args:
        query: `(batch, heads, queries, width)`; of this and the next two, the last dimension lies in one piece.
        key, value: `(batch, key heads, keys, width)`; a number of consecutive heads may share one of these.
        mask: booleans that broadcast to `(batch, heads, queries, keys)`; None for all.
        scale: of the scores.

    Returns:
        `(batch, queries, heads, width)`.
    """
    batch, heads, queries, width = query.shape
    y = query.new_empty(batch, queries, heads, width)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, key.shape[2]).stride()
    numbers = (
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(mask), y.data_ptr()),
        *(batch, heads, key.shape[1], queries, key.shape[2], width),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides),
    )
    _loaded().factorformer_attention((ctypes.c_int64 * len(numbers))(*numbers), scale)
    return y


def _loaded() -> ctypes.CDLL:
    assert _library is not None
    return _library


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sparse_fields(values: Tensor, support: Tensor, atoms: int, blocks: int, scales: Tensor | None) -> ctypes.Array:
    rows, nonzeros = values.shape
    code = _CODES[code_of(atoms, nonzeros, blocks)]
    return _array(
        *(support.data_ptr(), *support.shape, rows, nonzeros, atoms, blocks, code),
        *(values.data_ptr(), _address(scales), scales is not None),
    )


@functools.lru_cache(maxsize=4096)
def _array(*numbers: int) -> ctypes.Array:
    """The numbers as C reads them; made once for each layer, which is faster than anew in each call."""
    return (ctypes.c_int64 * len(numbers))(*numbers)
