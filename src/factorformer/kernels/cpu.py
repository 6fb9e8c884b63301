"""The compiled kernels for CPUs, called through plain C.

They take contiguous float32 input, and weights as float32 or as int8 with scales. Threads are those of torch: both use
the OpenMP of the process. `FACTORFORMER_CPU` names the variant to use in place of the best that the processor has
(`amx`, `avx512_bf16`, `avx512_vbmi2`, `avx512_vnni`, `avx512`, `avx2`, `baseline`), or `reference` for none of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factorformer.errors import FactorformerError, FactorformerWarning, ModelError, one_of
from factorformer.kernels.compile import FAILED, FOR_TESTS, LIBRARY, SOURCES, VARIANTS, fingerprint
from factorformer.kernels.support import CODES, code_of, row_bytes

GROUP = 32
"""Values of a row that have an exponent of their own in fewer than 8 bits."""

LONGEST = 4
"""Matrices in a chain, at most."""

FEW = 4
"""Up to so many tokens are multiplied one by one, as generation does."""

INNER = 8
"""Inner sides of Kronecker sums of which few tokens are multiplied in one call."""

NO_ROW = 2
"""What kernels return that were asked for a row that there is not."""

_NEVER_FAIL = ("gelu", "extremes", "round_rows")

REFERENCE = "reference"
_VALUES = (torch.float32, torch.int8)
_PLAIN = (Tensor, nn.Parameter)  # other classes may keep their values elsewhere
WIDEST = 2**16
"""Columns of an int8 matrix, at most: sums of products with bytes fit into 32 bits."""

_pointer, _count, _fields = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)


def _load() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built, or not wanted.

    Raises:
        FactorformerError: `FACTORFORMER_CPU` names a variant that does not exist, or that this processor does not have.
    """
    wanted = os.environ.get("FACTORFORMER_CPU", "")
    if wanted == REFERENCE:
        return None
    if wanted and wanted not in VARIANTS | FOR_TESTS:
        raise FactorformerError(f"FACTORFORMER_CPU: unknown variant {one_of(wanted, [*VARIANTS, REFERENCE])}")
    loaded, wrong = _open()
    if loaded is None:
        if wanted:
            raise FactorformerError(f"FACTORFORMER_CPU is '{wanted}', but there are no kernels: {wrong or 'not built'}")
        if wrong:
            warnings.warn(
                f"{wrong}; torch multiplies in their place, which is slower: run python -m "
                f"factorformer.kernels.compile, or set FACTORFORMER_CPU={REFERENCE} to keep it so",
                FactorformerWarning,
                stacklevel=2,
            )
        return None
    loaded.factorformer_variant.restype = ctypes.c_char_p
    arguments = {
        "sparse": (_pointer, _count, _fields, _pointer, _pointer),
        "sparse_transposed": (_pointer, _count, _fields, _pointer),
        "sparse_outer": (_pointer, _pointer, _count, _fields, _pointer),
        "chain": (_pointer, _count, _fields, _count, _pointer, _pointer),
        "gelu": (_pointer, _count, _pointer),
        "attention": (_fields, ctypes.c_float),
        "encode": (_fields, _pointer, _pointer, _pointer, _count, _pointer),
        "sparse_rows": (_pointer, _count, _fields, _fields, _pointer),
        "kronecker": (_pointer, _count, _fields, _pointer, _pointer),
        "kronecker_rows": (_pointer, _count, _fields, _pointer),
        "dense_rows": (_pointer, _count, _fields, _fields, _pointer),
        "extremes": (_pointer, _count, _count, _pointer),
        "round_rows": (_pointer, _count, _count, _pointer, _pointer, _pointer, _count, ctypes.c_int32, _pointer),
    }
    for name, types in arguments.items():
        function = getattr(loaded, f"factorformer_{name}")
        function.argtypes, function.restype = types, None if name in _NEVER_FAIL else ctypes.c_int32
    if wanted and loaded.factorformer_variant().decode() != wanted:
        raise FactorformerError(f"FACTORFORMER_CPU is '{wanted}', which this processor does not have")
    return loaded


