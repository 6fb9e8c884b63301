"""Load a model directory as its users have it: what is there decides which class is loaded, and nothing is made up."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from factorformer.errors import CheckpointError, FactorformerError, FactorformerWarning, one_line
from factorformer.hf import compat, layout
from factorformer.hf.config import METHODS
from factorformer.hf.tensors import drop_pooler, takes_no_pooler
from factorformer.hf.trust import trusted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPLIED_OUT = ("fp8", "mxfp4")
"""Methods of quantization that transformers undoes while it loads, where the hardware has no products for them."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The class that a directory is loaded as.

    Args:
        loader: that class, or an `AutoModel...` that finds it in the directory's own code.
        config: of the model; None where the directory's own code is to read it.
        base: the class of the same model without a head; None where there is none, or this is it.
        note: why it is not the class that config.json names, if it is not.
    """

    loader: Any
    config: transformers.PreTrainedConfig | None
    base: type[PreTrainedModel] | None = None
    note: str | None = None


def load(
    directory: str | os.PathLike[str], *, trust_remote_code: bool | None = None, whole: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model directory, dense or compressed; no weight is left at random.

    The class is that of the Transformer in a directory of sentence-transformers (`modules.json`), otherwise the one
    that config.json names. Where the files hold the body of that class without its head, or transformers has no such
    class, it is the model without a head. A `FactorformerWarning` says so, and names tensors that are left out.

    Args:
        directory: what `save_pretrained`, sentence-transformers or `factorformer compress` wrote.
        trust_remote_code: execute Python code that the directory brings; by default, as the command line was told.
        whole: take a missing head for an error.
        kwargs: passed on to `from_pretrained` (`dtype`, `device_map`, ...); a `subfolder` is one of the directory.

    Raises:
        CheckpointError: not a model directory, an unknown class, or tensors that do not fit; the message names them.
    """
    path = Path(directory) / kwargs.pop("subfolder", "")
    place = layout.place(path)
    trust = trusted() if trust_remote_code is None else trust_remote_code
    choice = choose(path, trust=trust)
    # What is missing is drawn at random before it is refused or thrown away: not from the caller's numbers.
    with torch.random.fork_rng(devices=[]):
        found, headless = _read(path, place.folder, choice, whole, trust_remote_code=trust, **kwargs)
        if headless:
            assert choice.base is not None
            note = f"'{path}' lacks the head of {type(found).__name__}: loaded as {choice.base.__name__}, without one"
            choice = Choice(choice.base, choice.config, note=note)
            found, _ = _read(path, place.folder, choice, True, trust_remote_code=trust, **kwargs)
    if choice.note is not None:
        _warn(choice.note)
    if place.task == layout.ENCODES:
        _describe_encoder(found.config, type(found))
    return found


def choose(path: Path, *, trust: bool | None = None) -> Choice:
    """Which class a directory is to be loaded as, by its descriptions alone.

    Raises:
        CheckpointError: descriptions that cannot be read, a class or type of model that transformers does not have,
            code in the directory that is not trusted, or weights that another method has quantized.
    """
    trust = trusted() if trust is None else trust
    place = layout.place(path)
    described = layout.read_config(place.folder)
    method = _quantized_by(described)
    if method not in (None, *METHODS, *MULTIPLIED_OUT):
        raise CheckpointError(
            f"the weights in '{path}' are quantized by {method}: start from the model in full precision"
        )
    named, brought = _named(described), described.get("auto_map") or {}
    encodes = place.task == layout.ENCODES
    native = getattr(transformers, named, None) if named else None
    if not (isinstance(native, type) and issubclass(native, transformers.PreTrainedModel)):
        native = None
    own = {key: str(ref).rpartition(".")[2] for key, ref in brought.items() if key.startswith("AutoModel")}
    if own and trust:
        key = next((key for key, name in own.items() if name == named and not encodes), "AutoModel")
        return Choice(getattr(transformers, key if key in own else next(iter(own))), None)
    if own and (native is None or not compat.knows_type(described.get("model_type"))):
        raise CheckpointError(
            f"the model in '{path}' is made by Python code of its own ({', '.join(sorted(set(own.values())))}): read "
            "that code, and allow it by --trust-remote-code, or load(..., trust_remote_code=True)"
        )
    config = read_config(place.folder, trust=trust)
    base = compat.base_class(config)
    if encodes and base is not None:
        # Of an encoder-decoder, sentence-transformers takes the encoder, where that is a class of its own.
        base = getattr(transformers, base.__name__.removesuffix("Model") + "EncoderModel", base)
        note = f"'{path}' is a sentence encoder: loaded as {base.__name__}, and not as {named}, which config.json names"
        _describe_encoder(config, base)
        return Choice(base, config, note=None if named in (base.__name__, None) else note)
    if native is not None:
        return Choice(native, config, None if base is native else base)
    if base is None:
        raise CheckpointError(f"'{path}/config.json' names the model class {named!r}, which transformers does not have")
    names = f"the class {named!r}, which transformers does not have" if named else "no class"
    note = f"'{path}/config.json' names {names}: loaded as {base.__name__}, the model without a head"
    return Choice(base, config, note=note)


