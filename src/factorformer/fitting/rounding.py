"""Rounding to few bits so that errors make up for each other; and dense matrices, of which nothing else is lost.

Rounded to the nearest, entries have errors that are independent, and each counts in full. Here the columns of a factor
are rounded one after the other, and those that follow make up for the errors so far, as far as the inputs of the layer
are alike (Optimal Brain Surgeon, 1993; GPTQ, arXiv 2210.17323); on MiniLM's dense matrices a third to an eighth of the
squared error is left. A factor that is fitted to one that is rounded already makes up for that one as well, and factors
of low rank are rotated so that all components matter alike.

What comes out are floats that `structures.integers` rounds to the codes which were chosen here. They do not lie on
these: training would take long to move any from the middle of what is rounded to one code. Nor do the largest of their
groups, which would get other exponents, and all of a group other codes, with the first step of training. (Factors under
no metric, and structures that are rounded to the nearest, are left as they are.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.coding import RIDGE, refine_codes
from factorformer.fitting.linalg import square_root
from factorformer.fitting.metric import Metric
from factorformer.kernels import support
from factorformer.kernels.cpu import GROUP
from factorformer.structures import Dense, DenseSparse, LowRank, Structure
from factorformer.structures.integers import (
    BOUNDS,
    LARGEST,
    LEVELS,
    MIDDLE,
    OPPOSITE,
    STEPS,
    Bits,
    at_levels,
    extremes,
    group_reach,
    in_groups,
    nearest,
    rounded,
    settled,
)

DAMPING = 0.01
"""Part of the mean of the diagonal of a moment that is added to it."""

TOGETHER = 128
"""Columns whose errors are passed on to all others at once."""

BLOCK = 32
"""Atoms of which the same is true."""

CUTS = range(9)
"""Steps of exponents by which the largest value of a group may be cut off for finer levels."""

INSIDE = 0.9
"""Of the way from its level to the next bound that a value may be off it, so that it is rounded to it in bfloat16 as
well."""

SWEEPS, REFINEMENTS = 2, 4
"""Over the atoms of a dictionary when codes are rounded, and conjugate gradients before."""

ENTRIES = 2**22
"""Of a factor that are rounded at the same time on a CPU."""

SETTLING = 4
"""Times that exponents are asked for again, until the largest values ask for those that they are stored with."""

TINY = torch.finfo(torch.float32).tiny


def fit_dense(weight: Float[Tensor, "out inner"], spec: Dense, metric: Metric) -> tuple[dict[str, Tensor], float]:
    """The matrix itself, of which nothing is lost until it is rounded.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError("the matrix holds NaN or infinite values")
    return {"weight": weight.detach().unsqueeze(1).clone()}, 0.0


def round_dense(
    weight: Float[Tensor, "out inner"], spec: Dense, factors: Mapping[str, Tensor], metric: Metric, bits: Bits
) -> dict[str, Tensor]:
    """The matrix under the moment of its inputs, `(out, 1, in)`."""
    return {"weight": compensated(factors["weight"].squeeze(1), metric.columns, bits).unsqueeze(1)}


def round_low_rank(
    weight: Float[Tensor, "out inner"], spec: LowRank, factors: Mapping[str, Tensor], metric: Metric, bits: Bits
) -> dict[str, Tensor]:
    """First `right`, under the moment of the inputs; then the best `weight` for it, under that of what `right` makes.

    Components are rotated among themselves before, at random, so that all matter alike: those of a singular value
    decomposition do not, but would have as many bits each, and an error in proportion to their size.
    """
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(spec.rank, spec.rank, generator=generator, dtype=torch.float64))[0]
    right = compensated((rotation.to(weight) @ factors["right"]), metric.columns, bits)
    made = pull = rounded(right, bits).double()
    if metric.columns is not None:
        made = made @ metric.columns
        pull = made @ metric.columns.T
    moment = made @ made.T
    moment.diagonal().add_(RIDGE * moment.diagonal().mean() or 1.0)
    root = square_root(moment)
    left = torch.cholesky_solve((pull.float() @ weight.float().T).double(), root).T
    return {"weight": compensated(left.to(weight.dtype), root, bits), "right": right}


