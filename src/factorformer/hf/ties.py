"""Tensors that are stored once and held by several layers: ties of the architecture, and factors that layers share.

transformers knows ties as `{target: source}`, names of tensors, of which only the source is stored. It keeps them
twice:

- what each `PreTrainedModel` *declares*, by its class: usually `lm_head.weight: embed_tokens.weight`. It is expanded to
  names only under `config.tie_word_embeddings`, and a name that does not end in `weight` or `bias` is taken for a
  regular expression;
- what *holds* in the outermost model (`all_tied_weights_keys`): what saving leaves out, loading fills in, and nothing
  initializes at random.

The invariant, for a model with factorized layers, from `rewrite` on:

    What holds has one entry `target: source` for every factor, parameter or buffer, that two layers hold: each factor
    of a layer that the architecture ties, and each factor that a plan lets layers share. What each model inside
    declares, as an attribute of the instance and in exact expressions, expands to the same.

Classes of transformers are never changed, and `forget` leaves an instance with what its class declares.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from factorformer.errors import CheckpointError, FactorformerWarning, ModelError
from factorformer.hf import compat
from factorformer.hf.config import FactorformerConfig
from factorformer.hf.description import factorized, named_module
from factorformer.layers.dense import dense_shape
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import factorized_like, replace_module
from factorformer.structures import integers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rewrite(model: PreTrainedModel) -> None:
    """Establish the invariant, whatever the layers were before."""
    for module in _models(model):
        _drop_scales(module)
        ties: compat.Ties = {}
        for target, source in compat.expanded_ties(module, whole=False).items():
            holder = _holder(module, source)
            if target.endswith(".weight") and holder is not None:
                stem, origin = target.removesuffix(".weight"), source.removesuffix(".weight")
                ties |= {f"{stem}.{factor}": f"{origin}.{factor}" for factor in holder.factors}
            else:
                ties[target] = source
        if any(_holder(module, source) is not None for source in ties.values()):
            compat.declare_ties(module, _exact(ties))
    holding = compat.expanded_ties(model, whole=True)
    sharing = _sharing(model, holding)
    if sharing:
        # Saving drops what these expressions match; transformers expands them only where word embeddings are tied.
        compat.declare_ties(model, {**compat.declared_ties(model), **_exact(sharing)})
    compat.set_all_ties(model, {**holding, **sharing})


def join(model: PreTrainedModel) -> None:
    """Let a head follow embeddings that were factorized by themselves, inside of a model that ties the two.

    Raises:
        ModelError: what is tied to a factorized matrix is not a layer that could hold the same factors.
    """
    for module in _models(model):
        _drop_scales(module)
    for target, source in compat.expanded_ties(model, whole=True).items():
        holder, held = _holder(model, source), _holder(model, target)
        if (holder is None) == (held is None) or not target.endswith(".weight"):
            continue
        name = target.removesuffix(".weight")
        module = model.get_submodule(name)
        if holder is None or dense_shape(module) != holder.shape:
            raise ModelError(
                f"'{name}' is tied to '{source.removesuffix('.weight')}', and only one of the two is factorized: "
                f"compress the whole {type(model).__name__}, not a part of it"
            )
        bits = holder.bits if holder.quantized else None
        new = factorized_like(module, holder.spec, holder.shape, holder.factors, bits=bits)
        if holder.fake_quantized:
            new.fake_quantize(holder.bits)
        replace_module(model, module, new)
        warnings.warn(
            f"'{name}' of {type(model).__name__} is tied to embeddings that were factorized by themselves: it holds "
            "their factors now",
            FactorformerWarning,
            stacklevel=4,
        )


def forget(model: PreTrainedModel) -> None:
    """The ties of the architecture again, in a model without factorized layers."""
    for module in _models(model):
        compat.undeclare_ties(module)
    compat.set_all_ties(model, compat.expanded_ties(model, whole=True))


def groups(model: PreTrainedModel) -> list[set[str]]:
    """Sets of names that hold one tensor: to find one of them in a file is enough."""
    found: dict[str, set[str]] = {}
    for target, source in compat.all_ties(model).items():
        found.setdefault(source, {source}).add(target)
    return list(found.values())


# While a model is loaded


def share(model: PreTrainedModel, config: FactorformerConfig) -> None:
    """Let layers hold the factors of others, as far as config.json says so and this model has the layers.

    Raises:
        CheckpointError: it has a layer without the one whose factors that shares.
    """
    declared = compat.expanded_ties(model, whole=True)
    for name, layer in config.layers.items():
        owner = named_module(model, name)
        for holder in layer.get("tied", ()):
            module = named_module(model, holder)
            if isinstance(module, FactorizedMatrix) and f"{holder}.weight" not in declared and module is not owner:
                assert isinstance(owner, FactorizedMatrix)
                for factor in owner.factors:
                    setattr(module, factor, getattr(owner, factor))
        for holder in (name, *layer.get("tied", ())) if "shares" in layer else ():
            module = named_module(model, holder)
            if not isinstance(module, FactorizedMatrix):
                continue
            owner = named_module(model, layer["shares"])
            if not isinstance(owner, FactorizedMatrix):
                raise CheckpointError(
                    f"{type(model).__name__} has the layer '{name}', but not '{layer['shares']}' whose "
                    f"{' and '.join(module.spec.shareable)} it shares: load the model with all layers of the checkpoint"
                )
            for factor in module.sharing:
                setattr(module, factor, getattr(owner, factor))


def follow(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Factorize a head that this class ties to factorized embeddings, where the saved class had no such head."""
    for target, source in ties.items():
        holder = _holder(model, source)
        if holder is None or not target.endswith(".weight"):
            continue
        module = model.get_submodule(target.removesuffix(".weight"))
        if dense_shape(module) == holder.shape:
            bits = holder.bits if holder.quantized else None
            new = factorized_like(module, holder.spec, holder.shape, bits=bits)
            if holder.fake_quantized:
                new.fake_quantize(holder.bits)
            replace_module(model, module, new)


