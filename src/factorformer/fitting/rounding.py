"""Dense matrices in int8: nothing is fitted, and what is lost is rounding."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.metric import Metric
from factorformer.structures import Dense, int8


def fit_dense(weight: Float[Tensor, "out inner"], spec: Dense, metric: Metric) -> tuple[dict[str, Tensor], float]:
    """The matrix itself, and the relative error that int8 will give it under the metric.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError("the matrix holds NaN or infinite values")
    factors = {"weight": weight.detach().unsqueeze(1).clone()}
    stored = spec.to_dense((weight.shape[0], weight.shape[1]), int8.quantize(factors))
    return factors, metric.relative_error(weight, stored)
