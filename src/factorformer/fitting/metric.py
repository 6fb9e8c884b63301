"""The error that a fit minimizes: a weighted Frobenius norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer.fitting.linalg import square_root
from factorformer.fitting.statistics import LayerStatistics
from factorformer.layers.matrix import Member

MetricName = Literal["plain", "fisher_rows", "input_moment"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """`||R (W - W') L||_F`, with a diagonal `R` over output rows and a square root `L` of an input metric.

    Plain Frobenius (both None), Fisher rows and the input second moment are one problem under different metrics.

    Args:
        rows: the diagonal of `R`, positive, `(out,)`.
        columns: lower-triangular `L`, float64, `(in, in)`.
    """

    rows: Float[Tensor, " out"] | None = None
    columns: Float[Tensor, "inner inner"] | None = None

    @classmethod
    def of(cls, statistics: LayerStatistics | None) -> Metric:
        """Rows by measured importance, columns by the second moment of the input; plain Frobenius for None."""
        if statistics is None:
            return cls()
        rows = None
        if statistics.rows is not None:
            # Relative to their mean, rows stay in the range of float32, and if all are zero they count alike. A row
            # that calibration never touched still has to be reconstructed, if with little weight.
            rows = statistics.rows.double()
            rows = (rows / rows.mean().clamp_min(torch.finfo(torch.float64).tiny) + 1e-3).sqrt()
        return cls(rows, None if statistics.inputs is None else statistics.inputs.root())

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
        return Metric(*(part if part is None else part.to(device) for part in (self.rows, self.columns)))

    def apply(self, weight: Float[Tensor, "out inner"]) -> Float[Tensor, "out inner"]:
        """`R W L`, in the weight's precision, but at least float32."""
        result = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.rows is not None:
            result = self.rows[:, None].to(result.dtype) * result
        return result if self.columns is None else result @ self.columns.to(result.dtype)

    def relative_error(self, weight: Float[Tensor, "out inner"], approximation: Float[Tensor, "out inner"]) -> float:
        """`||R (W - W') L||_F / ||R W L||_F`, in the precision of the more precise of the two."""
        dtype = torch.promote_types(weight.dtype, approximation.dtype)
        residual = self.apply(weight.to(dtype) - approximation.to(dtype))
        energy = torch.linalg.vector_norm(self.apply(weight.to(dtype)), dtype=torch.float64)
        error = torch.linalg.vector_norm(residual, dtype=torch.float64)
        return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))
