"""Sums of Kronecker products: a truncated singular value decomposition of the rearranged matrix, then refinement."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.fitting.linalg import leading_singular_vectors, separable_moment, separable_weights, square_root
from factorformer.fitting.metric import Metric, divided
from factorformer.structures import KroneckerSum, arrange_back, rearrange

SWEEPS = 20
"""At most this many rounds over both factors."""

GAIN = 3e-3
"""A round that lowers the error by a smaller share than this is the last one."""

SEPARABLE = 1e-3
"""A metric is taken for a separable one if squared errors differ by a smaller share than this."""

STEPS = 4
"""Conjugate gradient steps in each half of a round; on MiniLM 2 and 8 mostly need more time for the same error."""


def fit_kronecker_sum(
    weight: Float[Tensor, "out inner"], spec: KroneckerSum, metric: Metric, *, rounds: int = SWEEPS
) -> tuple[dict[str, Tensor], float]:
    """A sum of `spec.rank` Kronecker products that is close to `weight` under the metric `||R (W - W') L||_F`.

    The plain optimum is the truncated singular value decomposition of the rearranged matrix (Van Loan and Pitsianis,
    1993): its error is the tail of singular values. The same holds after whitening, wherever the metric is separable,
    `R = R1 (x) R2` and `C = L L^T = C1 (x) C2`: `A_k` and `B_k` are whitened each on its own.

    For other metrics no closed form is known, and with weights on single entries the problem is NP-hard (Gillis and
    Glineur, 2011). The fit then starts from the closed form for a separable metric near the given one, and minimizes
    the exact error by alternating least squares, in coordinates that the separable metric has whitened.

    The closed form fits padding as zeros, so that its error over the padded matrix is the tail of singular values;
    refinement leaves padding free. Default shapes have next to none.

    Args:
        weight: the matrix.
        spec: size, and shapes of the factors.
        metric: of the error.
        rounds: of refinement, at most; fewer where they gain little.

    Returns:
        `weight: (m1, n1, rank)` and `right: (m2, rank, n2)` in the type of the given weight; and the relative error
        `||R (W - W') L||_F / ||R W L||_F` of the cropped matrix. Terms are the singular triplets in whitened
        coordinates, in descending order (so that the leading ones are near the best sum of so many terms), and the
        two factors of each have equal Frobenius norm.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    whitening = _Whitening.of(weight, spec, metric)
    target = whitening.apply(weight)
    # Squares of very small or very large values would leave the range of float32.
    scale = target.abs().amax().clamp_min(torch.finfo(target.dtype).tiny)
    target = target / scale
    side, vectors, _, _ = leading_singular_vectors(target, spec.rank)
    vectors = vectors.to(target.dtype)
    first, second = (vectors, vectors.T @ target) if side == "left" else (target @ vectors, vectors.T)
    if not whitening.exact:
        first, second = _ordered(*_refine(first, second, target, whitening.curvature, rounds))
    left, right = whitening.undo(first, second)
    # Factors of equal norm learn at equal speed in fine-tuning.
    tiny = torch.finfo(left.dtype).tiny
    norms = left.flatten(0, 1).norm(dim=0), right.transpose(0, 1).flatten(1).norm(dim=1)
    balance = (norms[1].clamp_min(tiny) / norms[0].clamp_min(tiny)).sqrt()
    root = scale.to(left.dtype).sqrt()
    factors = {
        "weight": (left * (balance * root)).to(target.dtype).contiguous(),
        "right": (right * (root / balance)[:, None]).to(target.dtype).contiguous(),
    }
    error = metric.relative_error(weight, spec.to_dense((weight.shape[0], weight.shape[1]), factors))
    return {name: factor.to(weight.dtype) for name, factor in factors.items()}, error


