"""Dense-sparse fits: dictionary learning under any metric, by alternating between sparse codes and dictionary."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.fitting.coding import best_dictionary, largest, orthonormal_dictionary, refine_codes, times
from factorformer.fitting.metric import Coupling, Metric
from factorformer.fitting.sampling import sampled
from factorformer.layers.modes import has_bfloat16_products
from factorformer.structures import DenseSparse

ROUNDS = 24
"""Rounds over codes and dictionary, unless the caller asks for others."""

ORTHONORMAL, OF_SAMPLE = 20, 8
"""Rounds of the start, with an orthonormal dictionary; fewer where only a few rounds follow, and of a sample."""

EAGERNESS, COUPLED = 2.0, 1.5
"""How readily supports change in the first round; it falls to 1 in the last one. Coupled rows overshoot sooner."""

SHARE = 3
"""One round in so many is spent on the full metric where that couples the rows of `S`: there a round costs more."""

TOGETHER = 64
"""Coupled rows that choose their supports at the same time, at most; small matrices take an eighth of their rows."""

MANY, FINISH = 2**17, 3
"""Rows beyond which a dictionary is learned from a sample of them, and rounds after all have chosen their supports for
it. Of MiniLM's 30,522 a sample leaves a tenth more error."""

SHRUNK = 0.1
"""Weight of the identity, beside the Gram matrix of unit atoms, in the codes from which these rounds start."""

OF_SAMPLE_ROUNDS = 16
"""Rounds for a sample, at most."""

ENTRIES = 2**19
"""Entries of `S` per chunk where nothing couples its rows."""


