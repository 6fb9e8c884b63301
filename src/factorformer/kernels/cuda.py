"""The products with a sparse matrix on GPUs: the kernels of `kernels.triton_sparse` behind the operators.

`register` makes the operators use them on CUDA. Triton, which comes with CUDA builds of torch, is imported when a
tensor on a GPU first reaches one. Where it is missing or cannot compile (no C compiler, a GPU older than Ampere) and
for types other than float32, float16 and bfloat16, the reference implementation goes on.

Beside the result no memory is taken, but for `S`: where it is no larger than that (see `kernels.triton_sparse`), and in
transposed products up to `WRITTEN` bytes.
Products of float32 are exact (IEEE) unless torch was told that its own matrix products may use TF32. Sums are in
float32, in an order that depends on shapes alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels import sparse
from factorformer.kernels._compat import reference
from factorformer.kernels.support import CODES, code_of, row_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types of inputs and values that the kernels multiply."""

OLDEST = (8, 0)
"""Compute capability of the oldest GPUs that multiply bfloat16 in tensor cores, Ampere."""

AXES = {
    "densify": ("rows", "atoms"),
    "matmul": ("n", "rows"),
    "matmul_transposed": ("n", "atoms"),
    "outer": ("rows", "atoms"),
}
"""The two dimensions of each kernel's result, which its programs share among them."""

CHUNK = 16
"""Positions of a list that are read per iteration."""

WRITTEN = 64 << 20
"""Bytes up to which a transposed product writes `S` as a dense matrix first, for however few rows of input.

Its kernel runs through all rows of `S` in each program, and has few programs: on an H200 it took up to 22 times as long
as a dense product, where writing `S` takes a few microseconds."""

PROGRAMS = 128
"""As many keep a large GPU busy: an H100 has 132 multiprocessors."""


