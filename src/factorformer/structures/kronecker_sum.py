"""Sums of Kronecker products: low-rank factorizations of a reshaped, rearranged matrix."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels import Dense, chain, kronecker, kronecker_rows
from factorformer.structures.base import Factors, Selection, Shape, Structure, TensorSpec, require_positive
from factorformer.structures.integers import SCALE, Rounded, floats

AMPLIFICATION = 4
"""Multiply-adds for each parameter and input row that the default shapes aim at; plain low-rank has 1."""

ROWS_AT_ONCE = 1024
"""Rows per tile of inference on a CPU: beyond, intermediate results leave the cache and fault new pages."""

LARGEST_SELECTION = 64
"""Up to this many multiply-adds for each gathered value, rows are cheaper by one GEMM than by gathering factors."""


@dataclasses.dataclass(frozen=True)
class KroneckerSum(Structure):
    """`W = sum_k A_k (x) B_k`, the Kronecker products of `A_k: left = (m1, n1)` and `B_k: right = (m2, n2)`.

    `W[i1 * m2 + i2, j1 * n2 + j2] = sum_k A_k[i1, j1] * B_k[i2, j2]`, cropped to `(out, in)` where `m1 * m2` or
    `n1 * n2` is larger. This is what Shapeshifter (Panahi, Saeedi and Arodz, NeurIPS 2021) makes of every matrix.

    The product with an input row `X`, read as `n1 x n2`, is `sum_k A_k X B_k^T`: two GEMMs around one permutation, at
    `rank * n1 * m2 * (n2 + m1)` multiply-adds if the right factors go first, `rank * m1 * n2 * (n1 + m2)` otherwise.
    With `n1 = m2 = a` and `m1 * n1 = m2 * n2` that is `a` multiply-adds for each of the `rank * (m1 * n1 + m2 * n2)`
    parameters, and `W` can have rank `rank * a^2`: `a = 1` is plain low-rank, larger `a` buys rank with time.

    Stored are `weight: (m1, n1, rank)` and `right: (m2, rank, n2)`, the layouts that both GEMMs read as they are.

    Args:
        rank: number of Kronecker products, at least 1.
        left: shape of the left factors.
        right: shape of the right factors.

    >>> KroneckerSum.of((512, 512), rank=25)
    KroneckerSum(rank=25, left=(128, 4), right=(4, 128))
    >>> KroneckerSum.of((512, 512), rank=25).parameters((512, 512)), 512 * 512
    (25600, 262144)
    """

    kind: ClassVar[str] = "kronecker_sum"
    relative_errors: ClassVar[tuple[tuple[float, float], ...]] = ((1 / 3, 1.3),)  # of MiniLM
    rank: int
    left: tuple[int, int]
    right: tuple[int, int]

    def __post_init__(self) -> None:
        require_positive("rank", self.rank)
        for name, sides in (("left", self.left), ("right", self.right)):
            if not isinstance(sides, tuple) or len(sides) != 2:
                raise ModelError(f"{name} must be the two sides of a factor, such as (128, 4), got {sides!r}")
            for side in sides:
                require_positive(f"each side of {name}", side)

    @classmethod
    def of(cls, shape: Shape, rank: int) -> KroneckerSum:
        """`rank` Kronecker products of the default shapes for a matrix of this shape."""
        return cls(rank, *factor_shapes(shape))

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        (m1, n1), (m2, n2) = self.left, self.right
        return {"weight": TensorSpec((m1, n1, self.rank)), "right": TensorSpec((m2, self.rank, n2))}

    def flops(self, shape: Shape) -> int:
        return 2 * self.rank * min(_multiplications(self.left, self.right))

    def row_flops(self, shape: Shape) -> int:
        (_, n1), (m2, n2) = self.left, self.right
        return 2 * self.rank * n1 * n2 * (m2 if self._selects else 1)

    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        for side, whole, first, second in zip(("out", "in"), shape, self.left, self.right, strict=True):
            if first * second < whole:
                raise ModelError(
                    f"{self} reaches {side} = {first} * {second} = {first * second} of a {shape[0]}x{shape[1]} matrix; "
                    f"the sides have to multiply to at least {whole}, as those of {self._suggestion(shape)}"
                )
        largest = _largest_rank(shape, self.left, self.right)
        if self.rank > largest:
            allowed = f"allowed: 1 to {largest}; " if largest else ""
            raise ModelError(
                f"rank {self.rank} of {self} for a {shape[0]}x{shape[1]} matrix stores no less than the dense matrix, "
                f"or more terms than any such matrix needs; {allowed}keep the matrix dense instead"
            )
        for side, whole, first, second in zip(("out", "in"), shape, self.left, self.right, strict=True):
            if (first - 1) * second >= whole:
                raise ModelError(
                    f"{self} of a {shape[0]}x{shape[1]} matrix stores padding only: {-(-whole // second)} of {first} "
                    f"by {second} are enough for {side} = {whole}; use {self._suggestion(shape)}"
                )

    def _suggestion(self, shape: Shape) -> str:
        left, right = factor_shapes(shape)
        return f"left={left}, right={right}"

    @property
    def _right_first(self) -> bool:
        right_first, left_first = _multiplications(self.left, self.right)
        return right_first <= left_first

    @property
    def _selects(self) -> bool:
        return self._right_first and self.left[1] * self.right[0] <= LARGEST_SELECTION

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        """All factors are values."""

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(factors, Rounded):
            found = kronecker(x, *self._stored(factors), self.rank, shape, bias)
            if found is not None:
                return found
        (m1, n1), (m2, n2) = self.left, self.right
        leading, padding, factors = x.shape[:-1], n1 * n2 - shape[1], floats(factors, x.dtype)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            blocks = x.reshape(-1, shape[1]).split(ROWS_AT_ONCE)
            if len(blocks) > 1:
                products = [self.matmul(shape, factors, block, bias) for block in blocks]
                return torch.cat(products).view(*leading, shape[0])
        x = F.pad(x, (0, padding)) if padding else x
        if self._right_first:
            inner = _product(x.reshape(-1, n2), factors["right"].flatten(0, 1))
            inner = inner.view(-1, n1, m2, self.rank).transpose(1, 2).reshape(-1, n1 * self.rank)
            product = _product(inner, factors["weight"].flatten(1)).view(-1, m2, m1).transpose(1, 2)
        else:
            rows = x.reshape(-1, n1, n2).transpose(1, 2).reshape(-1, n1)
            inner = _product(rows, factors["weight"].transpose(1, 2).reshape(-1, n1))
            inner = inner.view(-1, n2, m1, self.rank).permute(0, 2, 3, 1).reshape(-1, self.rank * n2)
            product = _product(inner, factors["right"].flatten(1)).view(-1, m1, m2)
        product = product.flatten(1)[:, : shape[0]].reshape(*leading, shape[0])
        return product if bias is None else product + bias.to(product.dtype)

    @staticmethod
    def _stored(factors: Factors) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Both factors, and the scales of int8."""
        weight, right = ((factors[name], factors.get(name + SCALE)) for name in ("weight", "right"))
        return weight, right

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        if not isinstance(factors, Rounded):
            found = kronecker_rows(index, *self._stored(factors), self.rank, shape)
            if found is not None:
                return found
        return self.exported_rows(shape, factors, index)

    def exported_rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        """By gathering both factors of each row, or one where that is faster."""
        (m1, n1), (m2, n2), factors = self.left, self.right, floats(factors)
        first = torch.div(index, m2, rounding_mode="floor").flatten()
        second = (index - first.view_as(index) * m2).flatten()
        if m1 * m2 > shape[0]:  # an index of padding, which would pass for a row, becomes one that look-ups refuse
            first = torch.where(index.flatten() < shape[0], first, m1)
        left = F.embedding(first, factors["weight"].flatten(1)).view(-1, n1, self.rank)
        if self._selects:
            # Each row's left factors, placed where the right factors of its `i2` stand, so that one GEMM finds both.
            chosen = second[:, None] == torch.arange(m2, device=index.device)
            placed = left[:, :, None, :] * chosen[:, None, :, None].to(left.dtype)
            result = F.linear(placed.view(-1, m2 * self.rank), factors["right"].flatten(0, 1).T)
        else:
            right = F.embedding(second, factors["right"].flatten(1)).view(-1, self.rank, n2)
            result = left @ right
        return result.view(-1, n1 * n2)[:, : shape[1]].reshape(*index.shape, shape[1])

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        factors = floats(factors)
        terms = factors["weight"].flatten(0, 1) @ factors["right"].transpose(0, 1).flatten(1)
        return arrange_back(terms, self.left, self.right)[: shape[0], : shape[1]]

    @classmethod
    def truncated(cls, weight: Tensor, scaled: Tensor, *, plain: bool) -> Tensor | None:
        """The rearranged weight (Van Loan and Pitsianis, 1993); under any other metric there is no closed form."""
        return rearrange(weight.float(), *factor_shapes((weight.shape[0], weight.shape[1]))) if plain else None

    @property
    def units(self) -> int:
        return self.rank

    def with_units(self, units: int) -> KroneckerSum:
        return dataclasses.replace(self, rank=units)

    def select(self, factors: Factors, kept: Tensor, smaller: Structure) -> Selection:
        return Selection(
            smaller, {"weight": lambda t: t.index_select(2, kept), "right": lambda t: t.index_select(1, kept)}
        )

    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Tensor]:
        return {"weight": values["weight"].flatten(0, 1).T, "right": values["right"].transpose(0, 1).flatten(1)}

    def initialize(self, factors: Factors, std: float) -> None:
        # Independent entries would give the variance `rank * s^4` only on average; few terms stray far from it. The
        # mean square of all entries of W is known exactly from the Gram matrices of the terms, and is set to `std^2`.
        weight, right = factors["weight"], factors["right"]
        left_draw, right_draw = (torch.randn(f.shape, device=f.device) for f in (weight, right))
        left_gram = left_draw.flatten(0, 1).T @ left_draw.flatten(0, 1)
        right_gram = torch.einsum("akb,alb->kl", right_draw, right_draw)
        mean_square = (left_gram * right_gram).sum() / (math.prod(self.left) * math.prod(self.right))
        scale = (std**2 / mean_square) ** 0.25
        weight.copy_(left_draw * scale)
        right.copy_(right_draw * scale)

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[KroneckerSum]:
        left, right = factor_shapes(shape)
        return (cls(rank, left, right) for rank in range(1, _largest_rank(shape, left, right) + 1))

    @classmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[list[KroneckerSum]]:
        return (list(cls.candidates(shape, dtype)),)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return chain(x, (Dense(weight),))