def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or what is wrong with it; nothing is where there was no compiler to build it."""
    if not LIBRARY.exists():
        if not FAILED.exists():
            return None, ""
        said = FAILED.read_text(encoding="utf-8").strip()
        return None, f"the CPU kernels could not be compiled ({said[:300]}{' ...' if len(said) > 300 else ''})"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the CPU kernels cannot be loaded ({error})"
    made_of = getattr(loaded, "factorformer_sources", None)
    if made_of is not None:
        made_of.restype = ctypes.c_char_p
    if SOURCES.is_dir() and (made_of is None or made_of().decode() != fingerprint()):
        return None, "the CPU kernels were compiled from other sources"
    return loaded, ""


_library = _load()
AVAILABLE = _library is not None
"""Whether there are compiled kernels; a constant, so that compilers of graphs need not look further."""


def variant() -> str:
    """Which kernels multiply on the CPU."""
    return REFERENCE if _library is None else _library.factorformer_variant().decode()


def serves(x: Tensor, *weights: Tensor | None, support: Tensor | None = None) -> bool:
    """Whether the library takes these tensors: float32 and int8 in memory, one after the other, a support of bytes."""
    if not AVAILABLE or type(x) not in _PLAIN or not x.is_cpu or x.dtype != torch.float32:
        return False
    if support is not None and not (type(support) in _PLAIN and support.dtype == torch.uint8 and support.is_cpu):
        return False
    for weight in weights:
        if weight is not None and not (
            type(weight) in _PLAIN and weight.dtype in _VALUES and weight.is_cpu and weight.is_contiguous()
        ):
            return False
    return True


def sparse_matmul(
    x: Tensor, values: Tensor, support: Tensor, atoms: int, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x @ S.T + bias`, `(n, atoms)` to `(n, rows)`.

    Raises:
        ModelError: the sizes do not fit together.
    """
    x, support, y = x.contiguous(), support.contiguous(), x.new_empty(x.shape[0], values.shape[0])
    fields = _sparse_fields(x.shape[1], atoms, values, support, atoms, scales, bias)
    _done(_loaded().factorformer_sparse(x.data_ptr(), len(x), fields, _address(bias), y.data_ptr()))
    return y


def sparse_matmul_transposed(x: Tensor, values: Tensor, support: Tensor, atoms: int, scales: Tensor | None) -> Tensor:
    """`x @ S`, `(n, rows)` to `(n, atoms)`.

    Raises:
        ModelError: the sizes do not fit together.
    """
    x, support, y = x.contiguous(), support.contiguous(), x.new_empty(x.shape[0], atoms)
    fields = _sparse_fields(x.shape[1], values.shape[0], values, support, atoms, scales, None)
    _done(_loaded().factorformer_sparse_transposed(x.data_ptr(), len(x), fields, y.data_ptr()))
    return y


