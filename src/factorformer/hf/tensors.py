"""The tensors of a checkpoint against the model that is about to take them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from inspect import signature
from typing import TYPE_CHECKING

import safetensors
import torch
from torch import nn

from factorformer.errors import CheckpointError
from factorformer.hf import compat, ties
from factorformer.hf.config import FactorformerConfig
from factorformer.hf.description import names_of
from factorformer.layers.nn import TEMPORARY
from factorformer.structures import integers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = dict[str, tuple[int, ...]]

SAFETENSORS_TYPES = {
    **{torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.uint16: "U16"},
    **{torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64"},
}
"""The names that the headers of files give to the types of integers."""


def read_sizes(files: Sequence[str | os.PathLike[str]]) -> Sizes:
    """Name and size of every tensor in safetensors files, from their headers alone.

    Raises:
        CheckpointError: a file that is not safetensors, or truncated.
    """
    sizes: Sizes = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"'{file}' is not a safetensors file: compressed models are never read from pickles")
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                names = tensors.keys()  # not a dict: it cannot be iterated itself
                sizes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot read '{file}': {error}") from error
    return sizes


def check_tensors(model: PreTrainedModel, config: FactorformerConfig, files: Sequence[str]) -> None:
    """Compare a checkpoint with the model that is about to take it, so that no weight is left randomly initialized.

    The saved class has to fit in every tensor. Another class (a new task head on a compressed encoder, an encoder
    without its head) has to fit in everything inside the base model but a pooler; transformers itself reports what is
    new outside of it, and refuses or re-initializes heads of another size if it is told to.

    Args:
        model: the skeleton, with its factorized layers in place.
        config: what config.json says of them.
        files: the checkpoint's files.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor, of which the message names up to five of each, or
            integers that are stored as another type.
    """
    stored = read_sizes(files)
    _check_factors(config, stored)
    _check_types(config, files)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base, present = _base_part(model, expected), _base_part(model, stored)
    wrong = [
        f"{name}: {list(present[name])} in the file, {list(size)} in the model"
        for name, size in base.items()
        if name in present and present[name] != size
    ]
    held = ties.groups(model)
    if type(model).__name__ not in (model.config.architectures or []):
        expected, stored = base, present
        held = [set(_base_part(model, dict.fromkeys(group, ()))) for group in held]
    loaded = stored.keys() | {name for group in held if group & stored.keys() for name in group}
    missing = [n for n in expected.keys() - loaded if not _matches(n, compat.may_be_missing(model))]
    unplaced = compat.may_be_unexpected(model)
    if _may_lack_pooler(model) and getattr(model, "pooler", None) is None:  # the caller wants none
        unplaced = [*unplaced, r"^pooler\."]
    extra = [n for n in stored.keys() - expected.keys() if not _matches(n, unplaced)]
    _report(missing, extra, wrong)


def holds_dense_weights(model: PreTrainedModel, config: FactorformerConfig, files: Sequence[str]) -> bool:
    """Whether files hold the weights of all layers as they are without factors.

    So they do where a dense model was built from the configuration of a compressed one, and saved with it.
    """
    if not config.layers or not all(str(file).endswith(".safetensors") for file in files):
        return False
    stored = read_sizes(files)
    for name in config.layers:
        spec, shape = config.structure(name)
        names = [found for found in names_of(model, name) if f"{found}.weight" in stored]
        others = {f"{found}.{factor}" for found in names for factor in config.tensors(name) if factor != "weight"}
        if not names or others & stored.keys():
            return False
        size = stored[f"{names[0]}.weight"]
        if sorted(size) != sorted(shape) or size == spec.tensors(shape)["weight"].size:
            return False
    return True


def drop_absent_pooler(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Leave the pooler out of an encoder that was saved without one."""
    if type(model).__name__ in (model.config.architectures or []) and takes_no_pooler(model):
        stored = _base_part(model, read_sizes(files), pooler=True)
        if not any(name.startswith("pooler.") for name in stored):
            drop_pooler(model)


def takes_no_pooler(model: PreTrainedModel) -> bool:
    """Whether a model has a pooler with weights that its architecture can do without; Swin's has none."""
    pooler = getattr(model, "pooler", None)
    return isinstance(pooler, nn.Module) and bool(pooler.state_dict()) and _may_lack_pooler(model)


def _may_lack_pooler(model: PreTrainedModel) -> bool:
    return "add_pooling_layer" in signature(type(model)).parameters


def drop_pooler(model: PreTrainedModel) -> None:
    """Leave the pooler out, as `add_pooling_layer=False` does."""
    setattr(model, "pooler", None)  # noqa: B010  # pyright knows modules as attributes only


def _base_part(model: PreTrainedModel, sizes: Sizes, *, pooler: bool = False) -> Sizes:
    """What of a model or checkpoint belongs to the base model, a pooler aside, under the names of the base model.

    Names saved with a head carry the prefix of the base model, and those outside of it do not belong to it.
    """
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in sizes):
        sizes = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    return sizes if pooler else {name: size for name, size in sizes.items() if not name.startswith("pooler.")}


def _check_factors(config: FactorformerConfig, stored: Sizes) -> None:
    missing, extra, wrong = [], [], []
    for name, layer in config.layers.items():
        spec, _ = config.structure(name)
        holders = [name, *layer.get("tied", ())]
        # What a layer shares is stored under the name of another one, and nowhere else.
        shared = spec.shareable if "shares" in layer else ()
        elsewhere = {factor + end for factor in shared for end in integers.ENDS[config.quantized(name) or 8]}
        sizes = {factor: tensor.size for factor, tensor in config.tensors(name).items() if factor not in elsewhere}
        for factor, size in sizes.items():
            found = [f"{holder}.{factor}" for holder in holders if f"{holder}.{factor}" in stored]
            if not found:
                missing.append(f"{name}.{factor}")
            wrong += [
                f"{n}: {list(stored[n])} in the file, {list(size)} by config.json" for n in found if stored[n] != size
            ]
        # Checkpoints of a training that goes on hold what it needs to be resumed, beside the factors of the moment.
        allowed = {f"{holder}.{factor}" for holder in holders for factor in [*sizes, "bias", *TEMPORARY]}
        extra += [n for n in stored if n.startswith(tuple(f"{holder}." for holder in holders)) and n not in allowed]
    _report(missing, extra, wrong)


def _check_types(config: FactorformerConfig, files: Sequence[str]) -> None:
    """Integers have to be stored as such: values in their place would be cut off to integers on the way in."""
    expected = {
        f"{holder}.{factor}": tensor.dtype
        for name, layer in config.layers.items()
        for factor, tensor in config.tensors(name).items()
        for holder in (name, *layer.get("tied", ()))
        if tensor.dtype is not None
    }
    for file in files:
        with safetensors.safe_open(file, framework="pt") as tensors:
            for name in expected.keys() & set(tensors.keys()):
                found, wanted = tensors.get_slice(name).get_dtype(), expected[name]
                if found != SAFETENSORS_TYPES[wanted]:
                    raise CheckpointError(
                        f"tensor '{name}' is stored as {found}, not as {SAFETENSORS_TYPES[wanted]} ({wanted})"
                    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _report(missing: list[str], extra: list[str], wrong: list[str]) -> None:
    parts = [
        f"{len(names)} {what}: {'; '.join(sorted(names)[:5])}{'; ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
        if names
    ]
    if parts:
        raise CheckpointError(f"the checkpoint does not fit the model: {'. '.join(parts)}. Nothing was loaded")
