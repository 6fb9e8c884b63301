"""A small dense dictionary times a sparse matrix with as many nonzeros in each row."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from factorformer.errors import ModelError, one_of
from factorformer.kernels import chain, sparse_product, sparse_rows, support
from factorformer.kernels.sparse import build
from factorformer.structures.base import (
    Factors,
    Selection,
    Shape,
    Structure,
    TensorSpec,
    dense_bytes,
    require_positive,
)
from factorformer.structures.integers import SCALE, Rounded, dense, floats, look_up

Side = Literal["rows", "columns"]

DENSITY = 0.2
"""Nonzeros for each atom in the sizes that planners start from; data may ask for others of as many bytes."""

STEP = 8
"""Atoms by which those sizes grow; fewer where the dimension that they live in is below 16 times that."""

ATOMS = 1.5
"""The most atoms that data may ask for, relative to the dimension that they live in."""

FAMILIES = 12
"""Numbers of atoms that data may ask for, from an eighth of that dimension on, in equal ratios."""

FEWEST_SIZES = 3
"""Numbers of nonzeros below the size of the dense matrix that make a number of atoms worth a look."""


@dataclasses.dataclass(frozen=True)
class DenseSparse(Structure):
    """`W = S D` with `side="rows"`, `W = (S D)^T` with `side="columns"`: `D` a dense dictionary, `S` sparse.

    Each row of `S` has exactly `nonzeros` entries, so each row (or column) of `W` is a combination of that many atoms,
    the rows of `D`. Atoms should live in the shorter dimension, where they are cheap: `DenseSparse.of` chooses the side
    so. With `long` the dimension that `S` covers and `short` the other one, stored are

    - `weight: (long, nonzeros)`, the values of `S`, by ascending position,
    - `support: (long, bytes)`, their positions as bitmap, or in one byte or two, whatever is smallest,
    - `dictionary: (atoms, short)`,

    and an input row costs `atoms * short + long * nonzeros` multiply-adds. This is the form of DSFormer (Chand, Prabhu
    and Kumar, arXiv 2312.13211), of which sizes and storage are ours, and of CoSpaDi (arXiv 2509.22075).

    Args:
        atoms: rows of the dictionary.
        nonzeros: entries in each row of `S`, fewer than atoms.
        side: whether rows or columns of `W` are combinations of atoms.

    >>> spec = DenseSparse(atoms=288, nonzeros=56)
    >>> spec.bytes((1536, 384)), 4 * 1536 * 384
    (841728, 2359296)
    """

    kind: ClassVar[str] = "dense_sparse"
    relative_errors: ClassVar[tuple[tuple[float, float], ...]] = ((1 / 2, 0.5), (1 / 5, 0.75))  # of MiniLM
    training_form: ClassVar[Literal["sparse_codes"] | None] = "sparse_codes"
    shareable: ClassVar[tuple[str, ...]] = ("dictionary",)
    atoms: int
    nonzeros: int
    side: Side = "rows"

    def __post_init__(self) -> None:
        for name in ("atoms", "nonzeros"):
            require_positive(name, getattr(self, name))
        if self.side not in get_args(Side):
            raise ModelError(f"unknown side {one_of(str(self.side), get_args(Side))}")
        if self.nonzeros >= self.atoms:
            raise ModelError(f"nonzeros must be fewer than the {self.atoms} atoms of {self}")
        if self.atoms > support.LARGEST:
            raise ModelError(f"atoms of {self} must be at most {support.LARGEST}")

    @classmethod
    def of(cls, shape: Shape, atoms: int, nonzeros: int) -> DenseSparse:
        """The structure with atoms in the shorter dimension of a matrix of this shape; if equal, in that of outputs.

        There the second moment of the inputs couples the rows of `S`, which can make up for each other's error: fits
        of square matrices to it are 5 to 10 % closer on MiniLM.

        >>> DenseSparse.of((384, 1536), atoms=288, nonzeros=56).side
        'columns'
        """
        return cls(atoms, nonzeros, "rows" if shape[0] > shape[1] else "columns")

    def sides(self, shape: Shape) -> tuple[int, int]:
        """`(long, short)`: the dimension of the matrix that `S` covers, and that of the atoms."""
        return shape if self.side == "rows" else (shape[1], shape[0])

    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        long, short = self.sides(shape)
        packed = support.row_bytes(self.atoms, self.nonzeros)
        return {
            "weight": TensorSpec((long, self.nonzeros)),
            "support": TensorSpec((long, packed), torch.uint8),
            "dictionary": TensorSpec((self.atoms, short)),
        }

    def flops(self, shape: Shape) -> int:
        long, short = self.sides(shape)
        return 2 * (self.atoms * short + long * self.nonzeros)

    def row_flops(self, shape: Shape) -> int:
        # A row of S is densified before it meets the dictionary: one GEMM is faster than gathering atoms.
        return 2 * (self.atoms * shape[1] if self.side == "rows" else shape[1] * self.nonzeros)

    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        stored = sum(math.prod(t.size) for name, t in self.tensors(shape).items() if name not in shared and not t.dtype)
        if stored >= shape[0] * shape[1]:
            raise ModelError(
                f"{self} of a {shape[0]}x{shape[1]} matrix stores no less than the dense matrix; "
                f"take fewer atoms or nonzeros, or keep the matrix dense instead"
            )

    def check_factors(self, shape: Shape, factors: Factors) -> None:
        support.check(factors["support"], self.atoms, self.nonzeros)

    def coefficients(self, factors: Factors) -> Float[Tensor, "long atoms"]:
        """`S` as a dense matrix; differentiable in the values."""
        return build(factors["weight"], factors["support"], self.atoms)

    def pack(
        self, coefficients: Float[Tensor, "long atoms"], scores: Float[Tensor, "long atoms"] | None = None
    ) -> dict[str, Tensor]:
        """`weight` and `support` of the entries that score highest in each row: by default the largest.

        Args:
            coefficients: `S`, dense.
            scores: not negative.
        """
        scores = coefficients.detach().square() if scores is None else scores
        positions = self.choose(scores)
        return {"weight": coefficients.gather(1, positions), "support": support.pack(positions, self.atoms)}

    def choose(self, scores: Float[Tensor, "long atoms"]) -> Tensor:
        """Ascending positions of the entries that score highest, `(long, nonzeros)`, int64."""
        if scores.dim() == 2 and bool(((used := scores != 0).sum(1) == self.nonzeros).all()):  # no others can
            return used.nonzero()[:, 1].view(-1, self.nonzeros)
        return scores.topk(self.nonzeros, dim=1, sorted=False).indices.sort(1).values

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        dictionary = dense(factors, "dictionary", columns=self.side == "columns")
        if self.side == "columns":
            return chain(self._sparse(factors, x, transposed=True), (dictionary,), bias)
        return self._sparse(factors, chain(x, (dictionary,)), bias=bias)

    def _sparse(self, factors: Factors, x: Tensor, *, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
        values, packed = factors["weight"], factors["support"]
        scales = factors.get("weight" + SCALE)
        return sparse_product(x, values, packed, self.atoms, scales=scales, bias=bias, transposed=transposed)

    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        if self.side == "columns":
            return self._sparse(factors, F.embedding(index, floats(factors)["dictionary"].T))
        if not isinstance(factors, Rounded):
            dictionary = factors["dictionary"], factors.get("dictionary" + SCALE)
            weight, scales = factors["weight"], factors.get("weight" + SCALE)
            found = sparse_rows(index, weight, scales, factors["support"], dictionary)
            if found is not None:
                return found
        values = look_up(factors, "weight", index.flatten())
        rows = build(values, factors["support"][index.flatten()], self.atoms) @ floats(factors)["dictionary"]
        return rows.view(*index.shape, shape[1])

    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        factors = floats(factors)
        product = self.coefficients(factors) @ factors["dictionary"]
        return product if self.side == "rows" else product.T

    def dense_factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The dictionary and `S`, or their transposes the other way round."""
        dictionary, codes = factors["dictionary"], self.coefficients(factors)
        return (dictionary, codes) if self.side == "rows" else (codes.T, dictionary.T)

    def exported_rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        """Rows of the dictionary's transpose times a dense `S`, where that covers the columns."""
        if self.side == "rows":
            return self.rows(shape, factors, index)
        factors = floats(factors)
        return F.linear(F.embedding(index, factors["dictionary"].T), self.coefficients(factors))

    @property
    def codes_rows(self) -> bool:
        """Where rows are combinations of atoms."""
        return self.side == "rows"

    @property
    def units(self) -> int:
        return self.atoms

    def with_units(self, units: int) -> DenseSparse:
        """So many atoms, and nonzeros in proportion."""
        nonzeros = min(max(round(self.nonzeros * units / self.atoms), 1), units - 1)
        return dataclasses.replace(self, atoms=units, nonzeros=nonzeros)

    def select(self, factors: Factors, kept: Tensor, smaller: Structure) -> Selection:
        """The kept atoms, and of the entries that refer to them the most energetic of each row."""
        assert isinstance(smaller, DenseSparse)
        energy = self.coefficients(factors)[:, kept].square() * factors["dictionary"][kept].square().sum(1)
        positions = smaller.choose(energy)

        def weight(values: Tensor) -> Tensor:
            return build(values, factors["support"], self.atoms)[:, kept].gather(1, positions)

        packed = support.pack(positions, smaller.atoms)
        return Selection(smaller, {"weight": weight, "dictionary": lambda t: t[kept]}, {"support": packed})

    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Tensor]:
        entries = build(values["weight"], factors["support"], self.atoms)
        return {"dictionary": values["dictionary"], "weight": entries.T}

    def initialize(self, factors: Factors, std: float) -> None:
        # The sum of `nonzeros` products of independent entries has variance nonzeros * s^4.
        weight = factors["weight"]
        scale = (std**2 / self.nonzeros) ** 0.25
        for name in ("weight", "dictionary"):
            torch.nn.init.normal_(factors[name], std=scale)
        positions = self.choose(torch.rand(len(weight), self.atoms, device=weight.device))
        factors["support"].copy_(support.pack(positions, self.atoms))

    @classmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[DenseSparse]:
        short, dense = min(shape), dense_bytes(shape, dtype)
        step = _step(short)
        numbers = [*range(step, short, step), short]
        firsts = [cls.of(shape, atoms, max(math.ceil(DENSITY * atoms), 1)) for atoms in numbers if atoms > 1]
        for first, following in itertools.zip_longest(firsts, firsts[1:]):
            # Nonzeros fill the gap to the next number of atoms, so that sizes grow in small steps.
            end = dense if following is None else following.bytes(shape, dtype)
            for nonzeros in range(first.nonzeros, first.atoms):
                spec = first if nonzeros == first.nonzeros else cls.of(shape, first.atoms, nonzeros)
                size = spec.bytes(shape, dtype)
                if max(size, dense_bytes((1, spec.parameters(shape)), dtype)) >= dense:
                    return
                if size >= end:
                    break
                yield spec

    @classmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[list[DenseSparse], ...]:
        short, dense = min(shape), dense_bytes(shape, dtype)
        step, first, last = _step(short), short / 8, ATOMS * short
        spaced = (first * (last / first) ** (place / (FAMILIES - 1)) for place in range(FAMILIES))
        families = []
        for atoms in sorted({max(round(number / step), 1) * step for number in spaced}):
            family = []
            for nonzeros in range(1, atoms):
                spec = cls.of(shape, atoms, nonzeros)
                if max(spec.bytes(shape, dtype), dense_bytes((1, spec.parameters(shape)), dtype)) >= dense:
                    break
                family.append(spec)
            if len(family) >= FEWEST_SIZES:
                families.append(family)
        return tuple(families)


def _step(short: int) -> int:
    return min(STEP, max(short // 16, 1))
