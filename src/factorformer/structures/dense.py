"""Dense matrices stored in integers, for plans in these: what a matrix becomes that is better left whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels import Dense as Factor
from factorformer.kernels import chain, dense_rows
from factorformer.structures.base import Factors, Selection, Shape, Structure, TensorSpec
from factorformer.structures.integers import SCALE, TYPES, Rounded, floats, look_up


@dataclasses.dataclass(frozen=True)
class Dense(Structure):
    """`W = weight[:, 0]` with `weight: (out, 1, in)`: one byte a value, or less, and scales.

    In floats it saves nothing, so it is no candidate there; factors hold floats only while they train for integers. The
    dimension of size 1 keeps a program without this package from taking codes for a weight.

    >>> Dense().bytes((768, 768), torch.int8), 4 * 768 * 768
    (592896, 2359296)
    """

    kind: ClassVar[str] = "dense"

    def __str__(self) -> str:
        return self.kind

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((shape[0], 1, shape[1]))}

    def flops(self, shape: Shape) -> int:
        return 2 * shape[0] * shape[1]

    def row_flops(self, shape: Shape) -> int:
        return 0

    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        """Any matrix can be stored so."""

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        """All factors are values."""

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return chain(x, self.chain(factors), bias)

    def chain(self, factors: Factors) -> tuple[Factor, ...]:
        """The matrix itself."""
        return (Factor(factors["weight"].squeeze(1), factors.get("weight" + SCALE)),)

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        if not isinstance(factors, Rounded):
            found = dense_rows(index, Factor(factors["weight"].squeeze(1), factors.get("weight" + SCALE)))
            if found is not None:
                return found
        return look_up(factors, "weight", index)

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        return floats(factors)["weight"].squeeze(1)

    @property
    def units(self) -> int:
        return 1

    def with_units(self, units: int) -> Dense:
        if units != 1:
            raise ModelError(f"a dense matrix has one unit, not {units}")
        return self

    def select(self, factors: Factors, kept: Tensor, smaller: Structure) -> Selection:
        return Selection(smaller, {"weight": lambda t: t}, {})

    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Tensor]:
        return {"weight": values["weight"].reshape(1, -1)}

    def initialize(self, factors: Factors, std: float) -> None:
        torch.nn.init.normal_(factors["weight"], std=std)

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[Dense]:
        return iter((cls(),) if dtype in TYPES.values() else ())

    @classmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[list[Dense]]:
        return (list(cls.candidates(shape, dtype)),)
