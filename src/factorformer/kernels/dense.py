"""Products with a chain of small dense matrices, `x @ W_1.T @ W_2.T ... + bias`: the dispatch, and the reference.

Where the compiled kernels serve, a block of tokens goes through the whole chain inside of the caches, and int8 weights
are multiplied as integers; everywhere else, and wherever a gradient is wanted, torch multiplies.
"""

# Annotations stay types here: torch reads the schemas of operators from them.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from factorformer.kernels import cpu
from factorformer.kernels._compat import unobserved


class Dense(NamedTuple):
    """One matrix `W: (out, in)` of a chain.

    Args:
        weight: `W` in floats or int8, or its transpose.
        scales: of int8, one for each row as stored.
        columns: whether `weight` is the transpose, `(in, out)`.
    """

    weight: Tensor
    scales: Tensor | None = None
    columns: bool = False

    def values(self, dtype: torch.dtype) -> Tensor:
        """`W` in floats, `(out, in)`."""
        values = self.weight
        if self.scales is not None:
            values = values.to(dtype) * self.scales.to(dtype)[:, None]
        return values.T if self.columns else values


def chain(x: Tensor, matrices: Sequence[Dense], bias: Tensor | None = None) -> Tensor:
    """`x @ W_1.T @ W_2.T ... + bias`: `(..., in)` to `(..., out)`."""
    weights = [matrix.weight for matrix in matrices]
    scales = [matrix.scales for matrix in matrices]
    fits = len(matrices) <= cpu.LONGEST and all(
        m.scales is None or m.weight.shape[0 if m.columns else 1] <= cpu.WIDEST for m in matrices
    )
    if fits and served(x, *weights, *scales, bias):
        columns = [matrix.columns for matrix in matrices]
        flat = x.reshape(-1, x.shape[-1])
        operator = torch.ops.factorformer.chain if torch.compiler.is_compiling() else cpu.chain
        y = operator(flat, weights, scales, columns, bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    for matrix in matrices[:-1]:
        x = F.linear(x, matrix.values(x.dtype))
    return F.linear(x, matrices[-1].values(x.dtype), bias)


def kronecker(
    x: Tensor,
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    rank: int,
    shape: tuple[int, int],
    bias: Tensor | None = None,
) -> Tensor | None:
    """`x @ W.T + bias` with a sum of Kronecker products, `(..., in)` to `(..., out)`; None where no kernel serves.

    One does for a few tokens and factors whose inner sides, `n1` and `m2`, are a few: products of torch take less time
    there than what lies between them.

    Args:
        x: the input.
        left: `(m1, n1, rank)`, and the scales of int8, one for each of `m1`.
        right: `(m2, rank, n2)`, and the same for `m2`.
        rank: number of products.
        shape: `(out, in)`.
        bias: `(out)`.
    """
    # Graphs are for any number of tokens: it is not to be looked at where one is made.
    if torch.compiler.is_compiling() or not served(x, *left, *right, bias):
        return None
    if x.numel() > cpu.FEW * shape[1] or max(left[0].shape[1], right[0].shape[0]) > cpu.INNER:
        return None
    return cpu.kronecker(x.reshape(-1, x.shape[-1]), left, right, rank, shape, bias).view(*x.shape[:-1], shape[0])


def served(x: Tensor, *others: Tensor | None, support: Tensor | None = None) -> bool:
    """Whether the compiled kernels do this product: they are there, and it is for inference alone.

    That is, nothing asks for a derivative or a cast, counts operators of torch, or takes their graph elsewhere.
    """
    if not cpu.serves(x, *others, support=support) or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled():
        for tensor in (x, *others):
            if tensor is not None and tensor.requires_grad:
                return False
    if torch.compiler.is_compiling():
        return True
    return unobserved()


def rounds(x: Tensor) -> bool:
    """Whether the compiled kernels round a factor, in training as well."""
    return cpu.serves(x, x) and x.dim() > 0 and not x.is_neg() and not torch.compiler.is_compiling() and unobserved()


def gelu(x: Tensor, *, overwrite: bool = False) -> Tensor:
    """The exact GELU, in place of its input if that may be lost and the compiled kernels serve."""
    if served(x) and x.is_contiguous() and not torch.compiler.is_compiling():
        return cpu.gelu(x, x if overwrite else torch.empty_like(x))
    return F.gelu(x)


@torch.library.custom_op("factorformer::chain", mutates_args=())
def _chain(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor | None],
    columns: list[bool],
    bias: Tensor | None,
) -> Tensor:
    return cpu.chain(x, weights, scales, columns, bias)


@_chain.register_fake
def _(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], columns: list[bool], bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weights[-1].shape[1 if columns[-1] else 0])
