"""The units that dynamic ranks begin with: all components of dense matrices, or factors of the largest size."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from factorformer.errors import DataError, FactorformerWarning, ModelError
from factorformer.fitting import Metric
from factorformer.fitting.batches import Batch
from factorformer.fitting.matrices import fit_matrix, measure, naming
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.statistics import unreached_parts
from factorformer.layers.dense import dense_weight
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import factorize
from factorformer.planning import Entry, Plan
from factorformer.progress import Progress
from factorformer.recipes import default_method, get
from factorformer.structures import Structure
from factorformer.training.units import DenseUnits, FactorUnits, Importance, Units

ROOM = 1.25
"""Structures that start from factors begin as the largest that takes the bytes of the dense matrix over this."""


def check_can_shrink(model: nn.Module, entry: Entry) -> None:
    """That a matrix of a plan can be one of those whose units compete.

    Raises:
        ModelError: it is not in the model, frozen, factorized already, or to share factors.
    """
    name = entry.matrix.name
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"the plan does not fit the model: it has no matrix '{name}'; make the plan of this very model"
        ) from None
    if isinstance(module, FactorizedMatrix):
        raise ModelError(f"layer '{name}' is factorized already: dynamic ranks start from the dense model")
    if not module.get_parameter("weight").requires_grad:
        raise ModelError(f"layer '{name}' is frozen, so nothing can be known of its importance: exclude or unfreeze it")
    if entry.shares is not None:
        raise ModelError(f"layer '{name}' is to share factors, which dynamic ranks cannot: plan without sharing")


def all_units(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable[Batch] | None,
    decay: float,
    progress: Progress,
    new_head: bool = False,
) -> list[Units]:
    """The matrices of a plan at full rank, or factorized at the largest size of their structure.

    Args:
        model: dense; an error leaves it as it was.
        plan: which matrices; its method decides about the structure and the metric of the fits.
        calibration: batches of keyword arguments for the model, if the method needs them.
        decay: of the moving averages of importance.
        progress: progress callback, for calibration and fits.
        new_head: whether the model's head has learned nothing yet, so that it tells nothing of the curvature.

    Raises:
        DataError: the method needs calibration data that was not given.
        ModelError: a matrix is not finite; the message names its layer.
    """
    method = plan.method or default_method(calibrated=calibration is not None)
    recipe, names = get(method), [entry.matrix.name for entry in plan.factorized]
    statistics: dict[str, LayerStatistics] = {}
    if recipe.metric != "plain":
        if calibration is None:
            raise DataError(f"method '{method}' needs calibration data ({recipe.needs}): pass calibration batches")
        statistics = measure(model, names, recipe.metric, calibration, progress, new_head)
        _warn_of_unreached(names, statistics)
    result: list[Units] = []
    fitted: list[tuple[Entry, Structure, dict[str, Tensor]]] = []
    for done, entry in enumerate(plan.factorized):
        name, matrix = entry.matrix.name, entry.matrix
        assert entry.spec is not None
        if entry.spec.starts_dense:
            with naming(name):
                weight = dense_weight(model.get_submodule(name))
                result.append(DenseUnits.of(model, matrix, Importance(decay), weight, Metric.of(statistics.get(name))))
        else:
            full = _largest(entry)
            fitted.append((entry, full, fit_matrix(model, matrix, full, statistics)[0]))
            result.append(FactorUnits(model, matrix, full, Importance(decay)))
        progress("fit", done + 1, len(names))
    for entry, full, factors in fitted:  # only when all are fitted: an error leaves the model as it was
        factorize(model, entry.matrix, full, factors)
    return result


def _warn_of_unreached(names: Sequence[str], statistics: Mapping[str, LayerStatistics]) -> None:
    """Name the layers of which calibration says nothing, a part of the model at a time."""
    missing = unreached_parts([name for name in names if name not in statistics], statistics)
    for reason, alike in itertools.groupby(missing, key=missing.__getitem__):
        first, *others = alike
        warnings.warn(
            f"layer '{first}'{f' and {len(others)} more' if others else ''}: {reason}. It starts from the weight alone",
            FactorformerWarning,
            stacklevel=4,
        )


def _largest(entry: Entry) -> Structure:
    """The largest of the sizes that planners try that leaves room below the matrix as it is when whole."""
    assert entry.spec is not None
    matrix = entry.matrix
    most = max(matrix.bytes(matrix.whole) / ROOM, entry.compressed.bytes)
    fitting = [spec for spec in entry.spec.candidates(matrix.shape, matrix.values) if matrix.bytes(spec) <= most]
    return max(fitting, key=matrix.bytes, default=entry.spec)
