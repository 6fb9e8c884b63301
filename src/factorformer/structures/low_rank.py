"""Low-rank matrices: the product of a tall and a wide factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels import Dense as Factor
from factorformer.kernels import chain, dense_rows
from factorformer.structures.base import Factors, Selection, Shape, Structure, TensorSpec, require_positive
from factorformer.structures.integers import Rounded, dense, floats, look_up


@dataclasses.dataclass(frozen=True)
class LowRank(Structure):
    """`W = weight @ right` with `weight: (out, rank)` and `right: (rank, in)`.

    Above the break-even rank `out * in / (out + in)` the factors would be larger than the matrix: such a spec is
    refused, and planners keep the matrix dense.

    Args:
        rank: number of rank-one groups, at least 1.

    >>> LowRank(rank=64).parameters((768, 768)), 768 * 768
    (98304, 589824)
    """

    kind: ClassVar[str] = "low_rank"
    starts_dense: ClassVar[bool] = True
    rank: int

    def __post_init__(self) -> None:
        require_positive("rank", self.rank)

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        out, inner = shape
        return {"weight": TensorSpec((out, self.rank)), "right": TensorSpec((self.rank, inner))}

    def flops(self, shape: Shape) -> int:
        return 2 * self.rank * sum(shape)

    def row_flops(self, shape: Shape) -> int:
        return 2 * self.rank * shape[1]

    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        largest = largest_rank(shape)
        if self.rank > largest:
            raise ModelError(
                f"rank {self.rank} of a {shape[0]}x{shape[1]} matrix stores no less than the dense matrix; "
                f"allowed: 1 to {largest}; keep the matrix dense instead"
            )

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        """All factors are values."""

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return chain(x, self.chain(factors), bias)

    def chain(self, factors: Factors) -> tuple[Factor, ...]:
        """`right` first, then `weight`."""
        return dense(factors, "right"), dense(factors, "weight")

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        if not isinstance(factors, Rounded):
            found = dense_rows(index, dense(factors, "weight"), dense(factors, "right"))
            if found is not None:
                return found
        return chain(look_up(factors, "weight", index), (dense(factors, "right", columns=True),))

    def exported_rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        """Rows of the left factor, which stay in integers until they are looked up, times the right one in floats."""
        rows = look_up(factors, "weight", index)
        return rows @ dense(factors, "right").values(rows.dtype)

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        factors = floats(factors)
        return factors["weight"] @ factors["right"]

    @classmethod
    def truncated(cls, weight: Tensor, scaled: Tensor, *, plain: bool) -> Tensor:
        """The weight under the metric (Eckart and Young, 1936)."""
        return scaled

    @property
    def units(self) -> int:
        return self.rank

    def is_multiple(self, multiple: int) -> bool:
        """Both products have the rank as a side.

        >>> LowRank(24).is_multiple(8), LowRank(20).is_multiple(8)
        (True, False)
        """
        return self.rank % multiple == 0

    def with_units(self, units: int) -> LowRank:
        return LowRank(units)

    def select(self, factors: Factors, kept: Tensor, smaller: Structure) -> Selection:
        return Selection(smaller, {"weight": lambda t: t.index_select(1, kept), "right": lambda t: t[kept]})

    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Tensor]:
        return {"weight": values["weight"].T, "right": values["right"]}

    def initialize(self, factors: Factors, std: float) -> None:
        # The sum of `rank` products of independent entries has variance rank * s^4.
        scale = (std**2 / self.rank) ** 0.25
        for factor in factors.values():
            torch.nn.init.normal_(factor, std=scale)

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[LowRank]:
        return (cls(rank) for rank in range(1, largest_rank(shape) + 1))

    @classmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[list[LowRank]]:
        return (list(cls.candidates(shape, dtype)),)


def largest_rank(shape: Shape) -> int:
    """The largest rank whose factors are strictly smaller than the dense matrix; 0 if there is none.

    >>> largest_rank((768, 768)), largest_rank((1, 768))
    (383, 0)
    """
    out, inner = shape
    return (out * inner - 1) // (out + inner)
