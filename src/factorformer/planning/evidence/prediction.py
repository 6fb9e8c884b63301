"""Predicted loss of quality of a plan, before the final fit: error curves times sensitivities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from factorformer.fitting import MetricName
from factorformer.fitting.batches import Batch
from factorformer.fitting.matrices import fit_matrix, measure
from factorformer.fitting.statistics import LayerStatistics
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, Option, Plan, Unit
from factorformer.planning.evidence.curves import Curve, measure_curves
from factorformer.planning.evidence.sensitivity import measure_sensitivities
from factorformer.planning.evidence.times import Timer, measure_times
from factorformer.planning.knapsack import by_loss
from factorformer.progress import Progress, silent
from factorformer.structures import Dense, LowRank, Structure, largest_rank

ROUNDING = 1e-4
"""Squared relative error of a dense matrix in int8, where its weights are not there to tell."""

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

    Measured with every matrix truncated to the common size, one at a time; 0 where the output does not show it.
    Without calibration data nothing is measured: a matrix then counts by its part of all weights that a token meets,
    each as often as it is used, and predictions are mean errors of the weights. This project's choice: on MiniLM, where
    feed-forward matrices are far more sensitive than those of attention, this is nearer to what is measured than
    counting all matrices alike.

    Args:
        model: not changed.
        matrices: those that can be factorized.
        statistics: what the metric of the fit knows of each layer.
        ratio: dense bytes over the bytes that matrices have on average.
        calibration: batches as for `compress`.
        progress: progress callback.
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
    """Measurements of a model before it is compressed.

    Args:
        curves: squared relative error of each matrix by what it is factorized into, under the metric of a method.
        sensitivities: what a unit of it does to the output, or how much of the weights it is part of; of those
            matrices alone of which it is known.
        rounding: squared relative error of those matrices dense in int8 that are to be in int8.
    """

    curves: Mapping[str, Curve]
    sensitivities: Mapping[str, float]
    rounding: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
        found = relative_sensitivities(model, able, statistics, ratio, calibration, progress)
        known = {name: value for name, value in found.items() if 0 < value < math.inf}
        return cls(curves, known, {m.name: _rounding(model, m, statistics) for m in able if m.int8})

    @property
    def unmeasured(self) -> frozenset[str]:
        """Names of matrices whose effect on the output is not known."""
        return frozenset(self.curves) - frozenset(self.sensitivities)

    def loss(self, name: str, spec: Structure | None) -> float:
        """Squared deviation of the output that a matrix causes under a spec; 0 where it is not known."""
        squared = self.rounding[name] if isinstance(spec, Dense) else self.curves[name].squared_error(spec)
        return self.sensitivities.get(name, 0.0) * squared

    def options(self, matrix: Matrix, cost: Callable[[Matrix, Structure | None], float]) -> list[Option]:
        """Everything that a matrix can become, with its loss, and its cost in any unit."""
        specs: list[Structure | None] = [None]
        if matrix.dense is None:
            specs += [Dense()] if matrix.int8 else []
            specs += self.curves[matrix.name].specs if matrix.name in self.sensitivities else []
        return [Option(s, cost(matrix, s), 0.0 if s is None else self.loss(matrix.name, s)) for s in specs]

    def error(self, entries: Iterable[Entry]) -> float:
        """Predicted relative deviation of the output, the root of the sum of squares over matrices."""
        changed = [entry for entry in entries if entry.spec is not None]
        return math.sqrt(math.fsum(self.loss(entry.matrix.name, entry.spec) for entry in changed))

    def explained(self, entry: Entry) -> Entry:
        """The entry with a reason that says how much its matrix matters."""
        sensitivity = self.sensitivities.get(entry.matrix.name)
        if sensitivity is None:
            return entry
        usual = math.fsum(self.sensitivities.values()) / len(self.sensitivities)
        return dataclasses.replace(entry, reason=f"sensitivity {sensitivity / usual:.2g}x the mean; {entry.reason}")


def _rounding(model: nn.Module, matrix: Matrix, statistics: Mapping[str, LayerStatistics]) -> float:
    if dense_weight(model.get_submodule(matrix.name)).is_meta:
        return ROUNDING
    return fit_matrix(model, matrix.name, Dense(), statistics)[1] ** 2


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
        progress: progress callback.

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
    entries = by_loss(matrices, options, draft.target, rest, draft.budget, prediction.unmeasured)
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
        return Matrix.bytes, None
    if unit == "flops":
        return lambda matrix, spec: matrix.cost(spec).flops, None
    device = next(model.parameters()).device
    sizes: dict[str, list[Structure]] = {m.name: [] for m in matrices}
    for matrix in matrices:
        if matrix.dense is None:
            sizes[matrix.name] = [*prediction.curves[matrix.name].specs, *([Dense()] if matrix.int8 else [])]
    timer = measure_times(
        matrices,
        sizes,
        torch.device("cpu") if device.type == "meta" else device,
        progress=lambda done: progress(f"timing on {device.type}", done, None),
    )
    return timer.milliseconds, timer