def mark(model: PreTrainedModel, *arguments: Any) -> None:
    """Mark what is tied as initialized: transformers' own method knows parameters only, and supports are buffers."""
    ties = compat.all_ties(model)
    buffers = {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name in ties}
    compat.set_all_ties(model, {target: source for target, source in ties.items() if target not in buffers})
    try:
        compat.mark_parameters(model, *arguments)
    finally:
        compat.set_all_ties(model, ties)
    for tensor in buffers.values():
        compat.mark_initialized(tensor)


def _models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]


def _exact(ties: Mapping[str, str]) -> compat.Ties:
    return {f"{re.escape(target)}$": f"{re.escape(source)}$" for target, source in ties.items()}


def _sharing(model: nn.Module, declared: Mapping[str, str]) -> compat.Ties:
    """Names of factors that are stored under the name of another layer, and those names.

    These are factors that a plan lets layers share, and all those of layers that were tied but not by the architecture.
    """
    found: compat.Ties = {}
    for name, module, tied, owner in factorized(model):
        if owner is not None:
            found |= {f"{name}.{factor}": f"{owner}.{factor}" for factor in module.sharing}
        elif tied is not None and f"{name}.weight" not in declared:
            found |= {f"{name}.{factor}": f"{tied}.{factor}" for factor in module.factors}
    return found


def _drop_scales(model: PreTrainedModel) -> None:
    """Forget ties of scales and exponents that are gone, for the factors are floats again."""
    declared = compat.declared_ties(model)
    ends = tuple(f"{end}$" for end in (integers.SCALE, integers.EXPONENTS))
    scales = [target for target in declared if target.endswith(ends)]
    if scales:
        held = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        names = [name for named in held for name, _ in named]
        gone = {target for target in scales if not any(re.search(f"^{target}", name) for name in names)}
        compat.declare_ties(model, {target: source for target, source in declared.items() if target not in gone})


def _holder(model: nn.Module, tensor_name: str) -> FactorizedMatrix | None:
    try:
        module = model.get_submodule(tensor_name.rpartition(".")[0])
    except AttributeError:
        return None
    return module if isinstance(module, FactorizedMatrix) else None
