"""Groups of matrices that share factors: by the tensor they read, or by their place in the layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from factorformer.layers.matrix import Matrix, Member
from factorformer.planning.plan import Entry

Share = Literal["inputs", "layers"]
"""`inputs`: matrices of a block that read one input (query, key and value; gate and up), and with them the output of
attention through its transpose, for it writes where they read. `layers`: the same matrix of all blocks."""

_READERS = (
    r"(q|k|v|query|key|value)(_proj|_lin)?|c_attn|Wqkv|qkv|qkv_proj|query_key_value",
    r"gate_proj|up_proj|wi_0|wi_1",
)
_KEYS = r"(k|v|key|value)(_proj|_lin)?"
_OUTPUT = r"o|o_proj|out_proj|out_lin|Wo|c_proj|dense|output\.dense"
_CROSS = r"EncDecAttention|encoder_attn|cross_?attn|cross_?attention"


Groups = Mapping[str, tuple[Member, ...]]
"""By the name of the first member, which owns what all of them share: members, two or more."""


def find_groups(matrices: Sequence[Matrix], share: Share | None) -> dict[str, tuple[Member, ...]]:
    """Matrices that share factors, as far as their names tell; one without partners is in no group.

    Names are those of transformers' architectures. Keys and values of cross-attention read what the encoder wrote, and
    so are a group of their own. Fused matrices (GPT-2's `c_attn`, ModernBERT's `Wqkv`) are one member.

    Args:
        matrices: of a model, in its order.
        share: what brings them together; None for no groups at all.
    """
    if share is None:
        return {}
    found: dict[object, list[Member]] = {}
    for matrix in matrices:
        if matrix.dense is None and not matrix.aliases and matrix.role != "embedding":
            place = _by_input(matrix) if share == "inputs" else _by_layer(matrix)
            if place is not None:
                key, member = place
                found.setdefault((key, member.sides[1], matrix.dtype), []).append(member)
    # A stack that is not taller than wide would have its atoms along the other side.
    groups = [members for members in found.values() if sum(m.sides[0] for m in members) > members[0].sides[1]]
    return {members[0].matrix.name: tuple(members) for members in groups if len(members) > 1}


def _by_input(matrix: Matrix) -> tuple[str, Member] | None:
    """The tensor that a matrix reads, or that reads what it writes; None if it has no known partner."""
    parent, _, name = matrix.name.rpartition(".")
    cross = re.search(_CROSS, parent) is not None
    if matrix.role == "attention":
        # BERT keeps query, key and value in `attention.self`, and the output in `attention.output`.
        place = re.sub(r"\.(self|output)$", "", parent)
        if re.fullmatch(_READERS[0], name):
            return f"{place} {'keys' if cross and re.fullmatch(_KEYS, name) else 'queries'}", Member(matrix, "rows")
        local = matrix.name.removeprefix(f"{place}.")
        return (f"{place} queries", Member(matrix, "columns")) if re.fullmatch(_OUTPUT, local) else None
    return (f"{parent} gates", Member(matrix, "rows")) if re.fullmatch(_READERS[1], name) else None


def _by_layer(matrix: Matrix) -> tuple[str, Member] | None:
    """A name without the number of the block, which is the first one."""
    place, numbers = re.subn(r"(?<=\.)\d+(?=\.)", "*", matrix.name, count=1)
    side = "rows" if matrix.shape[0] >= matrix.shape[1] else "columns"
    return (f"{place} {matrix.shape}", Member(matrix, side)) if numbers else None


def stacked(matrices: Sequence[Matrix], groups: Groups) -> list[Matrix]:
    """Every matrix that is in no group, and for each group, in the place of its owner, one that stands for all of it.

    Its rows are those of all members: a structure costs as much for it as for the group, shared factors counted once.
    """
    inside = {member.matrix.name for members in groups.values() for member in members}
    result: list[Matrix] = []
    for matrix in matrices:
        if matrix.name in groups:
            sides = [member.sides for member in groups[matrix.name]]
            result.append(dataclasses.replace(matrix, shape=(sum(long for long, _ in sides), sides[0][1])))
        elif matrix.name not in inside:
            result.append(matrix)
    return result


def expand(matrices: Sequence[Matrix], groups: Groups, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """An allocation of stacks as one of the matrices themselves, in their order."""
    whole = {entry.matrix.name: entry for entry in entries}
    places = {m.matrix.name: (owner, m.side) for owner, members in groups.items() for m in members}
    result: list[Entry] = []
    for matrix in matrices:
        owner, side = places.get(matrix.name, (matrix.name, None))
        entry = whole[owner]
        spec, shares = entry.spec, None
        if side is not None and spec is not None and spec.shareable:  # a dense matrix in int8 has nothing to share
            spec, shares = dataclasses.replace(spec, side=side), owner if owner != matrix.name else None
        result.append(Entry(matrix, spec, entry.reason, shares, entry.cause))
    return tuple(result)
