"""Layers whose weight an architecture uses without calling them: factors under the same name would mislead it.

Mamba multiplies by `dt_proj.weight` itself; Mamba 2 casts what goes into the head to `lm_head.weight.dtype`, which is
int8 once the head is stored so. Three rules find such layers, whatever their names:

- *A trial*: one forward pass of a copy whose weights take no memory and whose layers multiply nothing. A weight that
  any operation sees has been used from outside, for its own layer did not.
- *The source*: `self.<layer>.weight` in the methods of the modules above a layer, for what the trial does not reach,
  such as a branch for another device. What is done in training alone does not count: Mamba's kernels for training on
  a GPU read `out_proj.weight`, and refuse factors by their shape.
- *Initialization*, through which every model goes that is loaded: Whisper asks its table of positions for its shape,
  to make sinusoids of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from factorformer.layers.bypass_source import read_in_source
from factorformer.layers.bypass_trial import found_in_initialization, found_in_trials

USED = "the architecture reads its weight itself, left dense"
CAST = "the architecture casts activations to the type of its weight, which must not be int8, left dense"


def bypassed(
    model: nn.Module, layers: Mapping[str, nn.Module], *, int8: bool = False, batch: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Which of these layers have to stay dense for what the architecture does with their weights, and why.

    Args:
        model: any module; it is neither run nor changed, and random numbers are left alone.
        layers: linear layers and embeddings of it, by name.
        int8: whether factors are to be stored in int8, so that the type of a weight matters.
        batch: keyword arguments of the model; by default random ones, made from its configuration.
    """
    places = {id(module): name for name, module in layers.items()}
    used, cast = read_in_source(model, places)
    found = found_in_trials(model, layers, int8=False, batch=batch)
    used |= found | found_in_initialization(model, layers)
    if int8:
        cast = found_in_trials(model, layers, int8=True, batch=batch, known=used, unreached=cast)
    used, cast = _alike(model, layers, used), _alike(model, layers, cast if int8 else set())
    return dict.fromkeys(cast, CAST) | dict.fromkeys(used, USED)


def _alike(model: nn.Module, layers: Mapping[str, nn.Module], names: set[str]) -> set[str]:
    """Names, and those of layers that modules of the same class hold in the same place."""

    def place(name: str) -> tuple[type, str]:
        parent, _, child = name.rpartition(".")
        return type(model.get_submodule(parent)), child

    kinds = {place(name) for name in names}
    kinds = {kind for kind in kinds if kind[0] not in (nn.ModuleList, nn.Sequential, nn.ModuleDict)}
    return names | {name for name in layers if place(name) in kinds}
