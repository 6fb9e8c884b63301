"""What a plan will cost in quality, before anything is fitted for good: error curves times sensitivities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from factorformer.fitting import MetricName
from factorformer.fitting.matrices import fit_matrix, measure
from factorformer.fitting.statistics import Batch, LayerStatistics
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, Option, Plan, Unit
from factorformer.planning.evidence.curves import Curve, measure_curves
from factorformer.planning.evidence.sensitivity import measure_sensitivities
from factorformer.planning.evidence.times import Timer, measure_times
from factorformer.planning.knapsack import by_loss
from factorformer.progress import Progress, silent
from factorformer.structures import LowRank, Structure, largest_rank

VISIBLE = 1e-3
"""Squared relative error that a truncation should have, at least, for its effect on the output to be measured."""


def relative_sensitivities(
    model: nn.Module,
    matrices: Sequence[Matrix],
    statistics: Mapping[str, LayerStatistics],
    ratio: float,
    calibration: Sequence[Batch] | None,
    progress: Progress = silent,
) -> dict[str, float]:
    """By how much the model's output moves for each unit of squared relative error in a matrix.

    Measured with every matrix truncated to the common size, one at a time. Without calibration data nothing is
    measured: a matrix then counts by its part of all weights that a token meets, each as often as it is used, and
    predictions are mean errors of the weights. Ours: on MiniLM, where feed-forward matrices are far more sensitive
    than those of attention, this is nearer to what is measured than counting all matrices alike.

    Args:
        model: not changed.
        matrices: those that can be factorized.
        statistics: what the metric of the fit knows of each layer.
        ratio: dense bytes over the bytes that matrices have on average.
        calibration: batches as for `compress`.
        progress: told how far the work is.
    """
    if calibration is None:
        used = {m.name: math.prod(m.shape) * max(m.products, m.lookups, 1) for m in matrices}
        return {name: count / sum(used.values()) for name, count in used.items()}
    shapes = {matrix.name: matrix.shape for matrix in matrices}

    def truncated(name: str) -> tuple[Tensor, float]:
        rank = max(round(math.prod(shapes[name]) / sum(shapes[name]) / ratio), 1)
        spec = LowRank(min(rank, max(largest_rank(shapes[name]), 1)))
        factors, error = fit_matrix(model, name, spec, statistics)
        while error**2 < VISIBLE and spec.rank > 1:
            spec = LowRank(spec.rank // 2)
            factors, error = fit_matrix(model, name, spec, statistics)
        return spec.to_dense(shapes[name], factors), error**2

    return measure_sensitivities(
        model, list(shapes), truncated, calibration, lambda done: progress("sensitivity", done, len(shapes))
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is known of a model before it is compressed.

    Args:
        curves: squared relative error of each matrix by what it becomes, under the metric of a method.
        sensitivities: what a unit of it does to the output, or how much of the weights it is part of.
    """

    curves: Mapping[str, Curve]
    sensitivities: Mapping[str, float]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        matrices: Sequence[Matrix],
        structures: Sequence[type[Structure]],
        statistics: Mapping[str, LayerStatistics],
        ratio: float,
        calibration: Sequence[Batch] | None,
        progress: Progress = silent,
    ) -> Prediction:
        """Measure both; arguments as for `measure_curves` and `relative_sensitivities`."""
        able = [matrix for matrix in matrices if matrix.dense is None]
        curves = measure_curves(model, able, structures, statistics, ratio, lambda done: progress("curves", done, None))
        return cls(curves, relative_sensitivities(model, able, statistics, ratio, calibration, progress))

    def options(self, matrix: Matrix, cost: Callable[[Matrix, Structure | None], float]) -> list[Option]:
        """Everything that a matrix can become, with its loss, and its cost in any unit."""
        dense = Option(None, cost(matrix, None), 0.0)
        if matrix.dense is not None:
            return [dense]
        curve, sensitivity = self.curves[matrix.name], self.sensitivities[matrix.name]
        return [dense] + [
            Option(spec, cost(matrix, spec), sensitivity * curve.squared_error(spec)) for spec in curve.specs
        ]

    def error(self, entries: Iterable[Entry]) -> float:
        """Predicted relative deviation of the output, the root of the sum of squares over matrices."""
        specs = {entry.matrix.name: entry.spec for entry in entries if entry.spec is not None}
        return math.sqrt(
            math.fsum(self.sensitivities[name] * self.curves[name].squared_error(spec) for name, spec in specs.items())
        )

    def explained(self, entry: Entry) -> Entry:
        """The entry with a reason that tells how much its matrix matters."""
        if entry.matrix.dense is not None:
            return entry
        usual = math.fsum(self.sensitivities.values()) / len(self.sensitivities)
        times = self.sensitivities[entry.matrix.name] / usual if usual > 0 else 1.0
        return dataclasses.replace(entry, reason=f"sensitivity {times:.2g}x the mean; {entry.reason}")


def plan_by_loss(
    model: nn.Module,
    structures: Sequence[type[Structure]],
    metric: MetricName,
    draft: Plan,
    matrices: Sequence[Matrix],
    calibration: Sequence[Batch] | None,
    progress: Progress = silent,
) -> Plan:
    """The draft with entries for all matrices, so that the predicted error is smallest within its budget.

    Args:
        model: not changed.
        structures: what matrices can become.
        metric: of their errors.
        draft: a plan without entries.
        matrices: all in scope.
        calibration: batches as for `compress`; None if there are none.
        progress: told how far the work is.

    Raises:
        BudgetError: the ratio cannot be met within 1 %; the message names the nearest that can.
        ModelError: a weight that is not finite.
        DataError: calibration data that the model cannot run on.
    """
    names = [matrix.name for matrix in matrices if matrix.dense is None]
    statistics = {} if calibration is None else measure(model, names, metric, calibration, progress)
    prediction = Prediction.of(model, matrices, structures, statistics, draft.target, calibration, progress)
    cost, timer = _prices(model, draft.budget, prediction, matrices, progress)
    rest = {"bytes": draft.rest.bytes, "flops": draft.rest.flops, "milliseconds": 0.0}[draft.budget]
    options = {matrix.name: prediction.options(matrix, cost) for matrix in matrices}
    entries = by_loss(matrices, options, draft.target, rest, draft.budget)
    times = None
    if timer is not None:
        before = math.fsum(timer.milliseconds(entry.matrix, None) for entry in entries)
        times = before, math.fsum(timer.milliseconds(entry.matrix, entry.spec) for entry in entries)
    return dataclasses.replace(
        draft,
        entries=tuple(prediction.explained(entry) for entry in entries),
        predicted=prediction.error(entries),
        milliseconds=times,
    )


def _prices(
    model: nn.Module, unit: Unit, prediction: Prediction, matrices: Sequence[Matrix], progress: Progress = silent
) -> tuple[Callable[[Matrix, Structure | None], float], Timer | None]:
    """What a matrix costs under a spec, in a unit; milliseconds are measured on the device of the model."""
    if unit == "bytes":
        return lambda matrix, spec: matrix.cost(spec).bytes, None
    if unit == "flops":
        return lambda matrix, spec: matrix.cost(spec).flops, None
    device = next(model.parameters()).device
    sizes = {m.name: list(prediction.curves[m.name].specs) if m.dense is None else [] for m in matrices}
    timer = measure_times(
        matrices,
        sizes,
        torch.device("cpu") if device.type == "meta" else device,
        progress=lambda done: progress("timing", done, None),
    )
    return timer.milliseconds, timer