def _refine(
    first: Float[Tensor, "m rank"],
    second: Float[Tensor, "rank n"],
    target: Float[Tensor, "m n"],
    curvature: Callable[[Tensor], Tensor],
    rounds: int,
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """`alternate` until it gains little."""
    error = float("inf")
    for factors in itertools.islice(alternate(first, second, target, curvature), rounds + 1):
        first, second, squared = factors
        previous, error = error, squared**0.5
        if error >= (1 - GAIN) * previous:
            break
    return first, second


def alternate(
    first: Float[Tensor, "m rank"],
    second: Float[Tensor, "rank n"],
    target: Float[Tensor, "m n"],
    curvature: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"], float]]:
    """Alternating least squares on `f = <E, H(E)>` with `E = first @ second - target`, without an end.

    Each half of a round makes the other factor orthonormal, which leaves the product as it is and the half's least
    squares problem as well conditioned as `H`, and takes a few conjugate gradient steps from where it stands. Each
    step minimizes `f` along a line, so `f` never grows.

    Args:
        first: the start.
        second: the start.
        target: the matrix to approximate.
        curvature: `H`, linear, symmetric and positive semidefinite; best near the identity.

    Yields:
        The factors and `f`, at the start and after every round.
    """

    def transposed(direction: Tensor) -> Tensor:
        return curvature(direction.T).T

    while True:
        residual = first @ second - target
        gradient = curvature(residual)
        yield first, second, max(0.0, float((residual * gradient).sum(dtype=torch.float64)))
        basis, mix = torch.linalg.qr(second.T)
        second = basis.T
        first, gradient = _descend(first @ mix.T, second, gradient, curvature)
        basis, mix = torch.linalg.qr(first)
        first = basis
        second = _descend((mix @ second).T, first.T, gradient.T, transposed)[0].T


def _descend(
    factor: Float[Tensor, "m rank"],
    basis: Float[Tensor, "rank n"],
    gradient: Float[Tensor, "m n"],
    curvature: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "m n"]]:
    """Conjugate gradient steps on `factor`, and `H(factor @ basis - target)` before and after them."""
    direction, previous = torch.zeros_like(factor), 1.0
    for _ in range(STEPS):
        slope = gradient @ basis.T
        squared = slope.square().sum()
        direction = (squared / previous) * direction - slope
        previous = squared
        curved = curvature(direction @ basis)
        bend = (direction * (curved @ basis.T)).sum()
        if not bend > 0:  # the minimum is reached
            break
        step = squared / bend
        factor = factor + step * direction
        gradient = torch.addcmul(gradient, step, curved)
    return factor, gradient


def _ordered(
    first: Float[Tensor, "m rank"], second: Float[Tensor, "rank n"]
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """The same product, as singular triplets in descending order."""
    first, upper = torch.linalg.qr(first)
    second, lower = torch.linalg.qr(second.T)
    left, values, right = torch.linalg.svd(upper @ lower.T)
    return first @ (left * values), right @ second.T


@dataclasses.dataclass(frozen=True)
class _Whitening:
    """Coordinates in which a separable metric near the given one is plain: `A_k -> R1 A_k L1`, `B_k -> R2 B_k L2`.

    Args:
        spec: gives the shapes of the factors.
        dtype: of the whitened matrix.
        rows: `R1: (m1,)` and `R2: (m2,)`, or `(m1, m1)` and `(m2, m2)` where the metric couples rows.
        roots: `L1: (n1, n1)` and `L2: (n2, n2)`, float64.
        importance: what a diagonal `R^T R` is in these coordinates, and 0 for padding, `(m1, 1 or n1, m2, 1 or n2)`;
            None if it is 1 everywhere.
        outputs: what another `R^T R` is in these coordinates, `(m1 * m2, m1 * m2)`, 0 for padding; None if it is the
            identity.
        moment: what `C` is in these coordinates, `(n1 * n2, n1 * n2)`, 0 for padding; None if it is the identity.
    """

    spec: KroneckerSum
    dtype: torch.dtype
    rows: tuple[Tensor, Tensor] | None = None
    roots: tuple[Tensor, Tensor] | None = None
    importance: Tensor | None = None
    outputs: Tensor | None = None
    moment: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, spec: KroneckerSum, metric: Metric) -> _Whitening:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        (m1, n1), (m2, n2) = spec.left, spec.right
        rows, roots, importance, outputs, moment = None, None, None, None, None
        if metric.rows is not None and metric.rows.dim() == 1:
            rows, importance = _separate_rows(metric.rows, (m1, m2))
        elif metric.rows is not None:
            (first, second), outputs = _separate(metric.rows.T, (m1, m2))
            rows = first.T.contiguous(), second.T.contiguous()
        if metric.columns is not None:
            roots, moment = _separate(metric.columns, (n1, n2))
        if importance is not None or outputs is not None or moment is not None:
            importance = _without_padding(importance, spec, weight, rows=outputs is None, columns=moment is None)
        exact = (None if part is None else part.to(dtype) for part in (importance, outputs, moment))
        return cls(spec, dtype, rows, roots, *exact)

    @property
    def exact(self) -> bool:
        """Whether the metric is separable, and the closed form the optimum."""
        return self.importance is None and self.outputs is None and self.moment is None

    def apply(self, weight: Float[Tensor, "out inner"]) -> Float[Tensor, "left_size right_size"]:
        """The whitened matrix, padded and rearranged."""
        (m1, n1), (m2, n2) = self.spec.left, self.spec.right
        terms = rearrange(weight.to(self.dtype), self.spec.left, self.spec.right)
        if self.rows is not None:
            first, second = (Metric(row) for row in self.rows)
            terms = first.apply(terms.view(m1, -1)).view(m1 * n1, m2, n2).transpose(0, 1).reshape(m2, -1)
            terms = second.apply(terms).view(m2, m1 * n1, n2).transpose(0, 1).reshape(m1 * n1, m2 * n2)
        if self.roots is not None:
            first, second = self.roots
            terms = (terms.view(-1, n2).to(second.dtype) @ second).view(m1, n1, -1)
            terms = (first.T @ terms).view(m1 * n1, m2 * n2).to(self.dtype)
        return terms

    def undo(
        self, first: Float[Tensor, "left_size rank"], second: Float[Tensor, "rank right_size"]
    ) -> tuple[Float[Tensor, "m1 n1 rank"], Float[Tensor, "m2 rank n2"]]:
        """Factors in whitened coordinates to those of the matrix, in the layout of `KroneckerSum`."""
        (m1, n1), (m2, n2) = self.spec.left, self.spec.right
        left, right = first.view(m1, n1, -1), second.view(-1, m2, n2).transpose(0, 1)
        if self.rows is not None:
            # Inverting a root costs digits, as many as the inputs are unequally spread.
            wide = torch.promote_types(first.dtype, self.rows[0].dtype)
            left = divided(left.reshape(m1, -1).to(wide), self.rows[0]).view(m1, n1, -1)
            right = divided(right.reshape(m2, -1).to(wide), self.rows[1]).view(m2, -1, n2)
        if self.roots is not None:
            upper = self.roots[0].T
            left = torch.linalg.solve_triangular(upper, left.to(upper.dtype), upper=True)
            right = torch.linalg.solve_triangular(self.roots[1], right.to(upper.dtype), upper=False, left=False)
        return left, right

    def curvature(self, direction: Float[Tensor, "left_size right_size"]) -> Float[Tensor, "left_size right_size"]:
        """The exact metric in these coordinates: half the gradient of the squared error at a residual."""
        (m1, n1), (m2, n2) = self.spec.left, self.spec.right
        if self.importance is not None:
            direction = (direction.reshape(m1, n1, m2, n2) * self.importance).view(m1 * n1, m2 * n2)
        if self.outputs is None and self.moment is None:
            return direction
        whole = arrange_back(direction, (m1, n1), (m2, n2))
        whole = whole if self.outputs is None else self.outputs @ whole
        return rearrange(whole if self.moment is None else whole @ self.moment, (m1, n1), (m2, n2))


def _separate_rows(rows: Float[Tensor, " out"], sides: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """`R1`, `R2` with `R1 (x) R2 ~ R`, and `R^2` relative to that, `(m1, 1, m2, 1)`; None for it if they are equal."""
    m1, m2 = sides
    squares = rows.double().square()
    # Padding counts as a mean row here, so that it moves the separable part little.
    grid = torch.cat([squares, squares.mean().expand(m1 * m2 - len(rows))]).view(m1, m2)
    first, second = separable_weights(grid)
    importance = grid / (first[:, None] * second)
    exact = (importance - 1).abs().amax() < SEPARABLE
    return (first.sqrt(), second.sqrt()), None if exact else importance[:, None, :, None]


def _separate(root: Float[Tensor, "n n"], sides: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """`L1`, `L2` with `L1 (x) L2 ~ L` up to rotation, and `C` whitened by them; None for it if it is the identity."""
    n1, n2 = sides
    padding = n1 * n2 - len(root)
    padded = F.pad(root, (0, padding, 0, padding))
    filled = padded @ padded.T
    filled.diagonal()[len(root) :] = filled.diagonal().sum() / len(root)
    first, second = (square_root(factor) for factor in separable_moment(filled, (n1, n2)))
    whitened = torch.linalg.solve_triangular(torch.kron(first, second), padded, upper=False)
    moment = whitened @ whitened.T
    deviation = moment - torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (first, second), None if deviation.norm() < SEPARABLE else moment


def _without_padding(
    importance: Tensor | None, spec: KroneckerSum, weight: Tensor, *, rows: bool, columns: bool
) -> Tensor | None:
    """The importance, or 1 for None, but 0 for padded rows and columns that no moment gives the weight 0."""
    (m1, n1), (m2, n2), shape = spec.left, spec.right, weight.shape
    weights = torch.ones(1, 1, 1, 1, device=weight.device) if importance is None else importance
    for padded, sides, whole in ((rows, (m1, 1, m2, 1), shape[0]), (columns, (1, n1, 1, n2), shape[1])):
        if padded and math.prod(sides) > whole:
            weights = weights * (torch.arange(math.prod(sides), device=weight.device) < whole).view(sides)
    return None if weights.numel() == 1 else weights
