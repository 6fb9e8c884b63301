"""Products with a sparse matrix that stores the same number of entries in each row: the reference implementation.

`S: (rows, atoms)` is given as `values: (rows, nonzeros)` and a packed `support`, `(rows, bytes)` (see
`kernels.support`). The operators are registered with torch, with their shapes, derivatives, types
under autocast and FLOPs, so that compilers, exporters and counters know them. The compiled kernels take what they can
on the CPU; everything else goes to the reference, which builds a few rows of `S` at a time.
"""

# Annotations stay types here: torch reads the schemas of operators from them.

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from factorformer.kernels import cpu
from factorformer.kernels.support import unpack

WORKSPACE = 2**19
"""Entries of `S` per tile of the reference implementation."""


@torch.library.custom_op("factorformer::sparse_positions", mutates_args=())
def sparse_positions(support: Tensor, atoms: int, nonzeros: int) -> Tensor:
    """Positions of the nonzeros, int64: `(rows, bytes)` to `(rows, nonzeros)`."""
    return unpack(support, atoms, nonzeros)


@torch.library.custom_op("factorformer::sparse_matmul", mutates_args=())
def sparse_matmul(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`x @ S.T`: `(n, atoms)` to `(n, rows)`."""
    if cpu.serves(x, values, support=support):
        return cpu.sparse_matmul(x, values, support, atoms, None, None)
    result = x.new_empty(x.shape[0], values.shape[0])
    for rows, part in _parts(values, support, atoms):
        result[:, rows] = x @ part.T
    return result


@torch.library.custom_op("factorformer::sparse_matmul_transposed", mutates_args=())
def sparse_matmul_transposed(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`x @ S`: `(n, rows)` to `(n, atoms)`."""
    if cpu.serves(x, values, support=support):
        return cpu.sparse_matmul_transposed(x, values, support, atoms, None)
    result = x.new_zeros(x.shape[0], atoms, dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, part in _parts(values, support, atoms):
        result += x[:, rows] @ part
    return result.to(x.dtype)


@torch.library.custom_op("factorformer::sparse_outer", mutates_args=())
def sparse_outer(left: Tensor, right: Tensor, support: Tensor, nonzeros: int) -> Tensor:
    """The entries of `left.T @ right` on the support: `(n, rows)` and `(n, atoms)` to `(rows, nonzeros)`."""
    if left.dtype == right.dtype and cpu.serves(left, right.contiguous(), support=support):
        return cpu.sparse_outer(left, right, support, nonzeros)
    rows, atoms = left.shape[1], right.shape[1]
    result = left.new_empty(rows, nonzeros)
    for chosen in _ranges(rows, atoms):
        result[chosen] = (left[:, chosen].T @ right).gather(1, unpack(support[chosen], atoms, nonzeros))
    return result


def build(values: Tensor, support: Tensor, atoms: int) -> Tensor:
    """`S` itself, `(rows, atoms)`; differentiable in the values."""
    rows, nonzeros = values.shape
    positions = sparse_positions(support, atoms, nonzeros)
    return values.new_zeros(rows, atoms).scatter(1, positions, values)


def _parts(values: Tensor, support: Tensor, atoms: int) -> Iterator[tuple[slice, Tensor]]:
    for rows in _ranges(len(values), atoms):
        yield rows, build(values[rows], support[rows], atoms)


def _ranges(rows: int, atoms: int) -> list[slice]:
    """Consecutive rows that fit into the workspace, in parts of even size."""
    pieces = max(1, math.ceil(rows / max(1, WORKSPACE // atoms)))
    step = max(1, math.ceil(rows / pieces))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


@sparse_positions.register_fake
def _(support: Tensor, atoms: int, nonzeros: int) -> Tensor:
    return support.new_empty(support.shape[0], nonzeros, dtype=torch.int64)


@sparse_matmul.register_fake
def _(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@sparse_matmul_transposed.register_fake
def _(x: Tensor, values: Tensor, support: Tensor, atoms: int) -> Tensor:
    return x.new_empty(x.shape[0], atoms)


@sparse_outer.register_fake
def _(left: Tensor, right: Tensor, support: Tensor, nonzeros: int) -> Tensor:
    return left.new_empty(left.shape[1], nonzeros)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, support, ctx.atoms = inputs
    ctx.save_for_backward(x, values, support)


def _derivative(other: Any, *, transposed: bool) -> Any:
    """The derivative of one of the two products, by the `other` one."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, values, support = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_x = for_values = None
        if ctx.needs_input_grad[0]:
            for_x = other(gradient, values, support, ctx.atoms)
        if ctx.needs_input_grad[1]:
            of_rows, of_atoms = (x, gradient) if transposed else (gradient, x)
            for_values = sparse_outer(of_rows, of_atoms, support, values.shape[1])
        return for_x, for_values, None, None, None

    return backward


sparse_matmul.register_autograd(_derivative(sparse_matmul_transposed, transposed=False), setup_context=_remember)
sparse_matmul_transposed.register_autograd(_derivative(sparse_matmul, transposed=True), setup_context=_remember)


def _flops(x: Any, values: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(values)


register_flop_formula([torch.ops.factorformer.sparse_matmul, torch.ops.factorformer.sparse_matmul_transposed])(_flops)


@register_flop_formula(torch.ops.factorformer.sparse_outer)
def _outer_flops(left: Any, right: Any, support: Any, nonzeros: int, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * nonzeros
