"""Fits of a model's matrices: one by one, or as one where they share factors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from factorformer.errors import FactorformerError, ModelError
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
    *,
    stored: bool = False,
) -> tuple[Factors, float]:
    """Factors of one matrix, and their error, under a metric or that of what was measured of it.

    What integers lose is not counted, but of matrices that stay dense, which lose nothing else. `stored` is as for
    `fit_weight`.
    """
    if not isinstance(metric, Metric):
        metric = metric_of(matrix.name, metric)
    return fit_weight(matrix, dense_weight(model.get_submodule(matrix.name)), spec, metric, rounds, stored=stored)


def fit_weight(
    matrix: Matrix, weight: Tensor, spec: Structure, metric: Metric, rounds: int | None = None, *, stored: bool = False
) -> tuple[Factors, float]:
    """`fit_matrix` of a weight that is not in a model, or of rows of one.

    Args:
        matrix, spec, metric, rounds: as there.
        weight: `(out, in)`.
        stored: whether factors are to be rounded so that errors make up for each other, if few bits hold them; a dense
            matrix is so in any case.
    """
    with naming(matrix.name):
        factors, error = fit(weight, spec, metric, rounds=rounds)
        if stored or isinstance(spec, Dense):
            factors = for_storage(matrix, weight, spec, factors, metric)
        if isinstance(spec, Dense):
            error = metric.relative_error(weight, as_stored(matrix, spec, factors))
    return factors, error


def for_storage(
    matrix: Matrix, weight: Tensor, spec: Structure, factors: Factors, metric: Metric, parts: Sequence[int] = ()
) -> Factors:
    """Factors whose errors make up for each other in the integers of the matrix; those of 8 bits are small anyway.

    `parts` is as for `round_factors`.
    """
    return factors if matrix.bits in (None, 8) else round_factors(weight, spec, factors, metric, matrix.bits, parts)


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
    matrix: Matrix, target: Tensor, root: Tensor, spec: Structure, statistics: LayerStatistics, *, stored: bool
) -> tuple[Factors, float, Tensor]:
    """Factors of a target under the metric of other inputs than were measured, their error, and their product.

    Args:
        matrix: which one.
        target: `(out, in)`.
        root: of the second moment of the inputs.
        spec: its structure.
        statistics: of the gradients at its outputs.
        stored: as for `fit_weight`.
    """
    metric = dataclasses.replace(Metric.of(dataclasses.replace(statistics, inputs=None)), columns=root)
    factors, error = fit_weight(matrix, target, spec, metric, stored=stored)
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
    *,
    stored: bool = False,
) -> tuple[Factors, float]:
    """Factors of the tall matrix whose rows are the rows, or the columns, of all members, and their error.

    `stored` is as for `fit_weight`.
    """
    weights = [dense_weight(model.get_submodule(member.matrix.name)) for member in members]
    if len({weight.device for weight in weights}) > 1:
        names = f"'{members[0].matrix.name}' and '{members[-1].matrix.name}'"
        raise ModelError(f"{names} are on several devices, and can share no factors: leave out share=")
    rows = torch.cat([w if member.side == "rows" else w.T for w, member in zip(weights, members, strict=True)])
    try:
        metric = Metric.of_stack(members, statistics)
        factors, error = fit(rows, spec, metric, rounds=rounds)
        if stored:
            factors = for_storage(members[0].matrix, rows, spec, factors, metric, [m.sides[0] for m in members])
        return factors, error
    except FactorformerError as error:
        names = ", ".join(f"'{member.matrix.name}'" for member in members)
        raise type(error)(f"layers {names}, which share factors: {error}") from error


def fit_group(
    model: nn.Module,
    planned: Sequence[tuple[Matrix, Structure]],
    statistics: Mapping[str, LayerStatistics],
    *,
    stored: bool,
) -> dict[str, tuple[Factors, float]]:
    """Factors of matrices that share some, fitted as one, by name; and the error of each under its own metric.

    `stored` is as for `fit_weight`.
    """
    specs = {matrix.name: spec for matrix, spec in planned}
    members = [Member(matrix, getattr(spec, "side")) for matrix, spec in planned]  # noqa: B009  # of any structure
    stack = dataclasses.replace(planned[0][1], side="rows")
    joint, _ = fit_stack(model, members, stack, statistics, stored=stored)
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
