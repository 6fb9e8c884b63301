"""Fits of a model's matrices: one by one, or as one where they share factors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from factorformer.errors import FactorformerError
from factorformer.fitting import Metric, MetricName, fit, round_factors
from factorformer.fitting import statistics as calibrate
from factorformer.fitting.batches import Batch
from factorformer.fitting.moments import LayerStatistics
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Matrix, Member
from factorformer.progress import Progress
from factorformer.structures import Dense, Structure
from factorformer.structures.integers import Rounded

Factors = dict[str, Tensor]


def measure(
    model: nn.Module,
    names: Sequence[str],
    metric: MetricName,
    calibration: Iterable[Batch],
    progress: Progress,
    new_head: bool = False,
    token_counts: Tensor | None = None,
) -> dict[str, LayerStatistics]:
    """The statistics that a metric needs of these layers; none if it is plain."""
    if metric == "plain":
        return {}
    return calibrate.collect(
        model,
        names,
        calibration,
        metric,
        new_head=new_head,
        token_counts=token_counts,
        progress=lambda done: progress("calibrate", done, None),
    )


def fit_matrix(
    model: nn.Module,
    matrix: Matrix,
    spec: Structure,
    metric: Metric | Mapping[str, LayerStatistics],
    rounds: int | None = None,
) -> tuple[Factors, float]:
    """Factors of one matrix, and their error, under a metric or that of what was measured of it.

    What integers lose is not counted, but of matrices that stay dense, which lose nothing else.
    """
    if not isinstance(metric, Metric):
        metric = metric_of(matrix.name, metric)
    return fit_weight(matrix, dense_weight(model.get_submodule(matrix.name)), spec, metric, rounds)


def fit_stored(
    model: nn.Module, matrix: Matrix, spec: Structure, statistics: Mapping[str, LayerStatistics]
) -> tuple[Factors, float]:
    """`fit_matrix`, with factors on the steps of the integers in which they are going to be stored."""
    weight, metric = dense_weight(model.get_submodule(matrix.name)), metric_of(matrix.name, statistics)
    factors, error = fit_weight(matrix, weight, spec, metric)
    return rounded(matrix, weight, spec, factors, metric), error


def rounded(matrix: Matrix, weight: Tensor, spec: Structure, factors: Factors, metric: Metric) -> Factors:
    """Factors on the steps of 4 bits, if these are to hold them; 8 bits lose too little to make up for."""
    if matrix.bits != 4:
        return factors
    with naming(matrix.name):
        return round_factors(weight, spec, factors, metric)


def fit_weight(
    matrix: Matrix, weight: Tensor, spec: Structure, metric: Metric, rounds: int | None = None
) -> tuple[Factors, float]:
    """`fit_matrix` of a weight that is not in a model, or of rows of one."""
    with naming(matrix.name):
        factors, error = fit(weight, spec, metric, rounds=rounds)
        if isinstance(spec, Dense):
            error = metric.relative_error(weight, as_stored(matrix, spec, factors))
    return factors, error


def metric_of(name: str, statistics: Mapping[str, LayerStatistics]) -> Metric:
    """What was measured of one matrix."""
    with naming(name):
        return Metric.of(statistics.get(name))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors that name the layer."""
    try:
        yield
    except FactorformerError as error:
        raise type(error)(f"layer '{name}': {error}") from error


def fit_target(
    matrix: Matrix, target: Tensor, root: Tensor, spec: Structure, statistics: LayerStatistics
) -> tuple[Factors, float, Tensor]:
    """Factors of a target under the metric of other inputs than were measured, their error, and their product.

    Args:
        matrix: which one.
        target: `(out, in)`.
        root: of the second moment of the inputs.
        spec: its structure.
        statistics: of the gradients at its outputs.
    """
    metric = dataclasses.replace(Metric.of(dataclasses.replace(statistics, inputs=None)), columns=root)
    factors, error = fit_weight(matrix, target, spec, metric)
    factors = rounded(matrix, target, spec, factors, metric)
    return factors, error, as_stored(matrix, spec, factors)


def as_stored(matrix: Matrix, spec: Structure, factors: Factors) -> Tensor:
    """The product of factors `(out, in)`, rounded as they will be."""
    return spec.to_dense(matrix.shape, factors if matrix.bits is None else Rounded(factors, matrix.bits))


def fit_stack(
    model: nn.Module,
    members: Sequence[Member],
    spec: Structure,
    statistics: Mapping[str, LayerStatistics],
    rounds: int | None = None,
) -> tuple[Factors, float]:
    """Factors of the tall matrix whose rows are the rows, or the columns, of all members, and their error."""
    weights = [dense_weight(model.get_submodule(member.matrix.name)) for member in members]
    rows = torch.cat([w if member.side == "rows" else w.T for w, member in zip(weights, members, strict=True)])
    try:
        return fit(rows, spec, Metric.of_stack(members, statistics), rounds=rounds)
    except FactorformerError as error:
        names = ", ".join(f"'{member.matrix.name}'" for member in members)
        raise type(error)(f"layers {names}, which share factors: {error}") from error


def fit_group(
    model: nn.Module, planned: Sequence[tuple[Matrix, Structure]], statistics: Mapping[str, LayerStatistics]
) -> dict[str, tuple[Factors, float]]:
    """Factors of matrices that share some, fitted as one, by name; and the error of each under its own metric."""
    specs = {matrix.name: spec for matrix, spec in planned}
    members = [Member(matrix, getattr(spec, "side")) for matrix, spec in planned]  # noqa: B009  # of any structure
    stack = dataclasses.replace(planned[0][1], side="rows")
    joint, _ = fit_stack(model, members, stack, statistics)
    common: Factors = {name: nn.Parameter(joint.pop(name)) for name in stack.shareable}
    total, first = sum(member.sides[0] for member in members), 0
    fitted: dict[str, tuple[Factors, float]] = {}
    for member in members:
        name, last = member.matrix.name, first + member.sides[0]
        own = {
            factor: tensor[first * len(tensor) // total : last * len(tensor) // total].clone()
            for factor, tensor in joint.items()
        }
        # Here the member's own factors could be fitted again, under its own metric, with the common ones held fixed.
        first, spec, weight = last, specs[name], dense_weight(model.get_submodule(name))
        with torch.no_grad():
            dense = spec.to_dense(member.matrix.shape, own | common)
        fitted[name] = (own | common, Metric.of(statistics.get(name)).relative_error(weight, dense))
    return fitted
