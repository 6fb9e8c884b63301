"""Compressed models as ordinary Hugging Face model directories.

Importing this module registers the quantization method `factorformer` with transformers. From then on plain
`from_pretrained` builds the factorized layers that `config.json` describes, before it loads the weights into them.

transformers may be importing its own models at that moment (see `factorformer.registration`): neither this module nor
what it imports may need `transformers.PreTrainedModel` before a function is called. What it imports is what loading
needs, and no more.
"""

# transformers declares these hooks without types, as what their defaults happen to return.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from factorformer import registration
from factorformer.errors import CheckpointError, FactorformerWarning, ModelError
from factorformer.hf import compat, ties
from factorformer.hf.attachment import attach, attach_all, detach
from factorformer.hf.config import METHODS, FactorformerConfig
from factorformer.hf.dense import to_dense
from factorformer.hf.description import named_module, names_of
from factorformer.hf.tensors import check_tensors, drop_absent_pooler, holds_dense_weights
from factorformer.layers.bypass import CAST, bypassed
from factorformer.layers.dense import dense_shape
from factorformer.layers.nn import TEMPORARY, FactorizedMatrix
from factorformer.layers.surgery import factorized_like, replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FactorformerQuantizer(HfQuantizer):
    """The hooks through which transformers loads, saves and trains factorized models."""

    requires_calibration = True
    quantization_config: FactorformerConfig

    state_dict: dict[str, Tensor] | None = None
    """What is being saved in the place of the model's own tensors, gathered from several processes, say."""

    dense: bool = False
    """Whether the files of the load that is going on hold no factors at all."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config, files = self.quantization_config, compat.checkpoint_files(kwargs)
        self.dense = files is not None and holds_dense_weights(model, config, files)
        if self.dense:
            return
        inside = "|".join(re.escape(names_of(model, name)[-1]) for name in config.layers)
        compat.let_unexpected(model, rf"(^|\.)({inside})\.({'|'.join(TEMPORARY)})$")
        declared = compat.expanded_ties(model, whole=True)
        readers = _readers(model, config)
        found = sum(self._factorize(model, name) for name in config.layers)
        if config.layers and not found:
            raise CheckpointError(
                f"none of the {len(config.layers)} compressed layers exists in {type(model).__name__}: "
                f"the checkpoint is of {', '.join(model.config.architectures or ['another class'])}"
            )
        ties.share(model, config)
        ties.follow(model, declared)
        _check_readers(model, readers)
        ties.rewrite(model)
        if files is not None:
            drop_absent_pooler(model, files)
            check_tensors(model, config, files)
        compat.mark_ties_by(model, partial(ties.mark, model))

    def _factorize(self, model: PreTrainedModel, saved_name: str) -> int:
        """Put factorized layers in the place of one that config.json describes and of those tied to it; how many."""
        config, found = self.quantization_config, 0
        spec, shape = config.structure(saved_name)
        for name in (saved_name, *config.layers[saved_name].get("tied", ())):
            module = named_module(model, name)
            if module is None:
                continue
            if dense_shape(module) != shape:
                kind = f"{type(module).__name__} of shape {dense_shape(module)}"
                raise CheckpointError(f"config.json gives '{name}' the shape {shape}, but the model has a {kind}")
            shared, rounded = config.shared(saved_name), config.fake_quantized(saved_name)
            new = factorized_like(module, spec, shape, shared=shared, bits=config.quantized(saved_name))
            if rounded is not None:
                new.fake_quantize(rounded)
            replace_module(model, module, new)
            found += 1
        return found

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.dense:
            detach(model)
            return
        compat.mark_ties_by(model, None)
        for name, module in model.named_modules():
            if isinstance(module, FactorizedMatrix):
                _check_loaded(name, module)
        attach(model, self)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save: those that `save_pretrained` was given, or else the model's own."""
        return self.state_dict, {}

    def is_serializable(self) -> bool:
        """A compressed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters, but for those in integers, which stay as they are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`. A `Trainer` asks this when it is made, so here is said what will not train."""
        config = self.quantization_config
        codes = sum(config.quantized(name) is not None for name in config.layers)
        if codes:
            warnings.warn(
                f"the factors of {codes} layers are stored in integers and do not train, only adapters and what is not "
                "factorized: call factorformer.hold_floats(model) before the Trainer is made, and quantize(model) "
                "afterwards, to train them too",
                FactorformerWarning,
                stacklevel=2,
            )
        return True

    @property
    def is_compileable(self) -> bool:
        """Factorized layers are plain tensor operations."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # Where no type is asked for, transformers gives that of config.json, which the model need not have by now.
        dense = to_dense(model)
        return dense if dtype in (None, model.config.dtype) else dense.to(dtype)  # pyright: ignore[reportArgumentType]


def _check_loaded(name: str, module: FactorizedMatrix) -> None:
    """Raise `CheckpointError` if a tensor of a layer did not come from the files, or cannot be what it is to be."""
    for factor, tensor in module.factors.items():
        if tensor.device.type != "meta" and not compat.is_initialized(tensor):
            raise CheckpointError(f"tensor '{name}.{factor}' was not loaded from the checkpoint")
        wanted = module.tensors[factor].dtype
        if tensor.dtype != wanted and (wanted is not None or not tensor.is_floating_point()):
            right = "values" if wanted is None else str(wanted)
            raise CheckpointError(f"tensor '{name}.{factor}' is stored as {tensor.dtype}, not as {right}")
    module.fix_scales()  # transformers has created new ones
    if any(tensor.is_meta for tensor in module.factors.values()):
        return
    try:
        module.check_factors()
    except ModelError as error:
        raise CheckpointError(f"the checkpoint is damaged in layer '{name}': {error}") from error


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


# Called as functions, so that type checkers still see the classes.
for name in METHODS:
    register_quantization_config(name)(FactorformerConfig)
    register_quantizer(name)(FactorformerQuantizer)
registration.attach_with(attach_all)