def round_dense_sparse(
    weight: Float[Tensor, "out inner"],
    spec: DenseSparse,
    factors: Mapping[str, Tensor],
    metric: Metric,
    bits: Bits,
    parts: Sequence[int] = (),
) -> dict[str, Tensor]:
    """First the dictionary, under the metric of the side that it lives in; then the best codes for it.

    These are rounded in coordinate descent, one atom after the other, so that those of a row make up for each other.
    Where the metric couples rows of codes, they are rounded to the nearest.
    """
    long, short, target = metric.rows, metric.columns, weight
    if spec.side == "columns":
        short = None if metric.rows is None else metric.rows.diag() if metric.rows.dim() == 1 else metric.rows.T
        long, target = metric.columns, weight.T
    found = {**factors, "dictionary": compensated(factors["dictionary"], short, bits)}
    parts = parts or (len(target),)
    if long is not None and long.dim() == 2:
        return found | {"weight": torch.cat([settled(p, bits) for p in factors["weight"].split(list(parts))])}
    atoms = rounded(found["dictionary"], bits).double()
    root = torch.eye(atoms.shape[1], dtype=atoms.dtype, device=atoms.device) if short is None else short
    root = root / (float(root.square().mean().sqrt()) or 1.0)
    codes = _Codes(spec, factors, target, (atoms @ root).float(), root.float(), bits, parts)
    return found | {"weight": codes.rounded().to(weight.dtype)}


ROUNDERS: dict[type[Structure], Callable[..., dict[str, Tensor]]] = {
    Dense: round_dense,
    DenseSparse: round_dense_sparse,
    LowRank: round_low_rank,
}
"""By structure; others are rounded to the nearest. Those of structures that can share factors take `parts` as well."""


def compensated(
    values: Float[Tensor, "out inner"], root: Float[Tensor, "inner inner"] | None, bits: Bits
) -> Float[Tensor, "out inner"]:
    """A factor near the given one under `||(V - V') L||_F` once `V'` is rounded to so many bits.

    Args:
        values: `V`.
        root: any `L` with `L L^T` the metric; None for the identity, under which nothing makes up for anything.
        bits: of codes.

    Raises:
        ModelError: the metric is not finite.
    """
    if root is None:
        return settled(values, bits)
    order, chain, weights = _chain(root)
    reach, found = _reach(values.float(), weights, values.dtype, bits), torch.empty_like(values)
    for rows in _parts(len(values), values.shape[1], values.device):
        left = values[rows].float()
        grid = _Grid.of(left, reach[rows], reach.abs().max(), bits).columns(order)
        found[rows, order] = _one_by_one(left.T[order].contiguous(), grid, chain).T.to(values.dtype)
    return found


def _one_by_one(
    left: Float[Tensor, "inner rows"], grid: _Grid, chain: Float[Tensor, "inner inner"]
) -> Float[Tensor, "inner rows"]:
    """Columns, each one row here, rounded in turn; those that follow are changed in place."""
    found = torch.empty_like(left)
    for first in range(0, len(left), TOGETHER):
        last = min(first + TOGETHER, len(left))
        errors = torch.empty_like(left[first:last])
        for column in range(first, last):
            found[column], read = grid.nearest(left[column], column)
            errors[column - first] = left[column] - read
            left[column + 1 : last].addr_(chain[column, column + 1 : last], errors[column - first], alpha=-1)
        left[last:].addmm_(chain[first:last, last:].T, errors, alpha=-1)
    return found


def _chain(root: Float[Tensor, "inner inner"]) -> tuple[Int[Tensor, " inner"], Tensor, Float[Tensor, " inner"]]:
    """How columns make up for each other's errors.

    Returns:
        Their order, the most important first; how much each later one has to change for an error of 1 of an earlier
        one, `(inner, inner)`, in that order, upper-triangular with a diagonal of 1; and by column what is left of the
        squared error of each.
    """
    moment = root @ root.T
    moment = moment / (float(moment.diagonal().mean()) or 1.0)
    moment.diagonal().add_(DAMPING)
    order = moment.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    # With C = U U^T, the upper factor of C^-1 is U^-1.
    upper = square_root(moment[backwards[:, None], backwards]).flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(root)).to(upper), upper=True)
    weights = torch.empty_like(upper[0]).scatter_(0, order, upper.diagonal().square())
    return order, (inverse * upper.diagonal()[:, None]).float(), weights.float()


