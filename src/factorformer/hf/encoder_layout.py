"""Which encoders the compiled kernels know, and where the parts of their layers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.activations import GELUActivation

from factorformer.layers.nn import FactorizedLinear

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

MODELS: Mapping[str, tuple[str, bool]] = {
    "models.bert.modeling_bert.BertModel": ("encoder", True),
    "models.roberta.modeling_roberta.RobertaModel": ("encoder", True),
    "models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": ("encoder", True),
    "models.camembert.modeling_camembert.CamembertModel": ("encoder", True),
    "models.electra.modeling_electra.ElectraModel": ("encoder", True),
    "models.mpnet.modeling_mpnet.MPNetModel": ("encoder", False),
    "models.distilbert.modeling_distilbert.DistilBertModel": ("transformer", False),
}
"""Models that are embeddings, a stack of layers and perhaps a pooler, by their classes: where the stack is, and whether
tokens have types."""


def stacks_of(model: nn.Module) -> list[nn.Module]:
    """Modules whose layers, one after the other, are all of a kind that the kernels know."""
    return [module for module in model.modules() if layers_of(module)]


def layers_of(stack: nn.Module) -> list[dict[str, Any]]:
    """The parts of each layer, by name; none where one is not known, or they do not fit together."""
    layers = getattr(stack, "layer", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    found = [_parts(layer) for layer in layers]
    same = {(parts.get("heads"), parts["query"].in_features if parts else 0) for parts in found}
    return found if all(found) and len(same) == 1 else []


def _parts(layer: nn.Module) -> dict[str, Any]:
    """The parts of a layer, by name, and the number of its heads; none unless all of it is as in transformers."""
    layout, inside = LAYOUTS.get(kind_of(layer)), list(layer.modules())
    if layout is None or not all(_is_known(module) for module in inside):
        return {}
    parts: dict[str, Any] = {name: _part(layer, path) for name, path in layout.items()}
    for name, part in parts.items():
        if type(part) not in ((nn.LayerNorm,) if name.startswith("after") else (nn.Linear, FactorizedLinear)):
            return {}
        if name.startswith("after") and (part.weight is None or part.bias is None):
            return {}
    activations = [m for m in inside if type(m) in (GELUActivation, nn.GELU)]
    exact = len(activations) == 1 and getattr(activations[0], "approximate", "none") == "none"
    counts = (getattr(m, "num_attention_heads", getattr(m, "n_heads", None)) for m in inside)
    heads = {count for count in counts if isinstance(count, int)}
    decodes = any(getattr(m, "is_decoder", False) or getattr(m, "is_causal", False) for m in inside)
    if not exact or decodes or len(heads) != 1 or not _fit(parts, *heads):
        return {}
    return {**parts, "heads": heads.pop()}


def kind_of(module: nn.Module) -> str:
    """The class of a module, by its place in transformers."""
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("transformers.")


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:  # something stands in its place
        return None


def _is_known(module: nn.Module) -> bool:
    """Whether a module does what its class in torch, in transformers or here says."""
    known = ("torch.nn.", "transformers.models.", "transformers.activations", "factorformer.layers.")
    return type(module).__module__.startswith(known) and "forward" not in vars(module)


def _fit(parts: Mapping[str, Any], heads: int) -> bool:
    width, inner = parts["query"].in_features, parts["up"].out_features
    sizes = {name: (part.out_features, part.in_features) for name, part in parts.items() if "after" not in name}
    wanted = {**dict.fromkeys(sizes, (width, width)), "up": (inner, width), "down": (width, inner)}
    return sizes == wanted and width % heads == 0
