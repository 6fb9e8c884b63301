"""A structure that is no part of the package, as one would add it: its file, and its fitter."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.metric import Metric, divided
from factorformer.structures import Factors, Selection, Shape, Structure, TensorSpec
from factorformer.structures.base import require_positive
from factorformer.structures.integers import floats, look_up


@dataclasses.dataclass(frozen=True)
class ScaledLowRank(Structure):
    """`W = weight diag(scales) right`: low rank with the size of each unit in a factor of its own."""

    kind: ClassVar[str] = "scaled_low_rank"
    units_kept: int

    def __post_init__(self) -> None:
        require_positive("units_kept", self.units_kept)

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        count = self.units_kept
        sizes = {"weight": (shape[0], count), "scales": (count,), "right": (count, shape[1])}
        return {name: TensorSpec(size) for name, size in sizes.items()}

    def flops(self, shape: Shape) -> int:
        return 2 * self.units_kept * sum(shape)

    def row_flops(self, shape: Shape) -> int:
        return 2 * self.units_kept * shape[1]

    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        if self.parameters(shape) >= shape[0] * shape[1]:
            raise ModelError(f"{self} stores no less than a {shape[0]}x{shape[1]} matrix: keep it dense")

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        """All factors are values."""

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        factors = floats(factors, x.dtype)
        product = ((x @ factors["right"].T) * factors["scales"]) @ factors["weight"].T
        return product if bias is None else product + bias.to(product.dtype)

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        return (look_up(factors, "weight", index) * floats(factors)["scales"]) @ floats(factors)["right"]

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        factors = floats(factors)
        return (factors["weight"] * factors["scales"]) @ factors["right"]

    @property
    def units(self) -> int:
        return self.units_kept

    def with_units(self, units: int) -> ScaledLowRank:
        return ScaledLowRank(units)

    def select(self, factors: Factors, kept: Tensor, smaller: Structure) -> Selection:
        cut = {"weight": lambda t: t.index_select(1, kept), "scales": lambda t: t[kept], "right": lambda t: t[kept]}
        return Selection(smaller, cut)

    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Tensor]:
        return {"weight": values["weight"].T, "scales": values["scales"][:, None], "right": values["right"]}

    def initialize(self, factors: Factors, std: float) -> None:
        factors["scales"].fill_(1)
        for name in ("weight", "right"):
            torch.nn.init.normal_(factors[name], std=(std**2 / self.units_kept) ** 0.25)

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[ScaledLowRank]:
        most = (shape[0] * shape[1] - 1) // (sum(shape) + 1)
        return (cls(count) for count in range(1, most + 1))

    @classmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[list[ScaledLowRank]]:
        return (list(cls.candidates(shape, dtype)),)


def fit_scaled_low_rank(
    weight: Float[Tensor, "out inner"], spec: ScaledLowRank, metric: Metric, *, rounds: int = 1
) -> tuple[dict[str, Tensor], float]:
    """The truncated singular value decomposition under the metric."""
    left, values, right = torch.linalg.svd(metric.apply(weight).double(), full_matrices=False)
    left, right = left[:, : spec.units_kept], right[: spec.units_kept]
    left = divided(left, metric.rows)
    if metric.columns is not None:
        right = torch.linalg.solve_triangular(metric.columns.to(right), right, upper=False, left=False)
    factors = {"weight": left, "scales": values[: spec.units_kept], "right": right}
    factors = {name: factor.to(weight.dtype).contiguous() for name, factor in factors.items()}
    return factors, metric.relative_error(weight, spec.to_dense((weight.shape[0], weight.shape[1]), factors))
