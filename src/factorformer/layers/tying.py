"""Layers that share their matrices, as those of ALBERT do; biases and norms stay those of each layer."""

from __future__ import annotations

import torch
from torch import nn

from factorformer.errors import MethodError
from factorformer.layers.dense import dense_shape
from factorformer.layers.surgery import find_blocks, find_matrices


def tie_layers(model: nn.Module, unique: int) -> None:
    """Let consecutive blocks of a dense model hold the same matrices, each the mean of theirs, in place.

    So few are left of each stack of blocks, of groups as equal as there can be (all share in ALBERT, Lan et al., 2020).

    Args:
        model: dense.
        unique: blocks that keep matrices of their own, in each stack.

    Raises:
        MethodError: not fewer than there are, or none.
        ModelError: the model has no blocks, or is compressed already.
    """
    able = {matrix.name for matrix in find_matrices(model)[0] if matrix.dense is None}
    for blocks in stacks_of(model, unique).values():
        groups: list[list[str]] = [[] for _ in range(unique)]
        for place, block in enumerate(blocks):
            groups[place * unique // len(blocks)].append(block)
        for group in groups:
            _tie(model, group, able)


def stacks_of(model: nn.Module, unique: int) -> dict[str, list[str]]:
    """The blocks of each stack, of which so many are to be left.

    Raises:
        MethodError: not fewer than there are, or none.
        ModelError: the model has no blocks.
    """
    stacks: dict[str, list[str]] = {}
    for block in find_blocks(model):
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for stack, blocks in stacks.items():
        if not 1 <= unique < len(blocks):
            raise MethodError(
                f"unique layers have to be at least 1 and fewer than the {len(blocks)} of '{stack}'; got {unique}"
            )
    return stacks


def _tie(model: nn.Module, blocks: list[str], able: set[str]) -> None:
    owner = model.get_submodule(blocks[0])
    for name, module in owner.named_modules():
        layers = [model.get_submodule(f"{block}.{name}") for block in blocks] if dense_shape(module) else []
        same = {dense_shape(layer) for layer in layers} == {dense_shape(module)}
        if not layers or not same or not {f"{block}.{name}" for block in blocks} <= able:
            continue
        weights = [layer.get_parameter("weight") for layer in layers]
        with torch.no_grad():
            weights[0].copy_(torch.stack([weight.float() for weight in weights]).mean(0))
        for layer in layers[1:]:
            layer.register_parameter("weight", weights[0])
