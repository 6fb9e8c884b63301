"""The tensors of a checkpoint, each read from its file when it is needed, and a model that has none of them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import safetensors
import torch
from torch import Tensor, nn

from factorformer.errors import CheckpointError, FactorformerWarning, ModelError, one_line
from factorformer.hf import compat, layout, ties
from factorformer.hf.attachment import described
from factorformer.hf.checkpoint import choose, some
from factorformer.hf.tensors import read_sizes
from factorformer.layers.surgery import find_blocks
from factorformer.streaming import _compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = ("F64", "F32", "F16", "BF16")
"""How the headers of files call the types that weights can be read from."""

INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor that transformers would read from a folder.

    Raises:
        CheckpointError: there are no safetensors files, or the index names one that is missing.
    """
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return dict.fromkeys(read_sizes([whole]), whole)
    if not index.is_file():
        raise CheckpointError(
            f"'{folder}' holds neither model.safetensors nor {INDEX}, from which alone a model is read block by block: "
            "save it anew with save_pretrained"
        )
    named = {name: folder / str(file) for name, file in dict(layout.read_json(index)["weight_map"]).items()}
    missing = [file.name for file in dict.fromkeys(named.values()) if not file.is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names files that are not there: {some(missing)}")
    return named


class Stored:
    """The tensors of a model in safetensors files.

    Args:
        model: without values.
        files: of each tensor, by its name there.

    Raises:
        CheckpointError: files that lack tensors of the model, or have other shapes or types for them.
        ModelError: blocks that hold the very same tensor.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Path]) -> None:
        self.model, self.files = model, dict(files)
        self.sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        """Of the tensors of the model."""
        self._sources: dict[str, list[str]] = {}
        self._whole: dict[str, str] = {}
        for name, (targets, whole) in _compat.targets(model, self.files).items():
            for target in targets:
                if whole:
                    self._whole[target] = name
                else:
                    self._sources.setdefault(target, []).append(name)
        self._held = {name: group for group in ties.groups(model) for name in group}
        known = self._whole.keys() | self._sources.keys()
        self._check(known)
        self.names = [name for name in self.sizes if name in known]
        """Of tensors of the model that are in files; others are tied to them."""

    def _check(self, known: set[str]) -> None:
        kind, stored = type(self.model).__name__, read_sizes([*dict.fromkeys(self.files.values())])
        missing = [name for name in self.sizes if not {name, *self._held.get(name, ())} & known]
        if missing:
            raise CheckpointError(
                f"the files lack {len(missing)} weights of {kind}: {some(missing)}; what they hold: {some(self.files)}"
            )
        here = {target: name for target, name in self._whole.items() if target in self.sizes}
        wrong = [target for target, name in here.items() if self.sizes[target] != stored[name]]
        if wrong:
            raise CheckpointError(f"the files have other shapes for {len(wrong)} weights of {kind}: {some(wrong)}")
        self._check_types(here)
        unused = known - self.sizes.keys() - self._held.keys()
        ignored = compat.may_be_unexpected(self.model)
        unused = {name for name in unused if not any(re.search(pattern, name) for pattern in ignored)}
        if unused:
            warnings.warn(
                f"the files hold {len(unused)} tensors that {kind} does not use, and that are left out: {some(unused)}",
                FactorformerWarning,
                stacklevel=4,
            )
        blocks = tuple(f"{block}." for block in find_blocks(self.model))
        for group in ties.groups(self.model):
            places = {next((block for block in blocks if name.startswith(block)), "") for name in group}
            if len(places) > 1:
                raise ModelError(f"blocks of {kind} share {some(group)}: it cannot be compressed block by block")

    def _check_types(self, names: Mapping[str, str]) -> None:
        tensors = self.model.state_dict()
        for file in dict.fromkeys(self.files[name] for name in names.values()):
            with safetensors.safe_open(file, framework="pt") as opened:
                for target, name in names.items():
                    if self.files[name] == file and tensors[target].is_floating_point():
                        found = opened.get_slice(name).get_dtype()
                        if found not in FLOATS:
                            raise CheckpointError(
                                f"'{name}' is stored as {found}: start from the model in full precision"
                            )

    def inside(self, block: str) -> list[str]:
        """Names of the tensors of a block that are in files."""
        return [name for name in self.names if name.startswith(f"{block}.")]

    def fill(self, names: Iterable[str]) -> None:
        """Give tensors of the model their values; memory that is that of a file is given back with them.

        Raises:
            CheckpointError: a file that cannot be read any more, or tensors that do not fit together.
        """
        names = list(names)
        whole = [name for name in names if name in self._whole]
        others = dict.fromkeys(source for name in names for source in self._sources.get(name, ()))
        wrong: list[str] = []
        try:
            for file in dict.fromkeys(self.files[self._whole[name]] for name in whole):
                with safetensors.safe_open(file, framework="pt") as opened:
                    for name in whole:
                        if self.files[self._whole[name]] == file:
                            self._put(name, opened.get_tensor(self._whole[name]))
            with contextlib.ExitStack() as stack:
                opened = {
                    file: stack.enter_context(safetensors.safe_open(file, framework="pt"))
                    for file in dict.fromkeys(self.files[name] for name in others)
                }
                if others:
                    slices = {name: opened[self.files[name]].get_slice(name) for name in others}
                    wrong = _compat.convert_into(self.model, slices)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights: {one_line(error)}") from error
        tensors = self.model.state_dict()
        wrong += [f"{name} has no values" for name in names if tensors[name].is_meta]
        if wrong:
            raise CheckpointError(f"the weights of {type(self.model).__name__} do not fit together: {some(wrong)}")

    def empty(self, names: Iterable[str]) -> None:
        """Take the values of tensors of the model away again."""
        tensors = self.model.state_dict()
        for name in names:
            self._put(name, torch.empty_like(tensors[name], device="meta"))

    def _put(self, name: str, tensor: Tensor) -> None:
        new: Any = None
        for holder in (name, *(other for other in self._held.get(name, ()) if other != name)):
            place, _, last = holder.rpartition(".")
            module = self.model.get_submodule(place)
            old: Any = getattr(module, last)
            if new is None:
                new = tensor.to(old.dtype)
                new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            setattr(module, last, new)


def skeleton(path: Path) -> tuple[PreTrainedModel, Stored]:
    """A model without weights, but for buffers that no file holds, and the tensors that belong into it.

    Raises:
        CheckpointError: no such model, one of code of its own, one whose weights are quantized, or files that do not
            fit.
        ModelError: it is compressed already, or its blocks hold the very same tensor.
    """
    choice, folder = choose(path), layout.place(path).folder
    if choice.config is None:
        raise CheckpointError(f"the model in '{path}' is made by Python code of its own: it is not read block by block")
    if described(choice.config) is not None:
        raise ModelError(f"'{path}' is compressed already: start from the dense model")
    if getattr(choice.config, "quantization_config", None) is not None:
        raise CheckpointError(f"the weights in '{path}' are quantized: start from the model in full precision")
    files = files_of(folder)
    dtype = getattr(choice.config, "dtype", None) or _type_in(next(iter(files.values())))
    with accelerate.init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        model = _compat.built(choice.loader, choice.config, dtype)
    model.tie_weights()
    return model.eval(), Stored(model, files)


def _type_in(file: Path) -> torch.dtype:
    """Of the first floats in a file."""
    with safetensors.safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # it is no dictionary
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point():
                return tensor.dtype
    raise CheckpointError(f"'{file}' holds no floats")