def fit_dense_sparse(
    weight: Float[Tensor, "out inner"],
    spec: DenseSparse,
    metric: Metric,
    *,
    start: Mapping[str, Tensor] | None = None,
    rounds: int = ROUNDS,
) -> tuple[dict[str, Tensor], float]:
    """A sparse matrix times a dictionary that is close to `weight` under the metric `||R (W - W') L||_F`.

    With `T = W` or its transpose, so that `T ~ S D`, this is dictionary learning, which is NP-hard. The fit starts
    from an orthonormal dictionary (`coding.orthonormal_dictionary`) and then repeats two steps: one hard-thresholded
    gradient step on `S` (Blumensath and Davies, 2009) with a few conjugate gradients on the support that it chose, and
    the least squares dictionary. The step is over-relaxed, ours: it begins at twice the length that would be safe with
    orthonormal atoms and shortens to once that. Supports that change readily at first leave poor local optima, and
    MiniLM's errors are 3 to 10 % lower for it.

    A metric on the dictionary's side is whitened away, and one that weighs the rows of `S` only weighs the update of
    the dictionary. A second moment on the longer side, of inputs or of gradients, couples the rows of `S` instead. The
    fit then first takes each row to matter by what it adds to all others, `1 / (C^-1)_ii`, and
    finishes on the exact error, where blocks of rows choose their supports in turn and make up for the errors that
    the others leave (Gauss-Seidel; the idea of Optimal Brain Surgeon and GPTQ, arXiv 2210.17323).

    Of a very tall matrix, such as the table of a multilingual model, where nothing couples the rows, the dictionary is
    learned from a sample of them; then all find their codes for it, and the dictionary is made for these once more.

    Args:
        weight: the matrix.
        spec: structure and size.
        metric: of the error.
        start: factors of the same spec to continue from, instead of the start above. Their supports change less.
        rounds: the effort. Cheap fits for comparisons need 8 or so.

    Returns:
        `weight`, `support` and `dictionary` as `DenseSparse` stores them, in the type of the given weight, and the
        relative error `||R (W - W') L||_F / ||R W L||_F`. Stored values have the same root mean square as the entries
        of the dictionary, and as those of each atom; after a sample, about so. Atoms are sorted by the energy that they
        contribute, the most important first.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    problem = _Problem.of(weight, spec, metric)
    tall = start is None and spec.side == "rows" and len(weight) > MANY
    sample = sampled(weight, metric) if tall else None
    if sample is not None:
        fast = torch.bfloat16 if weight.device.type == "cpu" and has_bfloat16_products() else None
        few = dataclasses.replace(_Problem.of(sample[0], spec, sample[1]), products=fast)
        problem = dataclasses.replace(problem, products=fast)
        codes = few.alternate(few.begin(min(rounds, OF_SAMPLE // 2)), min(rounds, OF_SAMPLE_ROUNDS), EAGERNESS)
        atoms, norms = few.unit(codes)
        plain, used = best_dictionary(codes * norms.T, few.plain), (codes != 0).any(0)
        plain[~used] = plain[used].square().mean().sqrt()  # which others may use
        known = atoms, plain
        codes = problem.encode(atoms, min(rounds, FINISH))
    else:
        known = None
        if start is None:
            codes, eagerness = problem.begin(rounds), EAGERNESS if problem.moment is None else COUPLED
        else:
            codes, eagerness = spec.coefficients(start).to(problem.target.dtype) * problem.scale, 1.0
        codes = problem.alternate(codes, rounds if problem.moment is None else -(-rounds // SHARE), eagerness)
    factors = problem.factors(codes, weight.dtype, known)
    if sample is not None:
        return factors, problem.error(factors)
    wide = {name: factor.to(codes.dtype) if factor.is_floating_point() else factor for name, factor in factors.items()}
    return factors, metric.relative_error(weight, spec.to_dense((weight.shape[0], weight.shape[1]), wide))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Minimize `tr(E^T K E)` with `E = M - S D`, in coordinates where rows of `S` have equal weight.

    Args:
        spec: the constraint on `S`.
        plain: `T / size`, with rows scaled, `(long, short)`.
        target: `M`: the same, with the metric of the short side whitened.
        size: the largest entry of the weight; squares of very small or very large values would leave float32's range.
        scale: what rows were multiplied by, `(long, 1)`.
        coupling: of the rows; None where nothing couples them.
        root: of the metric of the short side, a matrix or its diagonal; None for the identity.
        products: precision in which codes that nothing couples meet the Gram matrix of atoms, if that is another.
    """

    spec: DenseSparse
    plain: Tensor
    target: Tensor
    size: Tensor
    scale: Tensor
    coupling: Coupling | None = None
    root: Tensor | None = None
    products: torch.dtype | None = None

    @property
    def moment(self) -> Tensor | None:
        """`K`, with a diagonal of 1, `(long, long)`; None for the identity."""
        return None if self.coupling is None else self.coupling.moment

    @classmethod
    def of(cls, weight: Tensor, spec: DenseSparse, metric: Metric) -> _Problem:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        size = wide.abs().amax()
        if not torch.isfinite(size):
            raise ModelError("the matrix holds NaN or infinite values")
        wide = wide / size.clamp_min(torch.finfo(wide.dtype).tiny)
        # Rows of `T` are along the longer side: `||long E short||_F` is the error.
        long, short, coupling = metric.rows, metric.columns, metric.coupling(spec.side, wide.dtype)
        if spec.side == "columns":
            wide = wide.T
            long, short = (None if root is None else root.t() for root in (metric.columns, metric.rows))
        scale = torch.ones(1, 1, dtype=wide.dtype, device=wide.device)
        # Only ratios within a metric matter to the factors.
        if long is not None:
            spread = long if coupling is None else coupling.spread
            scale = (spread / spread.square().mean().sqrt())[:, None].to(wide.dtype)
        plain = target = scale * wide
        root = None
        if short is not None:
            root = (short / short.square().sum(-1).mean().sqrt() if short.dim() == 2 else short).to(wide.dtype)
            root = root if root.dim() == 2 else root / root.square().mean().sqrt()
            target = _times_root(plain, root)
        return cls(spec, plain, target, size, scale, coupling, root)

    @functools.cached_property
    def pulled(self) -> Float[Tensor, "long short"]:
        """`K M`."""
        return self.target if self.moment is None else self.moment @ self.target

    def begin(self, rounds: int) -> Float[Tensor, "long atoms"]:
        """Codes to start from."""
        if self.coupling is not None:
            added = self.coupling.added[:, None]
            apart = dataclasses.replace(self, target=self.target * added, coupling=None)
            return apart.alternate(apart.begin(rounds), rounds, EAGERNESS) / added
        atoms = self.spec.atoms
        fewer = min(atoms, *self.target.shape)
        nonzeros = min(self.spec.nonzeros, fewer - 1)
        codes, _ = orthonormal_dictionary(self.target, fewer, nonzeros, min(ORTHONORMAL, 2 * rounds))
        return F.pad(codes, (0, atoms - fewer))

    def alternate(self, codes: Float[Tensor, "long atoms"], rounds: int, eagerness: float) -> Tensor:
        """Better codes: in each round the dictionary, supports and values; of coupled rows the best of all rounds."""
        best, least = codes, math.inf
        for done in range(rounds):
            unit, norms = self.unit(codes)
            step = eagerness + (1 - eagerness) * (done + 1) / rounds
            moved = self.recode(codes * norms.T, unit, step)
            if self.moment is not None:
                residual = self.target - moved @ unit
                error = float((residual * (self.moment @ residual)).sum())
                if not error < 4 * least:  # overshot, or not even finite
                    codes, eagerness = best, 1.0
                    continue
                if error < least:
                    best, least = moved, error
            codes = moved
        return codes if self.moment is None else best

    def unit(self, codes: Float[Tensor, "long atoms"]) -> tuple[Float[Tensor, "atoms short"], Float[Tensor, "atoms 1"]]:
        """The dictionary in unit atoms, and their norms."""
        dictionary = self.dictionary(codes)
        # Squares of the entries of an atom that hardly anybody uses may be 0.
        norms = dictionary.norm(dim=1, keepdim=True).clamp_min(torch.finfo(codes.dtype).tiny ** 0.5)
        return dictionary / norms, norms

    def dictionary(self, codes: Float[Tensor, "long atoms"]) -> Float[Tensor, "atoms short"]:
        """The best dictionary; in the place of atoms that nobody uses, the rows that are fitted worst."""
        dictionary = best_dictionary(codes, self.target, self.moment)
        unused = (codes == 0).all(0)
        count = int(unused.sum())
        if count:
            errors = (self.target - codes @ dictionary).square().sum(1)
            dictionary[unused] = self.target[errors.sort(descending=True, stable=True).indices[:count]]
        return dictionary

    def recode(
        self, codes: Float[Tensor, "long atoms"], dictionary: Float[Tensor, "atoms short"], step: float
    ) -> Float[Tensor, "long atoms"]:
        """New supports and their values, for a dictionary of unit atoms."""
        gram, projected = dictionary @ dictionary.T, self.target @ dictionary.T
        codes = codes.clone()
        if self.moment is None:
            gram = gram.to(self.products or gram.dtype)
            for rows in self.ranges(ENTRIES // self.spec.atoms):
                moved = torch.lerp(codes[rows], projected[rows] + codes[rows] - times(codes[rows], gram), step)
                codes[rows] = self.sparse(moved, projected[rows], gram)
            return codes
        residual = projected - codes @ gram
        for rows, inverse in self.blocks:
            block = self.moment[rows, rows]
            pull = self.moment[rows] @ residual
            moved = codes[rows] + step * (inverse @ pull)
            mask = largest(moved.square(), self.spec.nonzeros)
            right = torch.addmm(pull, block, codes[rows] @ gram)
            codes[rows] = refine_codes(moved * mask, mask, right, gram, block, 3)
            residual[rows] = projected[rows] - codes[rows] @ gram
        return refine_codes(codes, codes != 0, self.pulled @ dictionary.T, gram, self.moment, 3)

    def encode(self, atoms: Float[Tensor, "atoms short"], rounds: int) -> Float[Tensor, "long atoms"]:
        """Codes for unit atoms that stay as they are, of rows that nothing couples.

        They start from the largest of the codes that all atoms would have together, a little shrunk: two rounds come as
        near then as four from the largest projections on atoms.
        """
        dtype, gram = self.products or atoms.dtype, atoms @ atoms.T
        inverse = torch.linalg.inv(gram + SHRUNK * torch.eye(len(gram)).to(gram)).to(dtype)
        gram = gram.to(dtype)
        found = self.target.new_empty(len(self.target), len(atoms))
        for rows in self.ranges(ENTRIES // len(atoms)):
            projected = self.target[rows] @ atoms.T
            codes = self.sparse(times(projected, inverse), projected, gram)
            for _ in range(rounds):
                codes = self.sparse(projected + codes - times(codes, gram), projected, gram)
            found[rows] = codes
        return found

    def sparse(
        self, codes: Float[Tensor, "rows atoms"], projected: Float[Tensor, "rows atoms"], gram: Tensor
    ) -> Float[Tensor, "rows atoms"]:
        """The largest codes of rows that nothing couples, brought nearer to the best on their supports."""
        mask = largest(codes.square(), self.spec.nonzeros)
        return refine_codes(codes * mask, mask, projected, gram, None, 2)

    @functools.cached_property
    def blocks(self) -> list[tuple[slice, Tensor]]:
        """Rows that choose their supports at the same time, and the inverse of their part of `K`."""
        assert self.moment is not None
        ranges = list(self.ranges(min(TOGETHER, len(self.target) // 8)))
        return [(rows, torch.linalg.inv(self.moment[rows, rows].double()).to(self.moment)) for rows in ranges]

    def ranges(self, rows: int) -> Iterator[slice]:
        """Consecutive rows, so many at a time."""
        size = max(rows, 1)
        for first in range(0, len(self.target), size):
            yield slice(first, min(first + size, len(self.target)))

    def error(self, factors: Mapping[str, Tensor]) -> float:
        """The relative error of factors, where nothing couples the rows."""
        size = self.size.sqrt().clamp_min(torch.finfo(self.target.dtype).tiny)
        stored = self.spec.coefficients(factors).to(self.target.dtype).mul_(self.scale / size)
        dictionary = factors["dictionary"].to(self.target.dtype) / size
        norms = [
            float(torch.linalg.vector_norm(of, dtype=torch.float64))
            for of in (self.target - stored @ _times_root(dictionary, self.root), self.target)
        ]
        return norms[0] / max(norms[1], torch.finfo(torch.float64).tiny)

    def factors(
        self, codes: Float[Tensor, "long atoms"], dtype: torch.dtype, known: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Codes as they are stored, sorted and balanced, and the best dictionary for what is stored.

        Args:
            codes: in any order, of atoms of any norm.
            dtype: of the factors.
            known: a dictionary for these codes, `(atoms, short)`, in whitened coordinates, and in those of the matrix,
                if there is one: they tell which atoms matter, and how large they are.
        """
        dictionary, plain = known or (
            best_dictionary(codes, self.target, self.moment),
            best_dictionary(codes, self.plain, self.moment),
        )
        # The matrix determines what it needs: the dictionary in its own coordinates.
        used, norms = codes.square().sum(0) * dictionary.square().sum(1), plain.square().mean(1).sqrt()
        order = used.sort(descending=True, stable=True).indices
        codes = codes[:, order] / self.scale * norms[order]
        share = (codes.square().sum() / (self.spec.nonzeros * len(codes))).sqrt()
        root = self.size.sqrt()
        codes = codes / share.clamp_min(torch.finfo(codes.dtype).tiny).sqrt()
        factors = self.spec.pack((codes * root).to(dtype), codes.square())
        stored = self.spec.coefficients(factors).to(codes.dtype) / root.clamp_min(torch.finfo(codes.dtype).tiny)
        dictionary = best_dictionary(stored * self.scale, self.plain, self.moment) * root
        return factors | {"dictionary": dictionary.to(dtype).contiguous()}


def _times_root(rows: Tensor, root: Tensor | None) -> Tensor:
    return rows if root is None else rows * root if root.dim() == 1 else rows @ root