def sparse_outer(left: Tensor, right: Tensor, support: Tensor, nonzeros: int) -> Tensor:
    """The entries of `left.T @ right` on the support: `(n, rows)` and `(n, atoms)` to `(rows, nonzeros)`.

    Raises:
        ModelError: the sizes do not fit together.
    """
    left, right, support = left.contiguous(), right.contiguous(), support.contiguous()
    (n, rows), (others, atoms) = left.shape, right.shape
    y = left.new_empty(rows, nonzeros)
    where = (support.data_ptr(), *support.shape, rows, nonzeros, atoms)
    _require("rows of the second input", others, n)
    fields = _sparse_array(n, others, where, 0, 0, False, -1, -1)
    _done(_loaded().factorformer_sparse_outer(left.data_ptr(), right.data_ptr(), n, fields, y.data_ptr()))
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

    Raises:
        ModelError: the sizes do not fit together.
    """
    numbers: list[int] = []
    for weight, scale, column in zip(weights, scales, columns, strict=True):
        numbers += (weight.data_ptr(), *weight.shape, _address(scale), _size(scale), weight.dtype == torch.int8, column)
    n, width = x.shape
    fields, out = _chain_array(width, _size(bias), *numbers)
    x, y = x.contiguous(), x.new_empty(n, out)
    _done(_loaded().factorformer_chain(x.data_ptr(), n, fields, len(weights), _address(bias), y.data_ptr()))
    return y


def sparse_rows(
    index: Tensor, values: Tensor, scales: Tensor | None, support: Tensor, dictionary: tuple[Tensor, Tensor | None]
) -> Tensor:
    """Rows of a sparse matrix times a dictionary: `(n)` to `(n, width)`.

    Args:
        index: of rows, int64.
        values: `(rows, nonzeros)`, float32, or int8 with scales.
        scales: one for each row.
        support: packed positions.
        dictionary: `(atoms, width)`, float32, or int8 with scales, one for each atom.

    Raises:
        IndexError: an index that is no row.
        ModelError: the sizes do not fit together.
    """
    table, table_scales = dictionary
    atoms, width = table.shape
    y, index, support = values.new_empty(len(index), width, dtype=torch.float32), _whole(index), support.contiguous()
    fields = _sparse_fields(atoms, atoms, values, support, atoms, scales, None)
    scale = _address(table_scales), _size(table_scales)
    matrix, _ = _chain_array(width, -1, table.data_ptr(), atoms, width, *scale, table.dtype == torch.int8, False)
    _done(_loaded().factorformer_sparse_rows(index.data_ptr(), len(index), fields, matrix, y.data_ptr()))
    return y


def kronecker_rows(
    index: Tensor,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    rank: int,
    shape: tuple[int, int],
) -> Tensor:
    """Rows of a sum of Kronecker products: `(n)` to `(n, width)`.

    Args:
        index: of rows, int64.
        left: `(m1, n1, rank)`, float32, or int8 with scales, one for each of `m1`.
        right: `(m2, rank, n2)`, the same for `m2`.
        rank: number of products.
        shape: of the table, `(rows, width)`.

    Raises:
        IndexError: an index that is no row.
        ModelError: the sizes do not fit together.
    """
    y, index = left[0].new_empty(len(index), shape[1], dtype=torch.float32), _whole(index)
    fields = _kronecker_fields(left, right, rank, shape)
    _done(_loaded().factorformer_kronecker_rows(index.data_ptr(), len(index), fields, y.data_ptr()))
    return y


def kronecker(
    x: Tensor,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    rank: int,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    """`x @ W.T + bias` for a few tokens and a sum of Kronecker products `W`: `(n, in)` to `(n, out)`.

    Args:
        x: the input.
        left, right, rank: as of `kronecker_rows`.
        shape: `(out, in)`.
        bias: `(out)`.

    Raises:
        ModelError: the sizes do not fit together.
    """
    _require("columns of the input", x.shape[1], shape[1])
    if bias is not None:
        _require("values of the bias", bias.numel(), shape[0])
    x, y = x.contiguous(), x.new_empty(x.shape[0], shape[0])
    fields = _kronecker_fields(left, right, rank, shape)
    _done(_loaded().factorformer_kronecker(x.data_ptr(), len(x), fields, _address(bias), y.data_ptr()))
    return y


def _kronecker_fields(
    left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], rank: int, shape: tuple[int, int]
) -> ctypes.Array:
    (weight, scales), (other, other_scales) = left, right
    return _kronecker_array(
        *(weight.data_ptr(), other.data_ptr(), _address(scales), _address(other_scales)),
        *(weight.shape, other.shape, rank, shape, weight.dtype == torch.int8, other.dtype == torch.int8),
        *(_size(scales), _size(other_scales)),
    )


def dense_rows(
    index: Tensor, table: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None] | None
) -> Tensor:
    """Rows of a table, or of the product of two matrices: `(n)` to `(n, width)`.

    Args:
        index: of rows, int64.
        table: `(rows, width)`, float32, or int8 with scales, one for each row.
        right: `(rank, width)`, the same, where the first is `(rows, rank)`.

    Raises:
        IndexError: an index that is no row.
        ModelError: the sizes do not fit together.
    """
    fields, second, width = _table_array(*_numbers(table), *(() if right is None else _numbers(right)))
    y, index = table[0].new_empty(len(index), width, dtype=torch.float32), _whole(index)
    _done(_loaded().factorformer_dense_rows(index.data_ptr(), len(index), fields, second, y.data_ptr()))
    return y


def _numbers(matrix: tuple[Tensor, Tensor | None]) -> tuple[int, ...]:
    weight, scales = matrix
    return (weight.data_ptr(), *weight.shape, _address(scales), _size(scales), weight.dtype == torch.int8)


def _whole(index: Tensor) -> Tensor:
    return index.to(torch.int64).contiguous()


def gelu(x: Tensor, y: Tensor) -> Tensor:
    """The exact GELU, within 4e-7; both contiguous, and perhaps the same."""
    _loaded().factorformer_gelu(x.data_ptr(), x.numel(), y.data_ptr())
    return y


def extremes(x: Tensor) -> Tensor:
    """The value of each group that is farthest from 0: `(rows, ...)` to `(rows, groups)`; both contiguous."""
    rows, width = _row_sizes(x)
    ends = x.new_empty(rows, -(-width // GROUP))
    _loaded().factorformer_extremes(x.data_ptr(), rows, width, ends.data_ptr())
    return ends


def round_rows(
    x: Tensor,
    reach: Tensor | None = None,
    levels: Tensor | None = None,
    bounds: Tensor | None = None,
    *,
    in_int8: bool = True,
) -> Tensor:
    """What products read of rows that are stored in integers, `(rows, ...)`.

    Args:
        x: the rows; all inputs are contiguous float32.
        reach: what the level 1 stands for, by groups, `(rows, groups)`; None for 8 bits.
        levels, bounds: of fewer bits, ascending, and what lies between each and the next.
        in_int8: whether products read them in 8 bits with a scale for each row.
    """
    (rows, width), y, count = _row_sizes(x), torch.empty_like(x), 0
    if reach is not None:
        assert levels is not None
        assert bounds is not None
        count = levels.numel()
        _require("bounds between levels", bounds.numel(), count - 1)
        _require("reaches of groups", reach.numel(), rows * -(-width // GROUP))
    where = (_address(reach), _address(levels), _address(bounds))
    _loaded().factorformer_round_rows(x.data_ptr(), rows, width, *where, count, in_int8, y.data_ptr())
    return y


def _row_sizes(x: Tensor) -> tuple[int, int]:
    """Rows of a factor, and their values."""
    return x.shape[0], x.numel() // max(x.shape[0], 1)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query @ key.T) @ value` over the keys that the mask allows.

    Args:
        query: `(batch, heads, queries, width)`; of this and the next two, the last dimension lies in one piece.
        key, value: `(batch, key heads, keys, width)`; a number of consecutive heads may share one of these.
        mask: booleans that broadcast to `(batch, heads, queries, keys)`; None for all.
        scale: of the scores.

    Returns:
        `(batch, queries, heads, width)`; the mean of all values where the mask allows no key.

    Raises:
        ModelError: the sizes do not fit together.
    """
    batch, heads, queries, width = query.shape
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, width) or heads % key.shape[1]:
        raise ModelError(
            f"attention: a query {tuple(query.shape)} does not go with a key {tuple(key.shape)} and a value "
            f"{tuple(value.shape)}; all have one batch and width, and key heads divide heads"
        )
    y = query.new_empty(batch, queries, heads, width)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, key.shape[2]).stride()
    numbers = (
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(mask), y.data_ptr()),
        *(batch, heads, key.shape[1], queries, key.shape[2], width),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides),
    )
    _done(_loaded().factorformer_attention((ctypes.c_int64 * len(numbers))(*numbers), scale))
    return y


