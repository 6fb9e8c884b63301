"""What the factorized layers of a model are now, as `config.json` says it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from factorformer.hf.config import FAKE, FactorformerConfig
from factorformer.layers.nn import FactorizedMatrix


def describe(model: nn.Module) -> FactorformerConfig:
    """The `quantization_config` of the factorized layers that a model has now."""
    layers: dict[str, dict[str, Any]] = {}
    for name, module, tied, shares in factorized(model):
        if tied is not None:
            layers[tied].setdefault("tied", []).append(name)
            continue
        layers[name] = {"shape": list(module.shape), **module.spec.to_dict()}
        if module.quantized or module.fake_quantized:
            layers[name]["values"] = f"{'' if module.quantized else FAKE}int{module.bits}"
        if shares is not None:
            layers[name]["shares"] = shares
    return FactorformerConfig(layers)


def factorized(model: nn.Module) -> Iterator[tuple[str, FactorizedMatrix, str | None, str | None]]:
    """Each factorized layer: its name, itself, the layer it is tied to, and the one whose factors it shares."""
    whole: dict[int, str] = {}
    parts: dict[tuple[int, ...], str] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix):
            tied = whole.setdefault(id(module.weight), name)
            shares = name
            if tied == name and module.spec.shareable:
                shares = parts.setdefault(tuple(id(getattr(module, f)) for f in module.spec.shareable), name)
            yield name, module, tied if tied != name else None, shares if shares != name else None


def has_factors(model: nn.Module) -> bool:
    """Whether any layer is factorized."""
    return any(isinstance(module, FactorizedMatrix) for module in model.modules())


def named_module(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its saved name, in a model with or without the head that it was saved with."""
    for candidate in names_of(model, name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def names_of(model: nn.Module, name: str) -> tuple[str, str, str]:
    """A saved name as it is, below the base model, and inside of it."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)
