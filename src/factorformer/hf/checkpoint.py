"""Compressed model directories: checked before they are loaded, complete or absent after they are written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers

from factorformer.errors import CheckpointError, FactorformerError
from factorformer.hf.config import FactorformerConfig
from factorformer.layers.nn import TEMPORARY
from factorformer.structures import int8

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


def check_tensors(model: PreTrainedModel, config: FactorformerConfig, files: Sequence[str] | None) -> None:
    """Compare a checkpoint with the model that is about to take it, so that nothing loads as random numbers.

    The saved class has to fit in every tensor. Another class (a new task head on a compressed encoder, an encoder
    without its head) has to fit in everything inside the base model but a pooler; transformers itself reports what is
    new outside of it, and refuses or re-initializes heads of another size as it is told to.

    Args:
        model: the skeleton, with its factorized layers in place.
        config: what config.json says of them.
        files: the checkpoint's files; None if the caller passed a state dict.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor, of which the message names up to five of each, or
            integers that are stored as another type.
    """
    if files is None:
        return
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
    ties = _tie_groups(model)
    if type(model).__name__ not in (model.config.architectures or []):
        expected, stored = base, present
        ties = [set(_base_part(model, dict.fromkeys(group, ()))) for group in ties]
    loaded = stored.keys() | {name for group in ties if group & stored.keys() for name in group}
    may_miss = [*(model._keys_to_ignore_on_load_missing or []), *(model._keys_to_ignore_on_save or [])]
    may_extra = model._keys_to_ignore_on_load_unexpected or []
    missing = [n for n in expected.keys() - loaded if not _matches(n, may_miss)]
    extra = [n for n in stored.keys() - expected.keys() if not _matches(n, may_extra)]
    _report(missing, extra, wrong)


def _base_part(model: PreTrainedModel, sizes: Sizes) -> Sizes:
    """What of a model or checkpoint belongs to the base model, a pooler aside, under the names of the base model.

    Names saved with a head carry the prefix of the base model, and those outside of it do not belong to it.
    """
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in sizes):
        sizes = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    return {name: size for name, size in sizes.items() if not name.startswith("pooler.")}


def _tie_groups(model: PreTrainedModel) -> list[set[str]]:
    """Sets of tensor names that hold the same values: one stored name of each is enough."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return list(groups.values())


def _check_factors(config: FactorformerConfig, stored: Sizes) -> None:
    missing, extra, wrong = [], [], []
    for name, layer in config.layers.items():
        spec, _ = config.structure(name)
        holders = [name, *layer.get("tied", ())]
        # What a layer shares is stored under the name of another one, and nowhere else.
        elsewhere = {f + end for f in spec.shareable for end in ("", int8.SCALE)} if "shares" in layer else ()
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


def load(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a model directory as the class that it was saved from; nothing may be missing or misshapen.

    Nor may a compressed model have extra tensors; dense ones of other origin often carry heads for other tasks.

    Args:
        directory: what `save_pretrained` or `factorformer compress` wrote.
        kwargs: passed on to `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        CheckpointError: not a model directory, an unknown class, or tensors that do not fit; the message names them.
    """
    path = Path(directory)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a model directory: {error}") from error
    name = (config.get("architectures") or [None])[0] if isinstance(config, dict) else None
    architecture = getattr(transformers, name, None) if name else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise CheckpointError(f"'{path}/config.json' names the model class {name!r}, which transformers does not have")
    try:
        loaded: Any = architecture.from_pretrained(path, output_loading_info=True, **kwargs)
        model, info = loaded
    except FactorformerError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot load '{path}': {error}") from error
    kinds = {"missing_keys": "missing", "mismatched_keys": "misshapen"}
    if "quantization_config" in config:
        kinds["unexpected_keys"] = "unexpected"
    problems = [f"{kind}: {sorted(map(str, info[key]))[:5]}" for key, kind in kinds.items() if info[key]]
    if problems:
        raise CheckpointError(f"'{path}' does not fit {name}: {'; '.join(problems)}")
    return model