def _parts(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Rows of a factor of that width, so many at a time as fit; all on devices for which that would be few."""
    count = max(ENTRIES // max(width, 1), 1) if device.type == "cpu" else rows
    for first in range(0, rows, count):
        yield slice(first, first + count)


def _reach(
    values: Float[Tensor, "rows width"], weights: Float[Tensor, " width"], dtype: torch.dtype, bits: Bits
) -> Float[Tensor, "rows groups"]:
    """The extreme of each group that suits it best, where squared errors weigh differently in each column.

    Args:
        values: of the factor, in float32.
        weights: of squared errors.
        dtype: of the factor, and so of its scale.
        bits: of codes.
    """
    full = group_reach(extremes(in_groups(values)), dtype)
    chosen, weight = [], in_groups(weights[None])
    for rows in _parts(len(values), values.shape[1], values.device):
        part, best = values[rows].contiguous(), full[rows]
        least = torch.full_like(best, torch.inf)
        for cut in CUTS:
            reach = full[rows] * 2 ** (-cut / STEPS)
            error = at_levels(part, reach, bits).sub_(part).square_()
            loss = in_groups(error).mul(weight).sum(2)
            best, least = torch.where(loss < least, reach, best), torch.minimum(loss, least)
        chosen.append(best)
    reach = torch.cat(chosen)
    for _ in range(SETTLING):
        reach = group_reach(reach.to(dtype).to(reach.dtype), dtype)
    return reach


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What values of a factor can become in few bits, once the reach of its groups is chosen.

    Args:
        reach: of the group of each value, with its sign, `(rows, width)` or its transpose.
        pinned: as large: 1 for those values that keep the exponents of their groups, the extremes; 0 for others.
        coarse: the steps of rows in 8 bits, in which products read what is stored in fewer.
        scale: the largest reach of the whole factor that will be stored, which is its largest value: extremes of groups
            with this reach are that, those of others half of a step of exponents below theirs.
        bits: of codes.
        cells: levels, and the least and the greatest of the values that surely get them.
    """

    reach: Tensor
    pinned: Tensor
    coarse: Float[Tensor, " rows"]
    scale: Tensor
    bits: Bits
    cells: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "rows width"],
        reach: Float[Tensor, "rows groups"],
        scale: Tensor,
        bits: Bits,
    ) -> _Grid:
        """For values whose groups have this reach, and the largest of their factor, or of that of each row."""
        width, grouped = values.shape[1], in_groups(values) * reach.sign()[:, :, None]
        largest, place = grouped.max(2, keepdim=True)
        # Where a group is so small beside others that its exponent is the last one, nothing has to keep it.
        ends = (largest > BOUNDS[bits][-1] * reach.abs()[:, :, None]).to(grouped.dtype)
        pinned = torch.zeros_like(grouped).scatter_(2, place, ends)
        coarse = reach.abs().amax(1) / LARGEST
        coarse = torch.where(coarse < TINY, 1, coarse)  # of rows that are zero
        each = reach.repeat_interleave(GROUP, 1)[:, :width]
        return cls(each, pinned.flatten(1)[:, :width], coarse, scale, bits, _cells(bits, values))

    def columns(self, order: Int[Tensor, " width"]) -> _Grid:
        """That of the transpose, with columns in an order."""
        return dataclasses.replace(
            self, reach=self.reach.T[order].contiguous(), pinned=self.pinned.T[order].contiguous()
        )

    def nearest(self, values: Float[Tensor, " rows"], column: int) -> tuple[Tensor, Tensor]:
        """The nearest values of a column of which codes are made, and what products read then."""
        reach, pinned = self.reach[column], self.pinned[column] > 0
        parts = values / reach
        place = nearest(parts, self.bits) + len(self.cells[0]) // 2 - 1
        level, low, high = (table[place] for table in self.cells)
        largest = torch.where(reach.abs() < MIDDLE * self.scale, parts.new_tensor(MIDDLE), 1.0)
        near = torch.where(pinned, largest, parts.clamp(low, high).minimum(largest)) * reach
        return near, (torch.where(pinned, 1.0, level) * reach / self.coarse).round_().mul_(self.coarse)


