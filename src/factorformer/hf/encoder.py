"""Encoders whose layers the compiled kernels know: all of them in one call, for inference on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from factorformer.hf import compat
from factorformer.kernels import Dense, served
from factorformer.kernels.encoder import Encoder, EncoderLayer, Linear, Norm, Products
from factorformer.layers._compat import Snapshot
from factorformer.layers.nn import FactorizedLinear
from factorformer.structures import Dense as DenseStructure
from factorformer.structures import LowRank
from factorformer.structures.integers import SCALE, dense

_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "after_attention": "attention.output.LayerNorm",
    "after_products": "output.LayerNorm",
}
_MPNET = _BERT | {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "output": "attention.attn.o",
    "after_attention": "attention.LayerNorm",
}
_DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "after_attention": "sa_layer_norm",
    "after_products": "output_layer_norm",
}
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "models.bert.modeling_bert.BertLayer": _BERT,
    "models.roberta.modeling_roberta.RobertaLayer": _BERT,
    "models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "models.camembert.modeling_camembert.CamembertLayer": _BERT,
    "models.electra.modeling_electra.ElectraLayer": _BERT,
    "models.mpnet.modeling_mpnet.MPNetLayer": _MPNET,
    "models.distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
}
"""Where the parts of a layer are, by its class in transformers."""

INDIFFERENT = ("position_ids", "use_cache", "return_dict")
"""Arguments of a stack that change nothing of what its layers make."""

CAPTURING = "output_capturing_hook"
"""The hook that transformers leaves behind where it once collected what layers make, and that does nothing else."""

DISTANCES = 512
"""Tokens up to which relative positions are laid out at first."""


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose layers, one after the other, are all of a kind that the kernels know, by name."""
    config = getattr(model, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return {}
    return {name: module for name, module in model.named_modules() if _layers(module)}


def _layers(stack: nn.Module) -> list[dict[str, Any]]:
    """The parts of each layer, by name; none where one is not known."""
    layers = getattr(stack, "layer", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    found = [_parts(layer) for layer in layers]
    return [parts for parts in found if parts] if all(found) else []


def _parts(layer: nn.Module) -> dict[str, Any]:
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix("transformers.")
    layout = LAYOUTS.get(kind)
    if layout is None:
        return {}
    parts = {name: layer.get_submodule(path) for name, path in layout.items()}
    for name, part in parts.items():
        if type(part) not in ((nn.LayerNorm,) if name.startswith("after") else (nn.Linear, FactorizedLinear)):
            return {}
    activations = [m for m in layer.modules() if type(m) in (GELUActivation, nn.GELU)]
    exact = len(activations) == 1 and getattr(activations[0], "approximate", "none") == "none"
    return parts if exact else {}


def _linear(layer: nn.Linear | FactorizedLinear) -> Linear:
    if isinstance(layer, nn.Linear):
        return Linear([Dense(layer.weight)], layer.bias)
    if isinstance(layer.spec, LowRank):
        factors = layer.multiplied
        return Linear([dense(factors, "right"), dense(factors, "weight")], layer.bias)
    if isinstance(layer.spec, DenseStructure):
        factors = layer.multiplied
        return Linear([Dense(factors["weight"].squeeze(1), factors.get("weight" + SCALE))], layer.bias)
    return Linear([Dense(layer.to_dense())], layer.bias)


class FusedForward:
    """The forward pass of a stack of layers: in one call where the kernels serve, and its own otherwise.

    Its own it is in training, for other types and devices, where attention is to be anything but to all real tokens,
    and where somebody asks for what single layers make.

    Args:
        stack: the module, one of `stacks_of`.
        config: of the model.
        products: in which type they are made; None for each as its matrix is stored.
    """

    def __init__(self, stack: nn.Module, config: Any, products: Products | None) -> None:
        self.stack: Any = stack
        self.config = config
        self.products: Products | None = products
        self._forget()

    def _forget(self) -> None:
        self._encoder: Encoder | None = None
        self._made_of: Snapshot | None = None
        self._factorized: list[FactorizedLinear] = []
        self._all_rows: tuple[int, int, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"stack": self.stack, "config": self.config, "products": self.products}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **others: Any) -> Any:
        """As the forward pass of the module."""
        found = None if rest else self._encoded(hidden_states, attention_mask, others)
        if found is None:
            return type(self.stack).forward(self.stack, hidden_states, attention_mask, *rest, **others)
        if others.get("return_dict") is False:
            return (found,)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=found)

    def _encoded(self, x: Tensor, mask: Tensor | None, others: Mapping[str, Any]) -> Tensor | None:
        """What the layers make of hidden states `(batch, tokens, width)`; None where they have to do it themselves."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.stack.training or not served(x):
            return None
        if any(value is not None and value is not False for name, value in others.items() if name not in INDIFFERENT):
            return None
        if x.dim() != 3 or not x.numel() or compat.capturing() or not self._ready(x.shape[1]):
            return None
        encoder = self._encoder
        assert encoder is not None
        batch, length, width = x.shape
        if mask is None:
            rows, starts = self._rows_of_all(batch, length)
        else:
            allowed = _allowed(mask, batch, length)
            if allowed is None or (encoder.reach and not _in_one_piece(allowed)):
                return None
            rows = allowed.flatten().nonzero().flatten()
            starts = F.pad(allowed.sum(1).cumsum(0), (1, 0))
        return encoder(x.reshape(-1, width).contiguous(), rows, starts).view(batch, length, width)

    @property
    def encoder(self) -> Encoder | None:
        """What the kernels read; None before the first pass, and where they do not serve."""
        return self._encoder

    def _rows_of_all(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        known = self._all_rows
        if known is None or known[:2] != (batch, length):
            rows, starts = torch.arange(batch * length), torch.arange(batch + 1) * length
            self._all_rows = known = batch, length, rows, starts
        return known[2:]

    def _ready(self, length: int) -> bool:
        """Whether the encoder is there, made of the weights as they are, and nobody watches single layers."""
        encoder, made_of = self._encoder, self._made_of
        if any(layer.form is not None for layer in self._factorized):
            return False
        if encoder is None or made_of is None or not made_of.holds() or (encoder.reach and encoder.reach < length):
            self._forget()
            if not self._make(length):
                return False
        assert self._made_of is not None
        return not self._made_of.hooked(CAPTURING)

    def _make(self, length: int) -> bool:
        layers, made_of = _layers(self.stack), Snapshot(self.stack)
        self._factorized = [m for m in self.stack.modules() if isinstance(m, FactorizedLinear)]
        known = all(t.is_cpu and t.dtype in (torch.float32, torch.int8, torch.uint8) for t in made_of.tensors)
        if not layers or not known or any(layer.form is not None for layer in self._factorized):
            return False
        self._made_of = made_of
        bias = None
        if hasattr(self.stack, "relative_attention_bias"):  # MPNet's
            reach = max(length, DISTANCES)
            ahead = -torch.arange(-reach, reach + 1)
            bias = self.stack.relative_attention_bias(self.stack.relative_position_bucket(ahead)).T
        heads = getattr(self.config, "num_attention_heads", None) or self.config.n_heads
        self._encoder = Encoder([_layer(parts) for parts in layers], heads, self.products, bias)
        return True


def _layer(parts: Mapping[str, Any]) -> EncoderLayer:
    made: dict[str, Any] = {name: _linear(part) for name, part in parts.items() if not name.startswith("after")}
    made |= {name: Norm(p.weight, p.bias, p.eps) for name, p in parts.items() if name.startswith("after")}
    return EncoderLayer(**made)


def _in_one_piece(allowed: Tensor) -> bool:
    """Whether the real tokens of each sequence follow on each other."""
    begins = allowed[:, 1:] & ~allowed[:, :-1]
    return bool((begins.sum(1) + allowed[:, 0] <= 1).all())


def _allowed(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """Which tokens are real, `(batch, length)`; None where queries see different ones, or some more than others."""
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    first = mask[:, 0, 0]
    if mask.shape[2] > 1 and mask.stride(2) and not torch.equal(mask[:, 0], first[:, None].expand_as(mask[:, 0])):
        return None
    if mask.dtype != torch.bool:
        allowed = first == 0
        if not bool((allowed | (first <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
        first = allowed
    return first.expand(batch, length)
