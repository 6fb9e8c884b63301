"""Inventory of a model, dense or compressed: every weight matrix with its structure and its cost."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from factorformer.layers.matrix import Matrix, Scope
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import find_blocks, find_matrices
from factorformer.planning import Entry, Plan
from factorformer.structures import Dense


def inventory(model: PreTrainedModel, scope: Scope | None = None) -> Plan:
    """The plan that a model is the result of, read off the model itself; tied matrices are counted once.

    `original` is the cost of the same architecture with dense weights of the same type.

    Args:
        model: dense or compressed.
        scope: what to count; by default the Transformer blocks, or the whole model if it has none.

    Raises:
        ModelError: "blocks" of a model that has none.

    >>> from transformers import BertConfig, BertModel
    >>> dense = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=50))
    >>> inventory(dense).ratio
    1.0
    """
    compressed = any(isinstance(module, FactorizedMatrix) for module in model.modules())
    dense = _dense_skeleton(model) if compressed else model
    scope = scope or ("blocks" if find_blocks(dense) else "all")
    matrices, rest = find_matrices(dense, scope)
    owners: dict[int, str] = {}
    entries = tuple(_entry(model, matrix, owners) for matrix in _once(model, matrices))
    found = Plan(None, scope, 1.0, entries, rest)
    return dataclasses.replace(found, target=found.ratio)


def _once(model: nn.Module, matrices: Iterable[Matrix]) -> list[Matrix]:
    """Each matrix once, where layers hold the factors of another although the architecture does not tie them."""
    first: dict[int, int] = {}
    found: list[Matrix] = []
    for matrix in matrices:
        module = None
        with contextlib.suppress(AttributeError):  # a bare parameter, such as fused experts
            module = model.get_submodule(matrix.name)
        place = first.setdefault(id(module.weight), len(found)) if isinstance(module, FactorizedMatrix) else len(found)
        if place == len(found):
            found.append(matrix)
            continue
        owner = found[place]
        aliases = (*owner.aliases, matrix.name, *matrix.aliases)
        found[place] = dataclasses.replace(owner, aliases=aliases, products=owner.products + matrix.products)
    return found


def _dense_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without factors and without memory: it knows blocks, ties, and calls of shared layers."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    skeleton.tie_weights()
    return skeleton.to(model.dtype)  # pyright: ignore[reportArgumentType]


def _entry(model: PreTrainedModel, matrix: Matrix, owners: dict[int, str]) -> Entry:
    """What a matrix is; `owners` are the matrices found so far, by the first factor that others may share with them."""
    try:
        module = model.get_submodule(matrix.name)
    except AttributeError:  # a bare parameter, such as fused experts
        return Entry(matrix, None, matrix.dense or "")
    if not isinstance(module, FactorizedMatrix):
        return Entry(matrix, None, matrix.dense or "")
    dtype = str(module.values.dtype).removeprefix("torch.")
    found = dataclasses.replace(matrix, dtype=dtype, bits=module.bits if module.quantized else None)
    if found.whole is None and isinstance(module.spec, Dense):  # it trains for integers, and is as large until then
        return Entry(found, None, matrix.dense or "")
    owner = matrix.name
    for factor in module.spec.shareable if module.shared else ():
        owner = owners.setdefault(id(getattr(module, factor)), matrix.name)
    return Entry(found, module.spec, "", None if owner == matrix.name else owner)
