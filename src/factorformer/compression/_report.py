"""The result of carrying out a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from factorformer.fitting.moments import LayerStatistics
from factorformer.layers.matrix import Cost, Scope
from factorformer.planning import Plan


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `compress` or `initialize`.

    Args:
        method: the method that was carried out.
        scope: what `original` and `compressed` count.
        original, compressed: cost of everything in scope, before and after.
        errors: relative error of each factorized matrix, under the metric of the fit and, where matrices are fitted in
            order, to their targets, which make up for errors before them; empty where nothing was fitted.
        seconds: wall time of calibration and fit, or of initialization.
        plan: what was carried out: the plan given, without what calibration data does not reach.
        notes: what a user should know of it, a line each.
        statistics: what calibration measured of each layer, if it was to be kept, for training that goes on in the
            metric of the fit.
    """

    method: str
    scope: Scope
    original: Cost
    compressed: Cost
    errors: dict[str, float]
    seconds: dict[str, float]
    plan: Plan
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, LayerStatistics] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def ratio(self) -> float:
        """Original bytes over compressed bytes, in scope."""
        return self.original.bytes / self.compressed.bytes
