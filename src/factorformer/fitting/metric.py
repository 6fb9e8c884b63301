"""The error that a fit minimizes: a weighted Frobenius norm."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer.fitting.linalg import square_root
from factorformer.fitting.moments import LayerStatistics
from factorformer.layers.matrix import Member
from factorformer.layers.modes import fast_float32

MetricName = Literal["plain", "fisher_rows", "input_moment", "fisher"]


STABLE = 1e-5
"""Added to the diagonal of a coupling, which is 1, before its inverse is taken: both are rounded to float32."""


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How errors of the rows of a weight matter together, or those of its columns: a metric `C`, apart from its scale.

    Args:
        spread: roots of the diagonal of `C`, float64, `(width,)`.
        moment: `C` over the spreads of both sides, so that its diagonal is 1, `(width, width)`.
    """

    spread: Float[Tensor, " width"]
    moment: Float[Tensor, "width width"]

    @classmethod
    def of(cls, root: Float[Tensor, "width width"], dtype: torch.dtype) -> Coupling:
        """From `R` with `R^T R = C`."""
        spread = root.norm(dim=0)
        unit = (root / spread).to(dtype)
        return cls(spread, unit.T @ unit)

    @functools.cached_property
    def added(self) -> Float[Tensor, " width"]:
        """The root of what each one adds to all others, `1 / (C^-1)_ii`, relative to its spread."""
        stable = self.moment.clone()
        stable.diagonal().add_(STABLE)
        root, failed = torch.linalg.cholesky_ex(stable)
        if int(failed):
            root = torch.linalg.cholesky(stable.double())
        # In float32 the inverse of a matrix that is nearly singular may be far outside of its bounds.
        return torch.cholesky_inverse(root).diagonal().clamp(1, 1 / STABLE).rsqrt().to(self.moment.dtype)


@dataclasses.dataclass(frozen=True)
class Metric:
    """`||R (W - W') L||_F`, with a square root `R` of an output metric and a square root `L` of an input metric.

    Plain Frobenius (both None), Fisher rows, the input second moment, and both sides of the Kronecker-factored Fisher
    information are one problem under different metrics.

    Args:
        rows: `R`: its positive diagonal, `(out,)`, or upper-triangular, float64, `(out, out)`, with `R^T R` the metric.
        columns: lower-triangular `L`, float64, `(in, in)`, with `L L^T` the metric.
        scale: by how much the loss rises for each unit of the squared norm, where the metric is that of a loss.
    """

    rows: Float[Tensor, " out"] | Float[Tensor, "out out"] | None = None
    columns: Float[Tensor, "inner inner"] | None = None
    scale: float = 1.0
    _couplings: dict[tuple[str, torch.dtype], Coupling] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def coupling(self, side: Literal["rows", "columns"], dtype: torch.dtype) -> Coupling | None:
        """Of the rows of a weight, or of its columns; None where nothing couples them. Made once."""
        root = self.rows if side == "rows" else self.columns
        if root is None or root.dim() == 1:
            return None
        if (side, dtype) not in self._couplings:
            self._couplings[side, dtype] = Coupling.of(root if side == "rows" else root.T, dtype)
        return self._couplings[side, dtype]

    @classmethod
    def of(cls, statistics: LayerStatistics | None) -> Metric:
        """What was measured of a layer: outputs or rows, and inputs; plain Frobenius for None."""
        if statistics is None:
            return cls()
        rows, size = None, 1.0
        if statistics.outputs is not None:
            size = statistics.outputs.mean_square()
            rows = (statistics.outputs.root() / (size or 1) ** 0.5).T.contiguous()
        elif statistics.rows is not None:
            # Relative to their mean, rows stay in the range of float32, and if all are zero they count alike. A row
            # that calibration never touched still has to be reconstructed, if with little weight.
            rows, size = statistics.rows.double(), float(statistics.rows.mean())
            rows = (rows / max(size, torch.finfo(torch.float64).tiny) + 1e-3).sqrt()
        columns = None if statistics.inputs is None else statistics.inputs.root()
        if statistics.inputs is not None and statistics.inputs.mean_square() == 0:  # it reads nothing but zeros
            size = 0.0
        return cls(rows, columns, statistics.dependence * statistics.tokens * size / 2)

    @classmethod
    def of_stack(cls, members: Sequence[Member], statistics: Mapping[str, LayerStatistics]) -> Metric:
        """Of matrices one above the other: the mean of their input moments, and their Fisher rows in turn.

        A member whose columns are in the stack has its input along the stack, and no Fisher row for each of its
        columns: it has no part in the moment, and its rows weigh as much as the mean of the others.
        """
        measured = [statistics.get(m.matrix.name) if m.side == "rows" else None for m in members]
        moments = [s.inputs for s in measured if s is not None and s.inputs is not None]
        columns = None
        if moments:
            same = all(moment is moments[0] for moment in moments)
            columns = moments[0].root() if same else square_root(torch.stack([m.moment() for m in moments]).mean(0))
        importance = [None if s is None else s.rows for s in measured]
        known = [rows for rows in importance if rows is not None]
        if not known:
            return cls(None, columns)
        usual = torch.cat(known).mean()
        parts = [
            usual.expand(member.sides[0]) if rows is None else rows
            for rows, member in zip(importance, members, strict=True)
        ]
        return cls(cls.of(LayerStatistics(rows=torch.cat(parts))).rows, columns)

    def to(self, device: torch.device | str) -> Metric:
        """The same on another device."""
        rows, columns = (part if part is None else part.to(device) for part in (self.rows, self.columns))
        return Metric(rows, columns, self.scale)

    def apply(self, weight: Float[Tensor, "out inner"]) -> Float[Tensor, "out inner"]:
        """`R W L`, in the weight's precision, but at least float32."""
        result = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with fast_float32(weight.device):
            if self.rows is not None:
                rows = self.rows.to(result.dtype)
                result = rows[:, None] * result if rows.dim() == 1 else rows @ result
            return result if self.columns is None else result @ self.columns.to(result.dtype)

    def relative_error(self, weight: Float[Tensor, "out inner"], approximation: Float[Tensor, "out inner"]) -> float:
        """`||R (W - W') L||_F / ||R W L||_F`, in the precision of the more precise of the two."""
        dtype = torch.promote_types(weight.dtype, approximation.dtype)
        residual = self.apply(weight.to(dtype) - approximation.to(dtype))
        energy = torch.linalg.vector_norm(self.apply(weight.to(dtype)), dtype=torch.float64)
        error = torch.linalg.vector_norm(residual, dtype=torch.float64)
        return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))


def divided(matrix: Float[Tensor, "out width"], rows: Tensor | None) -> Float[Tensor, "out width"]:
    """`R^-1 M` for the rows `R` of a metric, in the precision of the matrix."""
    if rows is None:
        return matrix
    rows = rows.to(matrix.dtype)
    if rows.dim() == 1:
        return matrix / rows[:, None]
    return torch.linalg.solve_triangular(rows, matrix, upper=True)
