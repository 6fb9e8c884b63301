"""The interface of structures: a frozen description of a factorized matrix, and pure functions on its factors.

A *spec* (`LowRank(rank=64)`) says how a matrix of shape `(out, in)` is stored. The tensors themselves, the
*factors*, are a plain mapping from names to tensors; modules in `factorformer.layers.nn` own them. A spec knows nothing
of how its factors were found.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.kernels.cpu import GROUP
from factorformer.kernels.dense import Dense

Shape = tuple[int, int]
"""Always `(out, in)`, as the weight of `nn.Linear`; an embedding is `(rows, width)`."""

Factors = Mapping[str, Tensor]


PACKED: dict[torch.dtype, int] = {getattr(torch, f"int{bits}"): bits for bits in (4, 3)}
"""The names of values in so few bits that they share bytes, and these bits; torch computes nothing in them."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Size of one factor, and its type where that is not the floating type of the model.

    Args:
        size: the tensor's dimensions.
        dtype: an integer type for indices and codes; None for values, which take the model's floating type.
    """

    size: tuple[int, ...]
    dtype: torch.dtype | None = None

    def bytes(self, dtype: torch.dtype, scale: torch.dtype = torch.float32) -> int:
        """Stored bytes when values are of type `dtype`; see `structures.integers` for what goes with integers."""
        if self.dtype is None and dtype in PACKED:
            return math.prod(packed(self.size, PACKED[dtype])) + math.prod(groups(self.size)) + scale.itemsize
        scales = self.size[0] * scale.itemsize if self.dtype is None and dtype == torch.int8 else 0
        return math.prod(self.size) * (self.dtype or dtype).itemsize + scales


def packed(size: tuple[int, ...], bits: int) -> tuple[int, int]:
    """The bytes of a factor whose values share them, `(rows, bytes)`: rows apart.

    >>> packed((8, 1, 5), 4)
    (8, 3)
    """
    return size[0], -(-math.prod(size[1:]) * bits // 8)


def groups(size: tuple[int, ...]) -> tuple[int, int]:
    """Those of such a factor that have an exponent each, `(rows, groups)`.

    >>> groups((8, 1, 65))
    (8, 3)
    """
    return size[0], -(-math.prod(size[1:]) // GROUP)


def dense_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Those of a dense matrix with values of a type, without scales."""
    return math.prod(packed(shape, PACKED[dtype])) if dtype in PACKED else math.prod(shape) * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Selection:
    """A matrix reduced to some of its units.

    Args:
        spec: the smaller structure.
        cut: for each factor of values, what takes the tensor, or any other of its layout such as an optimizer's state
            of it, to that of the kept units; entries stay bit for bit what they are.
        fixed: the new integer factors.
    """

    spec: Structure
    cut: Mapping[str, Callable[[Tensor], Tensor]]
    fixed: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Structure(ABC):
    """A matrix in factorized form, described before any of its numbers exist.

    One of the factors is named `weight` and never has the shape `(out, in)` or `(in, out)`: a program that loads the
    checkpoint without this package then stops at a shape mismatch, instead of running on random weights.
    """

    kind: ClassVar[str]
    """The name under which checkpoints store this structure."""

    relative_errors: ClassVar[tuple[tuple[float, float], ...]] = ((1 / 2, 1.0),)
    """Squared errors of fits over those of low rank, by part of the dense bytes, largest part first: the usual ones,
    for models without weights. Plans by loss measure them at as many sizes; one is enough where they hardly change."""

    training_form: ClassVar[Literal["sparse_codes"] | None] = None
    """How a matrix trains straight through, see `training.straight_through`; None without a support to learn."""

    starts_dense: ClassVar[bool] = False
    """Whether dynamic ranks train a dense matrix as the sum of its rank-1 components until factors of those that remain
    are smaller, as low rank alone can. Others start from the factors of their largest size."""

    shareable: ClassVar[tuple[str, ...]] = ()
    """Factors that several matrices can hold in common, each matrix by its rows or by its columns.

    A structure that has such factors has a field `side`, `"rows"` or `"columns"`, and stacking is sharing: matrices
    that share them are stored as one taller matrix would be, whose rows are the rows (or columns) of all of them.
    """

    @abstractmethod
    def tensors(self, shape: Shape) -> dict[str, TensorSpec]:
        """Name and size of every stored factor of a matrix of this shape."""

    @abstractmethod
    def flops(self, shape: Shape) -> int:
        """Floating-point operations (a multiply-add counts as two) to multiply one input row."""

    @abstractmethod
    def row_flops(self, shape: Shape) -> int:
        """Floating-point operations to evaluate one row, as an embedding does."""

    @abstractmethod
    def check(self, shape: Shape, shared: Collection[str] = ()) -> None:
        """Raise `ModelError` if a matrix of this shape cannot have this structure.

        Args:
            shape: `(out, in)`.
            shared: factors that other matrices hold too: what those gain or cost, all of them together decide.
        """

    @abstractmethod
    def check_factors(self, shape: Shape, factors: Factors) -> None:
        """Raise `ModelError` if integer factors are invalid, e.g. an index out of range; others are not looked at."""

    @abstractmethod
    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`: `(..., in)` to `(..., out)`, without building `W`."""

    @abstractmethod
    def rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        """`W[index]`: integers `(...)` to `(..., in)`, without building `W`."""

    @abstractmethod
    def to_dense(self, shape: Shape, factors: Factors) -> Tensor:
        """The matrix `W`, `(out, in)`: the only function that builds it."""

    def dense_factors(self, factors: Factors) -> tuple[Tensor, ...]:
        """Dense matrices `F_1, F_2, ...` with `W = ... F_2 F_1`, for runtimes that have the operators of ONNX alone.

        Empty where `matmul` is made of such operators anyway; those of our own have to be replaced by this.
        """
        return ()

    def chain(self, factors: Factors) -> tuple[Dense, ...]:
        """`W_1, W_2, ...` with `W = ... W_2 W_1`, as they are stored, if that is all of the product; else none."""
        return ()

    def exported_rows(self, shape: Shape, factors: Factors, index: Tensor) -> Tensor:
        """`rows` in the operators of ONNX alone."""
        return self.rows(shape, factors, index)

    @classmethod
    def truncated(
        cls, weight: Float[Tensor, "out inner"], scaled: Float[Tensor, "out inner"], *, plain: bool
    ) -> Tensor | None:
        """The matrix whose best approximation of rank `k` has the error of the best fit with `k` units.

        None where no closed form is the optimum: plans by loss then measure a few fits.

        Args:
            weight: the matrix `W`.
            scaled: `R W L`, the weight under the metric of the fit.
            plain: whether that is the weight itself.
        """
        return None

    @property
    @abstractmethod
    def units(self) -> int:
        """How many equal parts the matrix is a sum of, each of which can be removed: components, terms, atoms."""

    @abstractmethod
    def with_units(self, units: int) -> Structure:
        """The spec with another number of units, and everything else in proportion."""

    @abstractmethod
    def select(self, factors: Factors, kept: Int[Tensor, " units"], smaller: Structure) -> Selection:
        """The matrix without some of its units.

        Args:
            factors: what is stored now.
            kept: numbers of the units that stay, ascending.
            smaller: what to make of them, from `with_units`.
        """

    @abstractmethod
    def by_unit(self, factors: Factors, values: Factors) -> dict[str, Float[Tensor, "units entries"]]:
        """Tensors laid out as factors, such as their gradients, with one row for each unit."""

    @abstractmethod
    def initialize(self, factors: Factors, std: float) -> None:
        """Fill the factors in place so that the entries of `W` have mean 0 and standard deviation `std`."""

    def is_multiple(self, multiple: int) -> bool:
        """Whether its rank is a multiple of a number, where it has one that is a side of dense products."""
        return True

    @property
    def codes_rows(self) -> bool:
        """Whether each row has codes of its own in what is common to all: few rows tell as much of the error as all."""
        return False

    @classmethod
    @abstractmethod
    def candidates(cls, shape: Shape, dtype: torch.dtype) -> Iterator[Structure]:
        """Specs of this kind that are smaller than the dense matrix, in order of growing bytes: what planners try.

        Scales of int8 count as float32: in the order of bytes with scales of 16 bits, neighbours may change places.
        """

    @classmethod
    @abstractmethod
    def families(cls, shape: Shape, dtype: torch.dtype) -> tuple[Sequence[Structure], ...]:
        """Ladders of specs to choose among from data: each grows in bytes, and from one to the next a trade-off shifts.

        Where one number says all there is to say of a size, there is one family, the candidates.
        """

    def parameters(self, shape: Shape) -> int:
        """Count of stored values (integers that index or encode are not parameters)."""
        return _parameters(self, shape)

    def bytes(self, shape: Shape, dtype: torch.dtype = torch.float32, scale: torch.dtype = torch.float32) -> int:
        """Stored bytes of all factors, indices included, when values are of type `dtype`, and scales of int8 `scale`.

        Scales have the floating type of the model.
        """
        return _bytes(self, shape, dtype, scale)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `structures.from_dict` reads it back."""
        return {"structure": self.kind, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        fields = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.kind}({fields})"


# Planners ask for the same few sizes of every layer, again and again.


@functools.lru_cache(maxsize=2**16)
def _parameters(spec: Structure, shape: Shape) -> int:
    return sum(math.prod(t.size) for t in spec.tensors(shape).values() if t.dtype is None)


@functools.lru_cache(maxsize=2**16)
def _bytes(spec: Structure, shape: Shape, dtype: torch.dtype, scale: torch.dtype) -> int:
    return sum(t.bytes(dtype, scale) for t in spec.tensors(shape).values())


def require_positive(name: str, value: int) -> None:
    """Raise `ModelError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be an integer of at least 1, got {value!r}")