def _cells(bits: Bits, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, and the least and the greatest of the values that surely get them."""
    levels, bounds = like.new_tensor(LEVELS[bits]), like.new_tensor(BOUNDS[bits])
    low = torch.cat([levels.new_tensor([-OPPOSITE]), torch.lerp(levels[1:], bounds, INSIDE)])
    high = torch.cat([torch.lerp(levels[:-1], bounds, INSIDE), levels.new_ones(1)])
    return levels, low, high


@dataclasses.dataclass(frozen=True)
class _Codes:
    """The values of `S` for `T ~ S D`, with supports that stay, under a metric that couples the columns of `T`.

    Args:
        spec: structure and size.
        factors: with the support, and values to start from.
        target: `T`.
        atoms: `D L`, of the rounded dictionary.
        root: `L`.
        bits: of codes.
        parts: numbers of rows that will be factors of their own.
    """

    spec: DenseSparse
    factors: Mapping[str, Tensor]
    target: Float[Tensor, "long short"]
    atoms: Float[Tensor, "atoms short"]
    root: Float[Tensor, "short short"]
    bits: Bits
    parts: Sequence[int]

    def rounded(self) -> Float[Tensor, "long nonzeros"]:
        """Values of which the codes are made."""
        gram = self.atoms @ self.atoms.T
        gram.diagonal().clamp_min_(TINY)
        values = torch.cat([self._solved(*part, gram) for part in self._parts()])
        chosen = _reach(values, values.new_ones(values.shape[1]), self.factors["weight"].dtype, self.bits)
        largest = (part.abs().max().expand(len(part)) for part in chosen.split(list(self.parts)) if len(part))
        scale = torch.cat(list(largest))
        found: list[Tensor] = []
        for rows, positions, projected in self._parts():
            grid = _Grid.of(values[rows], chosen[rows], scale[rows], self.bits)
            empty = torch.zeros_like(projected)
            # By atom, as columns of a factor.
            reach, pinned, now = (
                empty.scatter(1, positions, tensor).T.contiguous() for tensor in (grid.reach, grid.pinned, values[rows])
            )
            mask, near = (reach != 0).float(), torch.empty_like(now)
            part = dataclasses.replace(grid, reach=torch.where(reach != 0, reach, 1), pinned=pinned)
            left = projected.T - gram @ now
            for first in list(range(0, len(gram), BLOCK)) * SWEEPS:
                some, before = slice(first, first + BLOCK), now[first : first + BLOCK].clone()
                for atom in range(first, min(first + BLOCK, len(gram))):
                    near[atom], read = part.nearest(now[atom] + left[atom] / gram[atom, atom], atom)
                    change = read.mul_(mask[atom]) - now[atom]
                    left[some].addr_(gram[some, atom], change, alpha=-1)
                    now[atom] += change
                change = now[some] - before
                for others in (slice(first), slice(first + BLOCK, None)):
                    left[others].addmm_(gram[others, some], change, alpha=-1)
            found.append(near.T.gather(1, positions))
        return torch.cat(found)

    def _parts(self) -> Iterator[tuple[slice, Int[Tensor, "rows nonzeros"], Float[Tensor, "rows atoms"]]]:
        """Some of the rows, their positions, and their projections on atoms."""
        onto = self.root @ self.atoms.T
        for rows in _parts(len(self.target), len(self.atoms), self.target.device):
            positions = support.unpack(self.factors["support"][rows], self.spec.atoms, self.spec.nonzeros)
            yield rows, positions, self.target[rows].float() @ onto

    def _solved(
        self,
        rows: slice,
        positions: Int[Tensor, "rows nonzeros"],
        projected: Float[Tensor, "rows atoms"],
        gram: Float[Tensor, "atoms atoms"],
    ) -> Float[Tensor, "rows nonzeros"]:
        """The best values for some of the rows before they are rounded."""
        spread, empty = gram.diagonal().sqrt(), torch.zeros_like(projected)
        start = empty.scatter(1, positions, self.factors["weight"][rows].float()) * spread
        mask = torch.zeros_like(projected, dtype=torch.bool).scatter_(1, positions, True)
        unit = gram / spread / spread[:, None]
        codes = refine_codes(start, mask, projected / spread, unit, None, REFINEMENTS)
        return (codes / spread).gather(1, positions)
