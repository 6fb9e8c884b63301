"""Rounding to 4 bits so that errors make up for each other; and dense matrices, of which nothing else is lost.

Rounded to the nearest, entries have errors that are independent, and each counts in full. Here the columns of a factor
are rounded one after the other, and those that follow make up for the errors so far, as far as the inputs of the layer
are alike (Optimal Brain Surgeon, 1993; GPTQ, arXiv 2210.17323); on MiniLM's dense matrices a third to an eighth of the
squared error is left. Factors that are fitted to what is rounded already make up for that as well.

What comes out are floats near the steps of `structures.integers`, which rounds them to the codes that were chosen here.
They are not on the steps: training would take long to move any that lies in the middle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.coding import refine_codes
from factorformer.fitting.metric import Metric
from factorformer.kernels import support
from factorformer.structures import Dense, DenseSparse, LowRank, Structure
from factorformer.structures.base import GROUP
from factorformer.structures.integers import LARGEST, STEPS, group_steps, rounded

DAMPING = 0.01
"""Part of the mean of the diagonal of a moment that is added to it."""

RIDGE = 1e-6
"""The same where factors are solved for."""

TOGETHER = 4 * GROUP
"""Columns whose errors are passed on to all others at once."""

CUTS = (0, 2, 4, 6)
"""Sixteenths of an octave by which the largest value of a group may be cut off for finer steps."""

INSIDE = 0.48
"""Steps by which a value may be off its code, so that it is rounded to it in bfloat16 as well."""

SWEEPS, REFINEMENTS = 2, 4
"""Over the atoms of a dictionary when codes are rounded, and conjugate gradients before."""

ENTRIES = 2**19
"""Of `S` that are worked on at the same time."""

TINY = torch.finfo(torch.float32).tiny


def fit_dense(weight: Float[Tensor, "out inner"], spec: Dense, metric: Metric) -> tuple[dict[str, Tensor], float]:
    """The matrix itself, of which nothing is lost until it is rounded.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError("the matrix holds NaN or infinite values")
    return {"weight": weight.detach().unsqueeze(1).clone()}, 0.0


def round_dense(weight: Tensor, spec: Dense, factors: dict[str, Tensor], metric: Metric) -> dict[str, Tensor]:
    """The matrix under the moment of its inputs."""
    return {"weight": compensated(weight, metric.columns).unsqueeze(1)}


def round_low_rank(weight: Tensor, spec: LowRank, factors: dict[str, Tensor], metric: Metric) -> dict[str, Tensor]:
    """First `right` under the moment of the inputs; then the best `weight` for it, under that of what `right` makes."""
    right = compensated(factors["right"], metric.columns)
    made, plain = rounded(right, 4).double(), weight.double()
    if metric.columns is not None:
        made, plain = made @ metric.columns, plain @ metric.columns
    moment = made @ made.T
    moment.diagonal().add_(RIDGE * moment.diagonal().mean() or 1.0)
    root = torch.linalg.cholesky(moment)
    left = torch.cholesky_solve(made @ plain.T, root).T
    return {"weight": compensated(left.to(weight.dtype), root), "right": right}


def round_dense_sparse(
    weight: Tensor, spec: DenseSparse, factors: dict[str, Tensor], metric: Metric
) -> dict[str, Tensor]:
    """First the dictionary, under the metric of the side that it lives in; then the best codes for it.

    These are rounded in coordinate descent, one atom after the other, so that those of a row make up for each other.
    Where the metric couples rows of codes, they are rounded to the nearest.
    """
    long, short, target = metric.rows, metric.columns, weight
    if spec.side == "columns":
        short = None if metric.rows is None else metric.rows.diag() if metric.rows.dim() == 1 else metric.rows.T
        long, target = metric.columns, weight.T
    found = factors | {"dictionary": compensated(factors["dictionary"], short)}
    if long is not None and long.dim() == 2:
        return found | {"weight": compensated(factors["weight"], None)}
    atoms = rounded(found["dictionary"], 4).double()
    root = torch.eye(atoms.shape[1], dtype=atoms.dtype, device=atoms.device) if short is None else short
    codes = _Codes(spec, factors, target, (atoms @ root).float(), root.float())
    return found | {"weight": codes.rounded().to(weight.dtype)}