def _describe_encoder(config: transformers.PreTrainedConfig, kind: type) -> None:
    """Let a configuration say what a sentence encoder is loaded as, whatever model it was taken from."""
    config.architectures = [kind.__name__]
    if kind.__name__.endswith("EncoderModel"):
        config.is_encoder_decoder = False


def read_config(folder: Path, *, trust: bool | None = None) -> transformers.PreTrainedConfig:
    """The configuration of a model.

    Args:
        folder: that holds its config.json.
        trust: whether code may be executed that the directory brings; by default, as the command line was told.

    Raises:
        CheckpointError: it is missing, malformed, or of a model that transformers does not know.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted() if trust is None else trust)
    except FactorformerError:
        raise
    except Exception as error:  # malformed content surfaces as many types
        raise CheckpointError(f"cannot read '{folder}/config.json': {one_line(error)}") from error


def read_model(loader: Any, path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and what transformers says of its tensors; any failure is a `CheckpointError`."""
    try:
        return loader.from_pretrained(path, output_loading_info=True, **options)
    except FactorformerError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many types for files that do not fit
        raise CheckpointError(f"cannot load '{path}': {one_line(error)}") from error


def some(names: Iterable[object], most: int = 5) -> str:
    """Up to five names, and whether there are more."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "")


def _read(path: Path, folder: Path, choice: Choice, whole: bool, **options: Any) -> tuple[PreTrainedModel, bool]:
    """A model of the class that was chosen, and whether its head is missing."""
    compressed = _quantized_by(layout.read_config(folder)) in METHODS
    if not compressed:
        options.setdefault("ignore_mismatched_sizes", True)  # they are refused below, by name
    model, info = read_model(choice.loader, folder, **options)
    missing, kind = set(info["missing_keys"]), type(model).__name__
    if missing and all(name.startswith("pooler.") for name in missing) and takes_no_pooler(model):
        drop_pooler(model)
        missing = set()
    misshapen = _misshapen(info["mismatched_keys"])
    inside = f"{model.base_model_prefix}."
    body = {name for name in missing if name.startswith(inside) and not name.startswith(f"{inside}pooler.")}
    if missing and not body and not misshapen and choice.base is not None and not compressed and not whole:
        return model, True
    wrong = {"lacks": body or missing, "has other shapes for": misshapen}
    if compressed and choice.note is None:
        wrong["has too many tensors for"] = set(info["unexpected_keys"])
    for what, names in wrong.items():
        if names:
            raise CheckpointError(f"'{path}' {what} {len(names)} weights of {kind}: {some(names)}")
    unused = info["unexpected_keys"]
    if unused:
        _warn(f"'{path}' holds {len(unused)} tensors that {kind} does not use, and that are left out: {some(unused)}")
    return model, False


def _misshapen(keys: Iterable[Any]) -> set[str]:
    """Names of tensors, where transformers gives their sizes too."""
    return {str(key) if isinstance(key, str) else f"{key[0]} {list(key[1])}" for key in keys}


def _quantized_by(described: dict[str, Any]) -> str | None:
    """The method that quantized the weights of a model, as config.json tells; None if none did."""
    found = described.get("quantization_config")
    if not isinstance(found, dict):
        return None
    old = any(str(key).startswith("load_in_") for key in found)  # of the time when there was but one method
    return str(found.get("quant_method") or ("bitsandbytes" if old else "an unnamed method"))


def _named(described: dict[str, Any]) -> str | None:
    names = described.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _warn(text: str) -> None:
    warnings.warn(text, FactorformerWarning, stacklevel=4)
