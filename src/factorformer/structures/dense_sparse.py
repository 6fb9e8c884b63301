"""A small dense dictionary times a sparse matrix with as many nonzeros in each row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError, one_of
from factorformer.kernels import sparse_product, support
from factorformer.kernels.sparse import build
from factorformer.structures.base import Factors, Shape, Structure, TensorSpec, require_positive

Side = Literal["rows", "columns"]

DENSITY = 0.2
"""Nonzeros for each atom in the sizes that planners start from; data may ask for others of as many bytes."""

STEP = 8
"""Atoms by which those sizes grow."""


@dataclasses.dataclass(frozen=True)
class DenseSparse(Structure):
    """`W = S D` with `side="rows"`, `W = (S D)^T` with `side="columns"`: `D` a dense dictionary, `S` sparse.

    Each row of `S` has exactly `nonzeros` entries, so each row (or column) of `W` is a combination of that many atoms,
    the rows of `D`. Atoms should live in the shorter dimension, where they are cheap: `DenseSparse.of` chooses the side
    so. With `long` the dimension that `S` covers and `short` the other one, stored are

    - `weight: (long, nonzeros)`, the values of `S`, by ascending position,
    - `support: (long / group, bytes)`, their positions as bitmap, or in one byte or two, whatever is smallest,
    - `dictionary: (atoms, short)`,

    and an input row costs `atoms * short + long * nonzeros` multiply-adds. This is the form of DSFormer (Chand, Prabhu
    and Kumar, arXiv 2312.13211), of which sizes and storage are ours, and of CoSpaDi (arXiv 2509.22075).

    Args:
        atoms: rows of the dictionary.
        nonzeros: entries in each row of `S`, fewer than atoms.
        side: whether rows or columns of `W` are combinations of atoms.
        group: consecutive rows of `S` that share one support: cheaper to store, and dense blocks to multiply.
        blocks: equal blocks of atoms that hold the same number of nonzeros each: 2:4 sparsity is `blocks = atoms / 4`
            and `nonzeros = 2 * blocks`.

    >>> spec = DenseSparse(atoms=288, nonzeros=56)
    >>> spec.bytes((1536, 384)), 4 * 1536 * 384
    (841728, 2359296)
    """

    kind: ClassVar[str] = "dense_sparse"
    atoms: int
    nonzeros: int
    side: Side = "rows"
    group: int = 1
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("atoms", "nonzeros", "group", "blocks"):
            require_positive(name, getattr(self, name))
        if self.side not in get_args(Side):
            raise ModelError(f"unknown side {one_of(str(self.side), get_args(Side))}")
        if self.nonzeros >= self.atoms:
            raise ModelError(f"nonzeros must be fewer than the {self.atoms} atoms of {self}")
        if self.atoms % self.blocks or self.nonzeros % self.blocks:
            raise ModelError(f"blocks must divide both atoms and nonzeros of {self}")
        if self.atoms // self.blocks > support.LARGEST:
            raise ModelError(f"atoms of {self} must be at most {support.LARGEST} in a block")

    @classmethod
    def of(cls, shape: Shape, atoms: int, nonzeros: int, group: int = 1, blocks: int = 1) -> DenseSparse:
        """The structure with atoms in the shorter dimension of a matrix of this shape.

        >>> DenseSparse.of((384, 1536), atoms=288, nonzeros=56).side
        'columns'
        """
        return cls(atoms, nonzeros, "rows" if shape[0] >= shape[1] else "columns", group, blocks)

    def sides(self, shape: Shape) -> tuple[int, int]:
        """`(long, short)`: the dimension of the matrix that `S` covers, and that of the atoms."""
        return shape if self.side == "rows" else (shape[1], shape[0])

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        long, short = self.sides(shape)
        packed = support.row_bytes(self.atoms, self.nonzeros, self.blocks)
        return {
            "weight": TensorSpec((long, self.nonzeros)),
            "support": TensorSpec((long // self.group, packed), torch.uint8),
            "dictionary": TensorSpec((self.atoms, short)),
        }

    def flops(self, shape: Shape) -> int:
        long, short = self.sides(shape)
        return 2 * (self.atoms * short + long * self.nonzeros)

    def row_flops(self, shape: Shape) -> int:
        # A row of S is spread out before it meets the dictionary: one GEMM is faster than gathering atoms.
        return 2 * (self.atoms * shape[1] if self.side == "rows" else shape[1] * self.nonzeros)

    def check(self, shape: Shape) -> None:
        long, _ = self.sides(shape)
        if long % self.group:
            raise ModelError(f"group of {self} must divide the {long} {self.side} of a {shape[0]}x{shape[1]} matrix")
        if self.parameters(shape) >= shape[0] * shape[1]:
            raise ModelError(
                f"{self} of a {shape[0]}x{shape[1]} matrix stores no less than the dense matrix; "
                f"take fewer atoms or nonzeros, or keep the matrix dense instead"
            )

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        support.check(factors["support"], self.atoms, self.nonzeros, self.blocks)

    def coefficients(self, factors: Factors) -> Float[Tensor, "long atoms"]:
        """`S`, spread out; differentiable in the values."""
        return build(factors["weight"], factors["support"], self.atoms, self.blocks)

    def pack(
        self, coefficients: Float[Tensor, "long atoms"], scores: Float[Tensor, "long atoms"] | None = None
    ) -> dict[str, Tensor]:
        """`weight` and `support` of the entries that score highest in each row (group, block): by default the largest.

        Args:
            coefficients: `S`, dense.
            scores: not negative; those of rows that share a support add up.
        """
        scores = coefficients.detach().square() if scores is None else scores
        positions = self.choose(scores)
        return {
            "weight": coefficients.gather(1, positions.repeat_interleave(self.group, 0)),
            "support": support.pack(positions, self.atoms, self.blocks),
        }

    def choose(self, scores: Float[Tensor, "long atoms"]) -> Tensor:
        """Ascending positions of the entries that score highest, `(long / group, nonzeros)`, int64."""
        scores = scores.reshape(-1, self.group, self.blocks, self.atoms // self.blocks).sum(1)
        best = scores.topk(self.nonzeros // self.blocks, dim=2, sorted=False).indices.sort(2).values
        starts = torch.arange(self.blocks, device=scores.device) * (self.atoms // self.blocks)
        return (best + starts[:, None]).flatten(1)

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.side == "columns":
            return F.linear(self._sparse(factors, x, transposed=True), factors["dictionary"].T, bias)
        product = self._sparse(factors, F.linear(x, factors["dictionary"]))
        return product if bias is None else product + bias.to(product.dtype)

    def _sparse(self, factors: Factors, x: Tensor, *, transposed: bool = False) -> Tensor:
        return sparse_product(x, factors["weight"], factors["support"], self.atoms, self.blocks, transposed=transposed)

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        if self.side == "columns":
            return self._sparse(factors, F.embedding(index, factors["dictionary"].T))
        values = F.embedding(index.flatten(), factors["weight"])
        supports = factors["support"][torch.div(index.flatten(), self.group, rounding_mode="floor")]
        rows = build(values, supports, self.atoms, self.blocks) @ factors["dictionary"]
        return rows.view(*index.shape, shape[1])

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        dense = self.coefficients(factors) @ factors["dictionary"]
        return dense if self.side == "rows" else dense.T

    def resize(self, factors: Factors, smaller: Structure) -> dict[str, Tensor]:
        """The leading atoms, and of the entries that refer to them the largest of each row."""
        if (
            not isinstance(smaller, DenseSparse)
            or (smaller.side, smaller.group, smaller.blocks) != (self.side, self.group, self.blocks)
            or smaller.atoms > self.atoms
            or smaller.nonzeros > self.nonzeros
            or (self.blocks > 1 and smaller.atoms != self.atoms)
        ):
            raise ModelError(
                f"cannot resize {self} to {smaller}: allowed is dense_sparse of the same side, group and blocks, with "
                f"nonzeros up to {self.nonzeros} and "
                + (f"{self.atoms} atoms" if self.blocks > 1 else f"atoms up to {self.atoms}")
            )
        if smaller == self:
            return dict(factors)
        kept = self.coefficients(factors)[:, : smaller.atoms]
        return smaller.pack(kept) | {"dictionary": factors["dictionary"][: smaller.atoms]}

    def initialize(self, factors: Factors, std: float) -> None:
        # The sum of `nonzeros` products of independent entries has variance nonzeros * s^4.
        weight = factors["weight"]
        scale = (std**2 / self.nonzeros) ** 0.25
        for name in ("weight", "dictionary"):
            torch.nn.init.normal_(factors[name], std=scale)
        positions = self.choose(torch.rand(len(weight), self.atoms, device=weight.device))
        factors["support"].copy_(support.pack(positions, self.atoms, self.blocks))

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[DenseSparse]:
        short, dense = min(shape), shape[0] * shape[1] * dtype.itemsize
        for atoms in (*range(min(STEP, short), short, STEP), short):
            last = atoms if atoms == short else math.ceil(DENSITY * (atoms + STEP))
            for nonzeros in range(max(math.ceil(DENSITY * atoms), 1), min(last, atoms)):
                spec = cls.of(shape, atoms, nonzeros)
                if max(spec.bytes(shape, dtype), spec.parameters(shape) * dtype.itemsize) >= dense:
                    return
                yield spec

    def alternatives(self, shape: Shape, dtype: torch.dtype) -> tuple[DenseSparse, ...]:
        """More atoms with fewer nonzeros each, and the reverse, in as many bytes or slightly fewer."""
        budget = self.bytes(shape, dtype)
        found: dict[int, DenseSparse] = {self.atoms: self}
        for factor in ATOMS:
            atoms = max(round(self.atoms * factor / STEP), 1) * STEP
            fitting = [
                spec
                for spec in self._with_atoms(atoms)
                if spec.bytes(shape, dtype) <= budget and spec.parameters(shape) < shape[0] * shape[1]
            ]
            if fitting and fitting[-1].bytes(shape, dtype) > 0.99 * budget:
                found.setdefault(atoms, fitting[-1])
        return tuple(found[atoms] for atoms in sorted(found))

    def _with_atoms(self, atoms: int) -> Iterator[DenseSparse]:
        if atoms % self.blocks == 0:
            for nonzeros in range(self.blocks, atoms, self.blocks):
                yield dataclasses.replace(self, atoms=atoms, nonzeros=nonzeros)


ATOMS = (0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
"""Multiples of the atoms of a size that `alternatives` offers."""
