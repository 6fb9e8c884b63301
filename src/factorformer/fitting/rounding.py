"""Dense matrices in integers: nothing is fitted, and what is lost is rounding."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.metric import Metric
from factorformer.structures import Dense


def fit_dense(weight: Float[Tensor, "out inner"], spec: Dense, metric: Metric) -> tuple[dict[str, Tensor], float]:
    """The matrix itself, of which nothing is lost until it is rounded.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError("the matrix holds NaN or infinite values")
    return {"weight": weight.detach().unsqueeze(1).clone()}, 0.0