def encode(fields: ctypes.Array, x: Tensor, rows: Tensor, starts: Tensor, y: Tensor) -> None:
    """What a stack of encoder layers makes of some rows; see `encoder.Encoder`."""
    where = (x.data_ptr(), rows.data_ptr(), starts.data_ptr())
    _done(_loaded().factorformer_encode(fields, *where, len(starts) - 1, y.data_ptr()))


def _loaded() -> ctypes.CDLL:
    assert _library is not None
    return _library


def _done(code: int) -> None:
    """Raise `MemoryError` unless a kernel found the scratch memory that it needs, `IndexError` for what is no row."""
    if code == NO_ROW:
        raise IndexError("index out of range in self")  # in the words of torch
    if code:
        raise MemoryError("the CPU kernels found no memory for intermediate results: multiply fewer rows at a time")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _size(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.numel()


def _sparse_fields(
    width: int,
    wanted: int,
    values: Tensor,
    support: Tensor,
    atoms: int,
    scales: Tensor | None,
    bias: Tensor | None,
) -> ctypes.Array:
    where = (support.data_ptr(), *support.shape, *values.shape, atoms)
    integers = values.dtype == torch.int8
    return _sparse_array(
        width, wanted, where, values.data_ptr(), _address(scales), integers, _size(scales), _size(bias)
    )


# What C reads is made, and its sizes compared, once for each layer: that is faster than in each call.


@functools.lru_cache(maxsize=4096)
def _sparse_array(
    width: int,
    wanted: int,
    where: tuple[int, ...],
    values: int,
    scales: int,
    integers: bool,
    scale_size: int,
    bias_size: int,
) -> ctypes.Array:
    address, supports, packed, rows, nonzeros, atoms = where
    _require("columns of the input", width, wanted)
    if min(rows, nonzeros) < 1 or nonzeros > atoms:
        raise ModelError(
            f"a sparse matrix of {rows} rows, {atoms} atoms and {nonzeros} nonzeros a row: there is at least one row, "
            "and a row has at least one nonzero and at most as many as atoms"
        )
    _require("rows of the sparse support", supports, rows)
    _require("bytes of a row of the sparse support", packed, row_bytes(atoms, nonzeros))
    _require("scales of the sparse matrix", scale_size, rows if integers else -1)
    if bias_size != -1:
        _require("values of the bias", bias_size, rows)
    numbers = (address, rows, packed, nonzeros, atoms, CODES[code_of(atoms, nonzeros)], values, scales, integers)
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.lru_cache(maxsize=4096)
def _kronecker_array(
    left: int,
    right: int,
    left_scales: int,
    right_scales: int,
    left_size: tuple[int, ...],
    right_size: tuple[int, ...],
    rank: int,
    shape: tuple[int, int],
    left_integers: bool,
    right_integers: bool,
    *scale_sizes: int,
) -> ctypes.Array:
    (m1, n1, first), (m2, second, n2) = left_size, right_size
    for found in (first, second):
        _require("products of Kronecker", found, rank)
    _require("types of the factors", right_integers, left_integers)
    for found, wanted in zip(scale_sizes, (m1, m2) if left_integers else (-1, -1), strict=True):
        _require("scales of a factor", found, wanted)
    if m1 * m2 < shape[0] or n1 * n2 < shape[1]:
        raise ModelError(f"products of Kronecker of {m1}x{n1} and {m2}x{n2} make no table of {shape[0]}x{shape[1]}")
    numbers = (left, right, left_scales, right_scales, n1, rank, m2, n2, *shape, left_integers)
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.lru_cache(maxsize=4096)
def _table_array(*numbers: int) -> tuple[ctypes.Array, ctypes.Array | None, int]:
    """A table and the matrix that its rows are multiplied by, if there is one, as C reads them; and the width."""
    inner = numbers[2]
    table, _ = _chain_array(inner, -1, *numbers[:6], False)
    if len(numbers) == 6:
        return table, None, inner
    right, width = _chain_array(inner, -1, *numbers[6:], True)
    return table, right, width


@functools.lru_cache(maxsize=4096)
def _chain_array(width: int, bias_size: int, *numbers: int) -> tuple[ctypes.Array, int]:
    """The matrices as C reads them, and the columns of the product."""
    if not 1 <= len(numbers) // 7 <= LONGEST:
        raise ModelError(f"a chain has 1 to {LONGEST} matrices, got {len(numbers) // 7}")
    fields: list[int] = []
    for first in range(0, len(numbers), 7):
        weight, rows, inner, scales, scale_size, integers, column = numbers[first : first + 7]
        out, wide = (inner, rows) if column else (rows, inner)
        _require("columns of the input", width, wide)
        _require("scales of a matrix", scale_size, rows if integers else -1)
        if integers and wide > WIDEST:
            raise ModelError(f"int8 matrices have at most {WIDEST} columns here, got {wide}")
        fields += (weight, scales, out, wide, integers, column)
        width = out
    if bias_size != -1:
        _require("values of the bias", bias_size, width)
    return (ctypes.c_int64 * len(fields))(*fields), width


def _require(what: str, given: int, wanted: int) -> None:
    if given != wanted:
        numbers = ("none" if number == -1 else str(number) for number in (given, wanted))
        raise ModelError("{}: got {}, but the product takes {}".format(what, *numbers))
