"""Structures of weight matrices. CONTRIBUTING.md says what a new one takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from factorformer.errors import CheckpointError, one_of
from factorformer.structures import integers
from factorformer.structures.base import Factors, Selection, Shape, Structure, TensorSpec
from factorformer.structures.dense import Dense
from factorformer.structures.dense_sparse import DenseSparse
from factorformer.structures.kronecker_sum import KroneckerSum, arrange_back, factor_shapes, rearrange
from factorformer.structures.low_rank import LowRank, largest_rank

STRUCTURES: dict[str, type[Structure]] = {s.kind: s for s in (LowRank, KroneckerSum, DenseSparse)}
"""What a matrix can be factorized into."""


def from_dict(description: Mapping[str, Any]) -> Structure:
    """Read back what `Structure.to_dict` wrote.

    Raises:
        CheckpointError: an unknown structure, or fields that it does not have.

    >>> from_dict({"structure": "low_rank", "rank": 8})
    LowRank(rank=8)
    """
    stored = {**STRUCTURES, Dense.kind: Dense}  # dense in integers is described too, and is no factorization
    kind = description.get("structure")
    if kind not in stored:
        raise CheckpointError(f"unknown structure {one_of(str(kind), stored)}; is this package up to date?")
    # JSON knows no tuples.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "structure"}
    expected = {field.name for field in dataclasses.fields(stored[kind])}
    if set(fields) != expected:
        raise CheckpointError(f"structure '{kind}' has the fields {sorted(expected)}, got {sorted(fields)}")
    return stored[kind](**fields)


__all__ = [
    "STRUCTURES",
    "Dense",
    "DenseSparse",
    "Factors",
    "KroneckerSum",
    "LowRank",
    "Selection",
    "Shape",
    "Structure",
    "TensorSpec",
    "arrange_back",
    "factor_shapes",
    "from_dict",
    "integers",
    "largest_rank",
    "rearrange",
]
