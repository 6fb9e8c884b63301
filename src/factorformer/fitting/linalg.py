"""Matrix decompositions on plain tensors: the mathematics that fitters share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.structures.kronecker_sum import rearrange

WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices without float64, which fits and errors need: they are computed on the CPU there."""

Route = Literal["gram32", "gram64", "svd"]
"""How singular vectors were found: from a Gram matrix in float32 or float64, or from a full SVD in float64."""


def leading_eigenvectors(gram: Float[Tensor, "n n"], rank: int) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"]]:
    """The `rank` leading eigenvectors of a symmetric matrix, and all its eigenvalues, both in descending order."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -rank:].flip(1), values.flip(0).clamp_min(0)


def leading_singular_vectors(
    matrix: Float[Tensor, "m n"], rank: int
) -> tuple[Literal["left", "right"], Float[Tensor, "short rank"], Float[Tensor, ""], Route]:
    """Leading singular vectors of the shorter side, by the cheapest route that is accurate enough.

    A Gram matrix of the shorter side is far cheaper to decompose than the matrix, but squares its condition number:
    its eigenvalues carry an absolute error near `eps * lambda_1`. That route is accepted only while the energy beyond
    `rank` (the quantity that the truncation minimizes) stands well above this error, first in float32, then in
    float64; otherwise the matrix itself is decomposed.

    Returns:
        The side that the vectors belong to, the orthonormal vectors as columns, the squared Frobenius error of the
        best rank-`rank` approximation (the tail of squared singular values; Eckart and Young, 1936), the route taken.

    Raises:
        ModelError: the matrix holds NaN or infinite values.
    """
    side: Literal["left", "right"] = "left" if matrix.shape[0] <= matrix.shape[1] else "right"
    work = matrix if side == "left" else matrix.T
    scale = work.abs().amax()
    if not torch.isfinite(scale):
        raise ModelError("the matrix holds NaN or infinite values")
    # Squares of very small or very large values would leave the range of float32.
    work = work / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    routes: tuple[tuple[Route, torch.dtype], ...] = (("gram32", torch.float32), ("gram64", torch.float64))
    for route, dtype in routes:
        wide = work.to(dtype)
        vectors, values = leading_eigenvectors(wide @ wide.T, rank)
        tail = values[rank:].sum()
        # The sum of n eigenvalue errors, each up to eps * lambda_1, has to stay below a thousandth of the tail.
        if tail >= 1e3 * torch.finfo(dtype).eps * len(values) ** 0.5 * values[0]:
            return side, vectors, tail.double() * scale.double() ** 2, route
    left, values, _ = torch.linalg.svd(work.double(), full_matrices=False)
    return side, left[:, :rank], values[rank:].square().sum() * scale.double() ** 2, "svd"


def truncation_errors(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " ranks"]:
    """Squared relative Frobenius error of the best approximation of every rank, from 0 to the shorter side, in float64.

    The tails of squared singular values (Eckart and Young, 1936), of which the Gram matrix of the shorter side knows
    all at once. They carry an absolute error near 1e-16 times that side.

    Raises:
        ModelError: the matrix holds NaN or infinite values.

    >>> [round(error, 6) for error in truncation_errors(torch.diag(torch.tensor([3.0, 1.0]))).tolist()]
    [1.0, 0.1, 0.0]
    """
    scale = matrix.abs().amax()
    if not torch.isfinite(scale):
        raise ModelError("the matrix holds NaN or infinite values")
    if matrix.device.type in WITHOUT_FLOAT64:
        matrix, scale = matrix.cpu(), scale.cpu()
    work = matrix.double() / scale.double().clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.linalg.eigvalsh(work @ work.T if matrix.shape[0] <= matrix.shape[1] else work.T @ work)
    # Ascending eigenvalues: the sum of the first ones is the tail.
    tails = F.pad(values.clamp_min(0).cumsum(0), (1, 0)).flip(0)
    return tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)


def square_root(moment: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A lower-triangular `L` with `L @ L.T` equal to a positive definite matrix, in float64.

    Any square root of a metric gives the same optimal fit, and this one is the cheapest to find and to invert.

    Raises:
        ModelError: the matrix is not positive definite or not finite.
    """
    root, info = torch.linalg.cholesky_ex(moment.double())
    if int(info) != 0 or not torch.isfinite(root).all():
        raise ModelError(
            f"the metric is not positive definite (leading minor {int(info)}): some inputs of the layer are infinite, "
            "NaN, constant, or so large that others vanish beside them; look for them in the calibration data"
        )
    return root


def separable_moment(
    moment: Float[Tensor, "n n"], sides: tuple[int, int], rounds: int = 10
) -> tuple[Float[Tensor, "n1 n1"], Float[Tensor, "n2 n2"]]:
    """Positive definite `C1`, `C2` with `C1 (x) C2 ~ C`: the most likely ones if `C` is the moment of Gaussian inputs.

    Each minimizes `tr(C (C1 (x) C2)^-1) + log det(C1 (x) C2)` in turn ("flip-flop", Dutilleul, 1999). This weighs
    relative deviations: the nearest Kronecker product in the Frobenius norm serves a few outlier channels only, and a
    fit that starts from it takes several times longer. A moment that is a Kronecker product is found exactly.

    Args:
        moment: `C`, positive definite, `(n1 * n2, n1 * n2)`.
        sides: `n1` and `n2`.
        rounds: updates of each factor.
    """
    n1, n2 = sides
    blocks = rearrange(moment, (n1, n1), (n2, n2))
    first = torch.eye(n1, dtype=moment.dtype, device=moment.device)
    second = first
    for _ in range(rounds):
        second = (torch.linalg.inv(first).flatten() @ blocks).view(n2, n2) / n1
        first = (blocks @ torch.linalg.inv(second).flatten()).view(n1, n1) / n2
    return first, second


def separable_weights(
    weights: Float[Tensor, "m1 m2"], rounds: int = 10
) -> tuple[Float[Tensor, " m1"], Float[Tensor, " m2"]]:
    """`separable_moment` of a diagonal matrix: positive `a`, `b` with `a b^T` near the weights, exact for rank one."""
    second = torch.ones_like(weights[0])
    first = weights.mean(1)
    for _ in range(rounds):
        second = (weights / first[:, None]).mean(0)
        first = (weights / second).mean(1)
    return first, second
