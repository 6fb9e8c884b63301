"""Weight and statistics in, factors out: one fitter per structure, whatever the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.dictionary import fit_dense_sparse
from factorformer.fitting.linalg import WITHOUT_FLOAT64
from factorformer.fitting.metric import Metric, MetricName
from factorformer.fitting.rounding import ROUNDERS, fit_dense
from factorformer.fitting.svd import fit_low_rank
from factorformer.fitting.van_loan import fit_kronecker_sum
from factorformer.layers.modes import fast_float32
from factorformer.structures import Dense, DenseSparse, KroneckerSum, LowRank, Structure
from factorformer.structures.integers import Bits, settled

QUICK = 2
"""Rounds of the fits that only choose a size."""

FITTERS: dict[type[Structure], Callable[..., tuple[dict[str, Tensor], float]]] = {
    LowRank: fit_low_rank,
    KroneckerSum: fit_kronecker_sum,
    DenseSparse: fit_dense_sparse,
    Dense: fit_dense,
}


def fit(
    weight: Tensor, spec: Structure, metric: Metric | None = None, *, rounds: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """Factors of `spec` that approximate `weight` best under the metric, and the relative error that remains.

    Args:
        weight: `(out, in)`.
        spec: structure and size.
        metric: plain Frobenius if None.
        rounds: the effort of a fitter that goes in rounds; None for what it does by itself.

    Raises:
        ModelError: the weight is not finite or has no values, or its shape does not admit the structure.
    """
    if weight.is_meta:
        raise ModelError("the matrix has no values, only a shape (device 'meta'): load the weights first")
    spec.check((weight.shape[0], weight.shape[1]))
    effort = {} if rounds is None else {"rounds": rounds}
    moved, known = _where_float64_is(weight, metric or Metric())
    with fast_float32(moved.device):
        factors, error = FITTERS[type(spec)](moved, spec, known, **effort)
    return {name: factor.to(weight.device) for name, factor in factors.items()}, error


def round_factors(
    weight: Tensor,
    spec: Structure,
    factors: Mapping[str, Tensor],
    metric: Metric,
    bits: Bits,
    parts: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Factors that few bits round to codes whose errors make up for each other under the metric.

    Args:
        weight: `(out, in)`, which they approximate.
        spec: structure and size.
        factors: from `fit`.
        metric: that they were fitted under.
        bits: of codes, 4 or 3.
        parts: of a structure whose factors can be shared, the numbers of rows that will be factors of their own.
    """
    if type(spec) not in ROUNDERS:
        return {name: settled(f, bits) if f.is_floating_point() else f for name, f in factors.items()}
    moved, known = _where_float64_is(weight, metric)
    with fast_float32(moved.device):
        on_device = {name: factor.to(moved.device) for name, factor in factors.items()}
        more = {"parts": parts} if parts else {}
        found = ROUNDERS[type(spec)](moved, spec, on_device, known, bits, **more)
    return {name: factor.to(weight.device) for name, factor in found.items()}


def _where_float64_is(weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """Both as they are, or on the CPU where their device has no float64."""
    return (weight.cpu(), metric.to("cpu")) if weight.device.type in WITHOUT_FLOAT64 else (weight, metric)


__all__ = ["FITTERS", "QUICK", "ROUNDERS", "Metric", "MetricName", "fit", "round_factors"]
