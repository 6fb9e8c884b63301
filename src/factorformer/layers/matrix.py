"""Costs of a weight matrix, dense and factorized: parameters, bytes, and FLOPs per token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from enum import Enum
from typing import Literal

import torch

from factorformer.structures import Dense, Shape, Structure
from factorformer.structures.integers import TYPES, Bits


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters (stored values), bytes (indices included), and FLOPs per token (a multiply-add counts as two).

    >>> Cost(1, 4, 2) + Cost(2, 8, 4)
    Cost(parameters=3, bytes=12, flops=6)
    """

    parameters: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.bytes + other.bytes, self.flops + other.flops)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    return sum(costs, Cost())


Role = Literal["attention", "feed_forward", "embedding"]

Scope = Literal["blocks", "all"]
"""What of a model is changed and counted: its Transformer blocks, or all of it."""


class LeftOut(str, Enum):
    """Reasons to stay dense that the caller gave, by patterns of names."""

    NOT_INCLUDED = "not included"
    EXCLUDED = "excluded"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model, stored once, whatever the number of places that use it.

    Args:
        name: the module that owns it.
        shape: `(out, in)`; an embedding is `(rows, width)`.
        dtype: the floating type of its values, e.g. `float32`.
        products: how often a token is multiplied by it in one forward pass: more than once in shared layers, by a part
            of it where experts are chosen.
        lookups: how often a token looks up one of its rows.
        aliases: other modules tied to the same values.
        dense: why it has to stay dense, a `LeftOut` or words; None if it can be factorized.
        role: what it does in the model; an output head counts as an embedding, whatever else is not part of attention
            as feed-forward.
        bits: of the integers in which what it becomes is stored; None for floats.
    """

    name: str
    shape: Shape
    dtype: str = "float32"
    products: float = 1
    lookups: int = 0
    aliases: tuple[str, ...] = ()
    dense: str | None = None
    role: Role = "feed_forward"
    bits: Bits | None = None

    @property
    def values(self) -> torch.dtype:
        """The type in which factors store their values."""
        return self.floating if self.bits is None else TYPES[self.bits]

    @property
    def floating(self) -> torch.dtype:
        """The type of dense values, and of the scales of those in integers."""
        return getattr(torch, self.dtype)

    @property
    def whole(self) -> Structure | None:
        """What it is where it is not factorized: dense in integers, or None for dense in floats."""
        return None if self.bits is None else Dense()

    def bytes(self, spec: Structure | None, without: Collection[str] = ()) -> int:
        """Stored bytes under a structure, or dense for None, without factors stored elsewhere."""
        if spec is None:
            return math.prod(self.shape) * self.floating.itemsize
        elsewhere = [tensor for name, tensor in spec.tensors(self.shape).items() if name in without] if without else ()
        whole = spec.bytes(self.shape, self.values, self.floating)
        return whole - sum(tensor.bytes(self.values, self.floating) for tensor in elsewhere)

    def cost(self, spec: Structure | None, without: Collection[str] = ()) -> Cost:
        """Cost under a structure, or dense for None; factors stored elsewhere are not counted, but multiplied by."""
        if spec is None:
            values = math.prod(self.shape)
            return Cost(values, self.bytes(None), round(2 * values * self.products))
        flops = self.products * spec.flops(self.shape) + self.lookups * spec.row_flops(self.shape)
        elsewhere = [tensor for name, tensor in spec.tensors(self.shape).items() if name in without]
        return Cost(
            spec.parameters(self.shape) - sum(math.prod(t.size) for t in elsewhere if t.dtype is None),
            self.bytes(spec, without),
            round(flops),
        )


@dataclasses.dataclass(frozen=True)
class Member:
    """One matrix of a group.

    Args:
        matrix: what it is.
        side: whether its rows or its columns are rows of the group's stack.
    """

    matrix: Matrix
    side: Literal["rows", "columns"]

    @property
    def sides(self) -> tuple[int, int]:
        """`(long, short)`: how many rows it has in the stack, and how long they are."""
        out, inner = self.matrix.shape
        return (out, inner) if self.side == "rows" else (inner, out)
