"""What is left of a model's time on a CPU when its matrices are small: attention and activations, by compiled kernels.

`fuse` gives a model for inference our attention, through the attention interface of transformers, and computes GELUs
inside of the product before them where that is all that a block does with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from factorformer.errors import ModelError
from factorformer.kernels import cpu, gelu
from factorformer.kernels.dense import served
from factorformer.layers.nn import FactorizedLinear

ATTENTION = "factorformer"
"""Name of the attention implementation."""

OTHER_ARGUMENTS = ("position_bias", "softcap", "s_aux", "cache")
"""What an architecture may ask of its attention that the kernel does not do."""


class FusedGELU(nn.Module):
    """The exact GELU, by the compiled kernel where it serves; nothing where the product before has done it already.

    Args:
        product: what may have.
    """

    def __init__(self, product: FactorizedLinear | None = None) -> None:
        super().__init__()
        self._product = [product]  # in a list, so that it does not become a part of this module

    def forward(self, x: Tensor) -> Tensor:
        """`(...)` to `(...)`."""
        product = self._product[0]
        return x if product is not None and product.gelu else gelu(x)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: by the compiled kernel where it serves, by torch otherwise.

    Args:
        module: the attention layer.
        query, key, value: `(batch, heads, tokens, width)`.
        attention_mask: booleans, or None for all tokens.
        dropout, scaling, is_causal, others: as for transformers' own implementations.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and not (causal and query.shape[2] > 1)
    masked = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
    lies_well = all(t.stride(-1) == 1 and t.shape[-1] == query.shape[-1] for t in (query, key, value))
    fits = key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[1] % key.shape[1] == 0
    plain = fits and not dropout and all(others.get(name) is None for name in OTHER_ARGUMENTS)
    ready = served(query) and not torch.compiler.is_compiling() and cpu.serves(key) and cpu.serves(value)
    differentiated = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if ready and plain and lies_well and (whole or masked) and not differentiated:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cpu.attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model what makes inference on a CPU fast, in place; results change within rounding, files do not.

    Training goes on to work, but gains nothing. Without compiled kernels, and for other devices and types, torch does
    the same as before.

    Args:
        model: compressed or dense.

    Raises:
        ModelError: not a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"fuse takes a model of transformers, not a {type(model).__name__}: of a SentenceTransformer `st`, fuse "
            "st[0].model"
        )
    if model._can_set_attn_implementation() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is GELUActivation or (type(child) is nn.GELU and child.approximate == "none"):
                setattr(module, name, FusedGELU())
        _fuse_pair(module)
    return model


def _fuse_pair(module: nn.Module) -> None:
    """Let a block that is nothing but a product and its GELU compute both at once; a trial tells whether it is."""
    children = dict(module.named_children())
    linear = next((child for child in children.values() if isinstance(child, FactorizedLinear)), None)
    name = next((name for name, child in children.items() if isinstance(child, FusedGELU)), None)
    if len(children) != 2 or linear is None or name is None or linear.gelu:
        return
    x = torch.linspace(-3, 3, 6 * linear.in_features).sin().mul(2).view(2, 3, -1).to(linear.values)
    with torch.no_grad():
        try:
            before = module(x)
            setattr(module, name, FusedGELU(linear))
            linear.gelu = True
            same = torch.allclose(module(x), before, rtol=1e-3, atol=1e-4)
        except Exception:  # it takes something else
            same = False
    if not same:
        linear.gelu = False
        setattr(module, name, children[name])


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