def factor_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """Default shapes `left = (m1, n1)` and `right = (m2, n2)` of the factors for a matrix `(out, in)`.

    Among powers of two for `n1` and `m2`, the pair is taken that is nearest to three wishes: a square rearranged matrix
    (`m1 * n1 = m2 * n2`, where a given number of parameters fits best), `AMPLIFICATION` multiply-adds for each
    parameter, and no padding.

    >>> factor_shapes((2048, 512)), factor_shapes((8000, 512))
    (((512, 2), (4, 256)), ((1000, 2), (8, 256)))
    """
    out, inner = shape
    powers = [2**power for power in range(11)]
    columns = [n1 for n1 in powers if (n1 - 1) * -(-inner // n1) < inner]  # others would store padding only
    pairs = [pair for pair in itertools.product(columns, powers) if pair[1] <= out]
    return _complete(shape, min(pairs, key=lambda pair: _distance(shape, pair)))


def _distance(shape: Shape, pair: tuple[int, int]) -> float:
    """How far the factor shapes with these `n1` and `m2` are from all that is wanted of them."""
    left, right = _complete(shape, pair)
    sizes = math.prod(left), math.prod(right)
    amplification = min(_multiplications(left, right)) / sum(sizes)
    padding = sizes[0] * sizes[1] / math.prod(shape)
    ragged = sum(side % 8 != 0 for side in (left[0], right[1])) / 8
    return (
        abs(math.log2(sizes[0] / sizes[1]))
        + abs(math.log2(amplification / AMPLIFICATION))
        + ragged
        + (8 * math.log2(padding))
    )


def _complete(shape: Shape, pair: tuple[int, int]) -> tuple[Shape, Shape]:
    """The factor shapes with these `n1` and `m2`, and the least padding."""
    n1, m2 = pair
    return (-(-shape[0] // m2), n1), (m2, -(-shape[1] // n1))


def _multiplications(left: Shape, right: Shape) -> tuple[int, int]:
    """Multiply-adds for each term and input row: right factors first, and left factors first."""
    (m1, n1), (m2, n2) = left, right
    return n1 * m2 * (n2 + m1), m1 * n2 * (n1 + m2)


def _largest_rank(shape: Shape, left: Shape, right: Shape) -> int:
    """Terms that are fewer than the rearranged matrix's rank and stored in less than the dense matrix."""
    sizes = math.prod(left), math.prod(right)
    return min(*sizes, (shape[0] * shape[1] - 1) // sum(sizes))


def rearrange(
    matrix: Float[Tensor, "out inner"], left: tuple[int, int], right: tuple[int, int]
) -> Float[Tensor, "left_size right_size"]:
    """The rearrangement that turns a Kronecker product into an outer product (Van Loan and Pitsianis, 1993).

    With `left = (m1, n1)` and `right = (m2, n2)`, entry `[i1 * m2 + i2, j1 * n2 + j2]` goes to
    `[i1 * n1 + j1, i2 * n2 + j2]`, so that `A (x) B` becomes `vec(A) vec(B)^T`, a sum of `k` such products a matrix of
    rank `k`, and Frobenius norms stay what they are.

    Args:
        matrix: `(out, in)`, padded with zeros to `(m1 * m2, n1 * n2)`.
        left: shape of the first factor.
        right: shape of the second factor.

    Returns:
        `(m1 * n1, m2 * n2)`.
    """
    (m1, n1), (m2, n2) = left, right
    padded = F.pad(matrix, (0, n1 * n2 - matrix.shape[1], 0, m1 * m2 - matrix.shape[0]))
    return padded.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def arrange_back(
    rearranged: Float[Tensor, "left_size right_size"], left: tuple[int, int], right: tuple[int, int]
) -> Float[Tensor, "padded_out padded_inner"]:
    """The matrix `(m1 * m2, n1 * n2)` whose `rearrange` is the given one, padding included."""
    (m1, n1), (m2, n2) = left, right
    return rearranged.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)
