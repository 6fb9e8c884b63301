"""What makes a model with factorized layers save, load and train as one, and how to take that away again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import transformers
from torch import nn

from factorformer.errors import ModelError
from factorformer.hf import card, compat, ties
from factorformer.hf.config import METHODS, FactorformerConfig, Quantizer
from factorformer.hf.description import describe, has_factors
from factorformer.layers.nn import FactorizedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, quantizer: Quantizer | None = None) -> None:
    """Make a model whose layers were just factorized save, load and train as a `factorformer` model.

    Its configuration becomes its own, for it describes this model alone.
    """
    # Importing it imports the plug-in, which needs this module.
    from transformers.quantizers.auto import AutoHfQuantizer

    ties.join(model)
    description = describe(model)
    held = _quantizer(model)
    if held is None or held.quantization_config is not described(model.config):
        compat.own_config(model)
    quantizer = quantizer or AutoHfQuantizer.from_config(description, pre_quantized=True)
    quantizer.quantization_config = description
    _undescribe(model)
    model.config.quantization_config = description
    compat.mark_quantized(model, quantizer, codes=any(map(description.quantized, description.layers)))
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            tables = compat.token_tables(module)
            refuse = any(isinstance(table, FactorizedMatrix) for table in tables)
            compat.resize_by(module, _refuse_to_resize if refuse else None)
    ties.rewrite(model)
    compat.around_saving(_saving)
    compat.before_uploading(_uploading)


def attach_all(module: nn.Module) -> None:
    """`attach` a model, or those inside of it: a `SentenceTransformer` wraps one."""
    if isinstance(module, transformers.PreTrainedModel):
        attach(module)
        return
    for child in module.children():
        attach_all(child)


def detach(model: PreTrainedModel) -> None:
    """Make a model without factorized layers a plain one, in its ties, its configuration and what is saved of it."""
    compat.own_config(model)
    _undescribe(model)
    compat.unmark_quantized(model)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            compat.resize_by(module, None)
    ties.forget(model)


def _undescribe(model: PreTrainedModel) -> None:
    """Drop descriptions of factorized layers from the configuration, and from those of the models inside."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and described(module.config) is not None:
            del vars(module.config)["quantization_config"]


def described(config: transformers.PreTrainedConfig) -> Any:
    """The description of factorized layers that a configuration holds: read from a file, a dictionary; or None."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, Mapping):
        return found if found.get("quant_method") in METHODS else None
    return found if isinstance(found, FactorformerConfig) else None


def _quantizer(model: PreTrainedModel) -> Quantizer | None:
    held: Any = getattr(model, "hf_quantizer", None)
    return held if isinstance(getattr(held, "quantization_config", None), FactorformerConfig) else None


@contextlib.contextmanager
def _saving(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Around `save_pretrained` of any model: config.json says what its layers are, whoever factorized them.

    A model may hold one that was compressed by itself, or have been built from the configuration of a compressed one.
    """
    if compat.has_adapters(model):
        yield
        return
    if has_factors(model):
        attach(model)
    elif described(model.config) is not None:
        detach(model)
    quantizer = _quantizer(model)
    if quantizer is None:
        yield
        return
    quantizer.state_dict = arguments.get("state_dict")
    try:
        yield
    finally:
        quantizer.state_dict = None
    if arguments.get("is_main_process", True):
        card.write(model, Path(arguments["save_directory"]))


def _uploading(model: PreTrainedModel, directory: Path) -> None:
    """Let the card of a compressed model go along."""
    if has_factors(model) and not compat.has_adapters(model):
        card.bring(model, directory)


def _refuse_to_resize(*_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        "the token embeddings or the head are factorized and cannot be resized: resize those of the dense model before "
        "it is compressed, or call model.dequantize() first"
    )