def sparse_matmul(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`x @ S.T`: `(n, atoms)` to `(n, rows)`.

    Raises:
        ModelError: if sizes disagree.
    """
    rows, nonzeros = values.shape
    _check(x.shape[1], atoms, rows, atoms, nonzeros, support)
    if x.shape[0] >= atoms:
        return x @ _densified(values, support, atoms).T
    result = x.new_empty(x.shape[0], rows)
    return _launch("matmul", (x,), (values,), support, result, rows, atoms, nonzeros)


def sparse_matmul_transposed(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`x @ S`: `(n, rows)` to `(n, atoms)`.

    Raises:
        ModelError: if sizes disagree.
    """
    rows, nonzeros = values.shape
    _check(x.shape[1], rows, rows, atoms, nonzeros, support)
    if x.shape[0] >= rows or rows * atoms * x.element_size() <= WRITTEN:
        return x @ _densified(values, support, atoms)
    result = x.new_empty(x.shape[0], atoms)
    return _launch("matmul_transposed", (x,), (values,), support, result, rows, atoms, nonzeros)


def sparse_outer(left: Tensor, right: Tensor, support: Tensor, nonzeros: int) -> Tensor:
    """The entries of `left.T @ right` on the support: `(n, rows)` and `(n, atoms)` to `(rows, nonzeros)`.

    Raises:
        ModelError: if sizes disagree.
    """
    (n, rows), atoms = left.shape, right.shape[1]
    _check(right.shape[0], n, rows, atoms, nonzeros, support)
    result = left.new_empty(rows, nonzeros)
    return _launch("outer", (left, right), (), support, result, rows, atoms, nonzeros)


def register(device: str = "cuda") -> None:
    """Make the operators use these kernels for tensors on a kind of device.

    Args:
        device: `cuda`; or `cpu`, where the kernels run in Triton's interpreter if `TRITON_INTERPRET=1` was set before
            Triton was imported.
    """
    for operator, kernel in (
        (sparse.sparse_matmul, sparse_matmul),
        (sparse.sparse_matmul_transposed, sparse_matmul_transposed),
        (sparse.sparse_outer, sparse_outer),
    ):
        operator.register_kernel(device, _where_it_runs(kernel, reference(operator)))


def _where_it_runs(kernel: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel for what it can multiply here, the reference for everything else."""

    @functools.wraps(reference)
    def choose(first: Tensor, second: Tensor, support: Tensor, size: int) -> Tensor:
        fits = first.dtype == second.dtype and first.dtype in DTYPES and available(first.device)
        return (kernel if fits else reference)(first, second, support, size)

    return choose


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton is here and can compile for a device, or interprets its kernels on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and torch.cuda.get_device_capability(device) >= OLDEST


def _densified(values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`S` as a dense matrix, `(rows, atoms)`: for so much input that the result of the product is no smaller."""
    rows, nonzeros = values.shape
    result = values.new_empty(rows, atoms)
    return _launch("densify", (), (values,), support, result, rows, atoms, nonzeros)


def tiles_of(kernel: str, dtype: torch.dtype, n: int, rows: int, atoms: int) -> dict[str, int]:
    """Rows of input, rows of `S` and words of 32 atoms in a tile, positions read per iteration, and warps.

    Few rows of input take low tiles, narrower ones too, so that there are enough programs to keep a GPU busy. Larger
    tiles than these fill the registers, in float32 first, which tensor cores do not multiply.
    """
    half = dtype != torch.float32
    if kernel in ("outer", "densify"):
        width = 2 if half else 1
        return {"BLOCK_N": 32 * width, "BLOCK_ROWS": 64, "WIDTH": width, "CHUNK": CHUNK, "num_warps": 4}
    block_n = min(128, max(16, 1 << (n - 1).bit_length()))
    columns = rows if kernel == "matmul" else atoms
    large = half and _pieces(n, block_n) * _pieces(columns, 64) >= PROGRAMS
    return {
        "BLOCK_N": block_n,
        "BLOCK_ROWS": 64 if large else 32,
        "WIDTH": 2 if large and kernel == "matmul_transposed" else 1,
        "CHUNK": CHUNK,
        "num_warps": 8 if block_n == 128 else 4,
    }


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _check(given: int, expected: int, rows: int, atoms: int, nonzeros: int, support: Tensor) -> None:
    """A kernel reads whatever lies where it is told to, so the sizes have to agree."""
    supports, stride = support.shape
    if given != expected:
        raise ModelError(f"an input of a sparse product has size {given} where {expected} is needed")
    if (supports, stride) != (rows, row_bytes(atoms, nonzeros)):
        raise ModelError(
            f"a sparse support of {supports} rows of {stride} bytes does not belong to a matrix of {rows} rows with "
            f"{nonzeros} nonzeros in {atoms} columns, which takes {rows} rows of {row_bytes(atoms, nonzeros)} bytes"
        )


def _launch(
    name: str,
    inputs: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    support: Tensor,
    result: Tensor,
    rows: int,
    atoms: int,
    nonzeros: int,
) -> Tensor:
    if not result.numel():
        return result
    from factorformer.kernels import triton_sparse

    kernel: Any = getattr(triton_sparse, name)
    device, n = result.device, inputs[0].shape[0] if inputs else 0
    code = code_of(atoms, nonzeros)
    support = support.contiguous()
    if code == "bitmap" and support.shape[1] % 4 == 0 and support.data_ptr() % 4 == 0:
        support = support.view(torch.int32)  # one load for 32 atoms instead of four
    stride = support.shape[1]
    tiles = tiles_of(name, result.dtype, n, rows, atoms)
    pieces = {
        "n": _pieces(n, tiles["BLOCK_N"]),
        "rows": _pieces(rows, tiles["BLOCK_ROWS"]),
        "atoms": _pieces(atoms, 32 * tiles["WIDTH"]),
    }
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(pieces[axis] for axis in AXES[name])](
            *inputs,
            *(tensor.contiguous() for tensor in values),
            *(support, result),
            *(n, rows, atoms, nonzeros, stride),
            *(step for tensor in inputs for step in tensor.stride()),
            CODE=CODES[code],
            PRECISION=_precision(device),
            **tiles,
        )
    return result


def _precision(device: torch.device) -> str:
    """How products of float32 are made: as torch makes its own on GPUs."""
    if device.type != "cuda":
        return "interpreted"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"  # before torch 2.9
