"""Materialization of factorized layers: an ordinary model again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from factorformer.hf.attachment import detach
from factorformer.layers.nn import FactorizedLinear, FactorizedMatrix
from factorformer.layers.surgery import replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply all factors out, in place, into the layer types that the architecture has by itself.

    Whatever is saved of the model afterwards has the tensor names of its architecture.
    """
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, FactorizedMatrix):
            continue
        new = skeleton.get_submodule(name)
        key = id(module.weight)
        if key not in weights:
            dense = module.to_dense().detach()
            weights[key] = nn.Parameter((dense.T if isinstance(new, Conv1D) else dense).contiguous())
        new.weight = weights[key]
        if isinstance(module, FactorizedLinear):
            module.gelu = False  # what comes after computes it again
            new.register_parameter("bias", module.bias)
        replace_module(model, module, new.train(module.training))
    detach(model)
    return model
