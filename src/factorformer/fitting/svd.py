"""Low-rank fits: the truncated singular value decomposition under any metric, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer.fitting.linalg import leading_singular_vectors
from factorformer.fitting.metric import Metric, divided
from factorformer.structures import LowRank


def fit_low_rank(weight: Float[Tensor, "out inner"], spec: LowRank, metric: Metric) -> tuple[dict[str, Tensor], float]:
    """The best matrix of rank `spec.rank` under the metric `||R (W - W') L||_F`.

    With `M = R W L` and its leading left vectors `U`, the optimum is `W' = R^-1 U (U^T R W)`: projecting needs neither
    singular values nor `L^-1`. From the leading right vectors `V` it is `W' = (W L V) (V^T L^-1)`. The shorter side
    decides which of the two is computed. With Fisher rows this is FWSVD (ICLR 2022), with the input second moment
    `C = L L^T` it is the optimum of `||(W - W') X||` (DRONE, NeurIPS 2021; SVD-LLM, ICLR 2025), and with both sides of
    the Kronecker-factored Fisher information that of the predicted loss.

    Returns:
        `weight: (out, rank)` and `right: (rank, in)`, columns ordered by singular value and balanced in norm, in the
        type of the given weight; and the relative error `||R (W - W') L||_F / ||R W L||_F`.
    """
    scaled = metric.apply(weight)
    side, vectors, tail, _ = leading_singular_vectors(scaled, spec.rank)
    # Inverting a root costs digits, as many as inputs are unequally spread: that side is solved in float64.
    coupled = metric.columns is not None or (metric.rows is not None and metric.rows.dim() == 2)
    dtype = torch.float64 if coupled else scaled.dtype
    vectors, plain = vectors.to(dtype), weight.to(dtype)
    if side == "left":
        left, right = vectors, vectors.T @ Metric(metric.rows).apply(plain)
        left = divided(left, metric.rows)
    elif metric.columns is None:
        left, right = plain @ vectors, vectors.T
    else:
        left = plain @ (metric.columns @ vectors)
        right = torch.linalg.solve_triangular(metric.columns, vectors.T, upper=False, left=False)
    # Factors of equal norm learn at equal speed in fine-tuning.
    tiny = torch.finfo(vectors.dtype).tiny
    balance = (right.norm(dim=1).clamp_min(tiny) / left.norm(dim=0).clamp_min(tiny)).sqrt()
    factors = {
        "weight": (left * balance).to(weight.dtype).contiguous(),
        "right": (right / balance[:, None]).to(weight.dtype).contiguous(),
    }
    energy = torch.linalg.vector_norm(scaled, dtype=torch.float64).square()
    return factors, float((tail / energy.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1).sqrt())