ROUNDERS: dict[type[Structure], Callable[..., dict[str, Tensor]]] = {
    Dense: round_dense,
    DenseSparse: round_dense_sparse,
    LowRank: round_low_rank,
}
"""By structure; others are rounded to the nearest."""


def compensated(
    values: Float[Tensor, "out inner"], root: Float[Tensor, "inner inner"] | None
) -> Float[Tensor, "out inner"]:
    """A factor near the given one under `||(V - V') L||_F` when both, or `V'` alone, are rounded to 4 bits.

    Args:
        values: `V`.
        root: any `L` with `L L^T` the metric; None for the identity, under which the nearest codes are the best.
    """
    out, inner = values.shape
    moment = torch.zeros(inner, inner, dtype=torch.float64, device=values.device) if root is None else root @ root.T
    moment = moment / (float(moment.diagonal().mean()) or 1.0)
    moment.diagonal().add_(DAMPING)
    order = moment.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    chain = torch.linalg.cholesky(inverse, upper=True)
    weights = chain.diagonal().square().reciprocal().float()
    chain = (chain / chain.diagonal()[:, None]).float()
    back = order.argsort()
    # Columns lie one after the other in memory as rows.
    grid = _Grid.of(values.float(), weights[back]).columns(order)
    left, found = values.float().T[order].contiguous(), values.new_empty(inner, out)
    for first in range(0, inner, TOGETHER):
        last = min(first + TOGETHER, inner)
        errors = left.new_empty(last - first, out)
        for column in range(first, last):
            found[column], read = grid.nearest(left[column], column)
            errors[column - first] = left[column] - read
            left[column + 1 : last].addr_(chain[column, column + 1 : last], errors[column - first], alpha=-1)
        left[last:].addmm_(chain[first:last, last:].T, errors, alpha=-1)
    return found[back].T.contiguous()


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What values of a factor can become in 4 bits, once the steps of its groups are chosen.

    Args:
        steps: of each value.
        pinned: the codes of those values that keep the steps of their groups, the largest of each; 0 for others.
        coarse: the steps of rows in 8 bits, in which products read what is stored in 4.
    """

    steps: Tensor
    pinned: Tensor
    coarse: Float[Tensor, " rows"]

    @classmethod
    def of(cls, values: Float[Tensor, "rows width"], weights: Float[Tensor, " width"]) -> _Grid:
        """With the steps that suit values best, where squared errors weigh differently in each column."""
        width, pad = values.shape[1], -values.shape[1] % GROUP
        grouped, weight = F.pad(values, (0, pad)).unflatten(1, (-1, GROUP)), F.pad(weights, (0, pad)).view(-1, GROUP)
        largest, place = grouped.abs().max(2, keepdim=True)
        full = group_steps(largest[..., 0], values.dtype)
        best, least = full, torch.full_like(full, torch.inf)
        for cut in CUTS:
            steps = full * 2 ** (-cut / STEPS)
            codes = (grouped / steps[:, :, None]).round_().clamp_(-LARGEST[4], LARGEST[4])
            loss = ((grouped - codes * steps[:, :, None]).square() * weight).sum(2)
            best, least = torch.where(loss < least, steps, best), torch.minimum(loss, least)
        best = group_steps(best * LARGEST[4], values.dtype)  # the scale of all may be another now
        pinned = torch.zeros_like(grouped).scatter_(2, place, LARGEST[4] * grouped.gather(2, place).sign())
        steps = best[:, :, None].expand_as(grouped).flatten(1)[:, :width]
        coarse = (best.amax(1) * LARGEST[4] / LARGEST[8]).clamp_min(TINY)
        return cls(steps, pinned.flatten(1)[:, :width], coarse)

    def columns(self, order: Int[Tensor, " width"]) -> _Grid:
        """That of the transpose, with columns in an order."""
        return _Grid(self.steps.T[order].contiguous(), self.pinned.T[order].contiguous(), self.coarse)

    def nearest(self, values: Float[Tensor, " rows"], column: int) -> tuple[Tensor, Tensor]:
        """The nearest values of a column of which codes are made, and what products read then."""
        steps, pinned = self.steps[column], self.pinned[column]
        codes = (values / steps).round_().clamp_(-LARGEST[4], LARGEST[4])
        codes = torch.where(pinned == 0, codes, pinned)
        near = values.clamp((codes - INSIDE) * steps, (codes + INSIDE) * steps)
        near = near.clamp(-LARGEST[4] * steps, LARGEST[4] * steps)
        read = (codes * steps / self.coarse).round_().mul_(self.coarse)
        return torch.where(pinned == 0, near, codes * steps), read


@dataclasses.dataclass(frozen=True)
class _Codes:
    """The values of `S` for `T ~ S D`, with supports that stay, under a metric that couples the columns of `T`.

    Args:
        spec: structure and size.
        factors: with the support, and values to start from.
        target: `T`, `(long, short)`.
        atoms: `D L`, `(atoms, short)`.
        root: `L`, `(short, short)`.
    """

    spec: DenseSparse
    factors: dict[str, Tensor]
    target: Tensor
    atoms: Tensor
    root: Tensor

    def rounded(self) -> Float[Tensor, "long nonzeros"]:
        """Values of which the codes are made."""
        gram = self.atoms @ self.atoms.T
        gram.diagonal().clamp_min_(TINY)
        values = torch.cat([self._solved(*part, gram) for part in self._parts()])
        grid = _Grid.of(values, values.new_ones(values.shape[1]))
        found: list[Tensor] = []
        for rows, positions, projected in self._parts():
            empty = torch.zeros_like(projected)
            # By atom, as columns of a factor.
            steps, pinned, now = (
                empty.scatter(1, positions, tensor[rows]).T.contiguous() for tensor in (grid.steps, grid.pinned, values)
            )
            mask, near = (steps > 0).float(), torch.empty_like(now)
            part = _Grid(torch.where(steps > 0, steps, 1), pinned, grid.coarse[rows])
            left = projected.T - gram @ now
            for atom in list(range(len(gram))) * SWEEPS:
                near[atom], read = part.nearest(now[atom] + left[atom] / gram[atom, atom], atom)
                left.addr_(gram[atom], read.mul_(mask[atom]) - now[atom], alpha=-1)
                now[atom] = read
            found.append(near.T.gather(1, positions))
        return torch.cat(found)

    def _parts(self) -> Iterator[tuple[slice, Int[Tensor, "rows nonzeros"], Float[Tensor, "rows atoms"]]]:
        """Some of the rows, their positions, and their projections on atoms."""
        onto, count = self.root @ self.atoms.T, max(ENTRIES // len(self.atoms), 1)
        for first in range(0, len(self.target), count):
            rows = slice(first, first + count)
            positions = support.unpack(self.factors["support"][rows], self.spec.atoms, self.spec.nonzeros)
            yield rows, positions, self.target[rows].float() @ onto

    def _solved(self, rows: slice, positions: Tensor, projected: Tensor, gram: Tensor) -> Tensor:
        """The best values for some of the rows before they are rounded."""
        spread, empty = gram.diagonal().sqrt(), torch.zeros_like(projected)
        start = empty.scatter(1, positions, self.factors["weight"][rows].float()) * spread
        mask = torch.zeros_like(projected, dtype=torch.bool).scatter_(1, positions, True)
        unit = gram / spread / spread[:, None]
        codes = refine_codes(start, mask, projected / spread, unit, None, REFINEMENTS)
        return (codes / spread).gather(1, positions)
