"""Compressed models as ordinary Hugging Face model directories.

Importing this module registers the quantization method `factorformer` with transformers. From then on plain
`from_pretrained` builds the factorized layers that `config.json` describes, before it loads the weights into them.

transformers may be importing its own models at that moment (see `factorformer.registration`): neither this module nor
what it imports may need `transformers.PreTrainedModel` before a function is called.
"""

# transformers declares these hooks without types, as what their defaults happen to return.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from factorformer import registration
from factorformer.errors import CheckpointError, ModelError
from factorformer.hf.checkpoint import check_tensors
from factorformer.hf.config import METHOD, FactorformerConfig
from factorformer.layers.bypass import CAST, bypassed, embeddings_of
from factorformer.layers.nn import TEMPORARY, FactorizedLinear, FactorizedMatrix
from factorformer.layers.surgery import dense_shape, factorized_like, replace_module
from factorformer.structures import int8

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FactorformerQuantizer(HfQuantizer):
    """The hooks through which transformers loads, saves and trains factorized models."""

    requires_calibration = True
    quantization_config: FactorformerConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        layers = "|".join(map(re.escape, config.layers))
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"({layers})\.({'|'.join(TEMPORARY)})$"}
        model._keys_to_ignore_on_load_unexpected = ignored
        ties = model.get_expanded_tied_weights_keys(all_submodels=True)
        readers = _readers(model, config)
        found = 0
        for saved_name in config.layers:
            spec, shape = config.structure(saved_name)
            for name in (saved_name, *config.layers[saved_name].get("tied", ())):
                module = _resolve(model, name)
                if module is None:
                    continue
                if dense_shape(module) != shape:
                    kind = f"{type(module).__name__} of shape {dense_shape(module)}"
                    raise CheckpointError(f"config.json gives '{name}' the shape {shape}, but the model has a {kind}")
                shared, quantized = config.shared(saved_name), config.quantized(saved_name)
                replace_module(model, module, factorized_like(module, spec, shape, shared=shared, quantized=quantized))
                found += 1
        if config.layers and not found:
            raise CheckpointError(
                f"none of the {len(config.layers)} compressed layers exists in {type(model).__name__}: "
                f"the checkpoint is of {', '.join(model.config.architectures or ['another class'])}"
            )
        _share(model, config)
        _follow_ties(model, ties)
        _check_readers(model, readers)
        rewrite_ties(model)
        check_tensors(model, config, kwargs.get("checkpoint_files"))
        vars(model)["mark_tied_weights_as_initialized"] = partial(_mark_tied, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        model.__dict__.pop("mark_tied_weights_as_initialized", None)
        for name, module in model.named_modules():
            if isinstance(module, FactorizedMatrix):
                for factor, tensor in module.factors.items():
                    if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                        raise CheckpointError(f"tensor '{name}.{factor}' was not loaded from the checkpoint")
                    wanted = module.tensors[factor].dtype
                    if tensor.dtype != wanted and (wanted is not None or not tensor.is_floating_point()):
                        right = "values" if wanted is None else str(wanted)
                        raise CheckpointError(f"tensor '{name}.{factor}' is stored as {tensor.dtype}, not as {right}")
                module.fix_scales()  # transformers has made them anew
                if any(tensor.is_meta for tensor in module.factors.values()):
                    continue
                try:
                    module.check_factors()
                except ModelError as error:
                    raise CheckpointError(f"the checkpoint is damaged in layer '{name}': {error}") from error
        attach(model, self)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before config.json is written: describe the layers as they are now."""
        model.config.quantization_config = describe(model)
        return None, {}

    def is_serializable(self) -> bool:
        """A compressed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters, but for those in int8, which stay as they are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`; `hold_floats` makes factors in int8 trainable."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Factorized layers are plain tensor operations."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # Where no type is asked for, transformers gives that of config.json, which the model need not have by now.
        dense = to_dense(model)
        return dense if dtype in (None, model.config.dtype) else dense.to(dtype)  # pyright: ignore[reportArgumentType]


def describe(model: nn.Module) -> FactorformerConfig:
    """The `quantization_config` of the factorized layers that a model has now."""
    layers: dict[str, dict[str, Any]] = {}
    for name, module, tied, shares in _layers(model):
        if tied is not None:
            layers[tied].setdefault("tied", []).append(name)
            continue
        layers[name] = {"shape": list(module.shape), **module.spec.to_dict()}
        if module.quantized:
            layers[name]["values"] = "int8"
        if shares is not None:
            layers[name]["shares"] = shares
    return FactorformerConfig(layers)


def _layers(model: nn.Module) -> Iterator[tuple[str, FactorizedMatrix, str | None, str | None]]:
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


def _sharing(model: nn.Module) -> dict[str, str]:
    """Names of factors that are stored under the name of another layer, and those names."""
    return {
        f"{name}.{factor}": f"{owner}.{factor}"
        for name, module, _, owner in _layers(model)
        if owner is not None
        for factor in module.sharing
    }


def attach(model: PreTrainedModel, quantizer: FactorformerQuantizer | None = None) -> None:
    """Make a model whose layers were just factorized save, load and train as a `factorformer` model."""
    config = describe(model)
    model.config.quantization_config = config
    quantizer = quantizer or FactorformerQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    state = {
        "hf_quantizer": quantizer,
        "quantization_method": METHOD,
        "is_quantized": True,
        # Converters that fuse or split dense tensors on save know nothing of factors.
        "_weight_conversions": [],
    }
    if isinstance(embeddings_of(model, "input_embeddings"), FactorizedMatrix):
        state["resize_token_embeddings"] = _refuse_to_resize
    for name, value in state.items():
        setattr(model, name, value)
    rewrite_ties(model)


def attach_all(module: nn.Module) -> None:
    """`attach` a model, or those inside of it: a `SentenceTransformer` wraps one."""
    if isinstance(module, transformers.PreTrainedModel):
        attach(module)
        return
    for child in module.children():
        attach_all(child)


def _share(model: PreTrainedModel, config: FactorformerConfig) -> None:
    """Let layers hold the factors of others, as far as config.json says so and this model has the layers."""
    for name, layer in config.layers.items():
        for holder in (name, *layer.get("tied", ())) if "shares" in layer else ():
            module = _resolve(model, holder)
            if not isinstance(module, FactorizedMatrix):
                continue
            owner = _resolve(model, layer["shares"])
            if not isinstance(owner, FactorizedMatrix):
                raise CheckpointError(
                    f"{type(model).__name__} has the layer '{name}', but not '{layer['shares']}' whose "
                    f"{' and '.join(module.spec.shareable)} it shares: load the model with all layers of the checkpoint"
                )
            for factor in module.sharing:
                setattr(module, factor, getattr(owner, factor))


def _follow_ties(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Factorize a head that this class ties to factorized embeddings, where the saved class had no such head."""
    for target, source in ties.items():
        holder = _holder(model, source)
        if holder is None or not target.endswith(".weight"):
            continue
        module = model.get_submodule(target.removesuffix(".weight"))
        if dense_shape(module) == holder.shape:
            replace_module(
                model, module, factorized_like(module, holder.spec, holder.shape, quantized=holder.quantized)
            )


def _readers(model: PreTrainedModel, config: FactorformerConfig) -> dict[str, str]:
    """Layers that have to stay dense in a class other than the one that was compressed, and why."""
    if type(model).__name__ in (model.config.architectures or []):
        return {}
    layers = {name: module for name, module in model.named_modules() if dense_shape(module) is not None}
    return bypassed(model, layers, int8=any(config.quantized(name) for name in config.layers))


def _check_readers(model: PreTrainedModel, reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        module = model.get_submodule(name)
        if isinstance(module, FactorizedMatrix) and (module.quantized or reason != CAST):
            raise CheckpointError(
                f"{type(model).__name__} cannot have factors in '{name}': {reason.removesuffix(', left dense')}. "
                f"Load it as {', '.join(model.config.architectures or ['what it was saved from'])}, or compress the "
                "dense model of this class"
            )


def _refuse_to_resize(*_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        "the token embeddings are factorized and cannot be resized: resize those of the dense model before it is "
        "compressed, or call model.dequantize() first"
    )


def rewrite_ties(model: nn.Module) -> None:
    """Tie all factors of tied layers, where transformers knows only of one weight each, and factors that layers share.

    transformers keeps ties as `{target: source}` names of tensors, and reads a name that does not end in `weight` as a
    regular expression; so all names are written as exact expressions.
    """
    for module in model.modules():
        if not isinstance(module, transformers.PreTrainedModel):
            continue
        _drop_scales(module)
        ties = {}
        for target, source in module.get_expanded_tied_weights_keys(all_submodels=False).items():
            holder = _holder(module, source)
            if target.endswith(".weight") and holder is not None:
                stem, origin = target.removesuffix(".weight"), source.removesuffix(".weight")
                ties |= {f"{stem}.{factor}": f"{origin}.{factor}" for factor in holder.factors}
            else:
                ties[target] = source
        if any(_holder(module, source) is not None for source in ties.values()):
            module._tied_weights_keys = {f"{re.escape(t)}$": f"{re.escape(s)}$" for t, s in ties.items()}
            module._adjust_bias = _leave_bias
    if isinstance(model, transformers.PreTrainedModel):
        expanded, sharing = model.get_expanded_tied_weights_keys(all_submodels=True), _sharing(model)
        if sharing:
            # Saving drops what these expressions match; transformers expands them only where word embeddings are tied.
            exact = {f"{re.escape(target)}$": f"{re.escape(source)}$" for target, source in sharing.items()}
            model._tied_weights_keys = {**(model._tied_weights_keys or {}), **exact}
            model._adjust_bias = _leave_bias
        model.all_tied_weights_keys = {**expanded, **sharing}


def _drop_scales(model: PreTrainedModel) -> None:
    """Forget ties of scales that are gone, for the factors are floats again."""
    keys = model._tied_weights_keys
    scales = [target for target in keys or () if target.endswith(f"{int8.SCALE}$")]
    if scales:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        gone = {target for target in scales if not any(re.search(f"^{target}", name) for name in names)}
        model._tied_weights_keys = {target: source for target, source in dict(keys).items() if target not in gone}


def _mark_tied(model: PreTrainedModel, *arguments: Any) -> None:
    """As transformers' own method, which knows of tied parameters only: supports are tied too, and are buffers."""
    ties = model.all_tied_weights_keys
    buffers = {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name in ties}
    model.all_tied_weights_keys = {target: source for target, source in ties.items() if target not in buffers}
    try:
        type(model).mark_tied_weights_as_initialized(model, *arguments)
    finally:
        model.all_tied_weights_keys = ties
    for tensor in buffers.values():
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]  # as transformers marks tensors


def _leave_bias(output_embeddings: Any, input_embeddings: Any) -> None:
    """In the place of what cuts the bias of a tied head to the rows of its weight, which a factor need not have."""


def _holder(model: nn.Module, tensor_name: str) -> FactorizedMatrix | None:
    try:
        module = model.get_submodule(tensor_name.rpartition(".")[0])
    except AttributeError:
        return None
    return module if isinstance(module, FactorizedMatrix) else None


def _resolve(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The module of a saved name in a model with or without the head that it was saved with."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply all factors out, in place, into the layer types that the architecture has by itself."""
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
    model.__dict__.pop("resize_token_embeddings", None)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)
            module.__dict__.pop("_adjust_bias", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


# Called as functions, so that type checkers still see the classes.
register_quantization_config(METHOD)(FactorformerConfig)
register_quantizer(METHOD)(FactorformerQuantizer)
registration.attach_with(attach_all)
