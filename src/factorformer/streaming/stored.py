"""The tensors of a checkpoint, each read from its file when it is needed, and a model that has none of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import safetensors
import torch
from torch import Tensor, nn

from factorformer.errors import CheckpointError, ModelError
from factorformer.hf import layout, ties
from factorformer.hf.attachment import described
from factorformer.hf.checkpoint import choose, some
from factorformer.hf.tensors import read_sizes
from factorformer.streaming import _compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stored:
    """The tensors of a model in the safetensors files of a folder.

    Args:
        model: without values.
        files: that hold them.

    Raises:
        CheckpointError: files that lack tensors of the model, or have other shapes for them.
    """

    def __init__(self, model: PreTrainedModel, files: Iterable[Path]) -> None:
        self.model = model
        self.sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        """Of the tensors of the model."""
        self.files: dict[str, Path] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for file in files:
            inside = read_sizes([file])
            self.files |= dict.fromkeys(inside, file)
            sizes |= inside
        self._sources: dict[str, list[str]] = {}
        self._whole: dict[str, str] = {}
        for name, (targets, whole) in _compat.targets(model, self.files).items():
            for target in targets:
                if whole:
                    self._whole[target] = name
                else:
                    self._sources.setdefault(target, []).append(name)
        self._check({target: sizes[name] for target, name in self._whole.items()})

    def _check(self, whole: dict[str, tuple[int, ...]]) -> None:
        kind, known = type(self.model).__name__, whole.keys() | self._sources.keys()
        held = {name for group in ties.groups(self.model) if group & known for name in group}
        missing = [name for name in self.sizes if name not in known | held]
        if missing:
            raise CheckpointError(
                f"the files lack {len(missing)} weights of {kind}: {some(missing)}; what they hold: {some(self.files)}"
            )
        wrong = [name for name, size in whole.items() if self.sizes.get(name, size) != size]
        if wrong:
            raise CheckpointError(f"the files have other shapes for {len(wrong)} weights of {kind}: {some(wrong)}")
        self.names = [name for name in self.sizes if name in known]
        """Of tensors of the model that are in files; others are tied to them."""

    def fill(self, names: Iterable[str]) -> None:
        """Give tensors of the model their values; memory that is that of a file is given back with them.

        Raises:
            CheckpointError: a file that cannot be read any more.
        """
        names = list(names)
        whole = [name for name in names if name in self._whole]
        others = dict.fromkeys(source for name in names for source in self._sources.get(name, ()))
        try:
            for file in dict.fromkeys(self.files[self._whole[name]] for name in whole):
                with safetensors.safe_open(file, framework="pt") as opened:
                    for name in whole:
                        if self.files[self._whole[name]] == file:
                            self._put(name, opened.get_tensor(self._whole[name]))
            for file in dict.fromkeys(self.files[name] for name in others):
                with safetensors.safe_open(file, framework="pt") as opened:
                    here = {name: opened.get_slice(name) for name in others if self.files[name] == file}
                    _compat.convert_into(self.model, here, None)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights: {error}") from error

    def _put(self, name: str, tensor: Tensor) -> None:
        place, _, last = name.rpartition(".")
        module = self.model.get_submodule(place)
        old: Any = getattr(module, last)
        tensor = tensor.to(old.dtype)
        setattr(module, last, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def skeleton(path: Path) -> tuple[PreTrainedModel, Stored]:
    """A model without weights, but for buffers that no file holds, and the tensors that belong into it.

    Raises:
        CheckpointError: no such model, one of code of its own, or files that do not fit.
        ModelError: it is compressed already.
    """
    choice, folder = choose(path), layout.place(path).folder
    if choice.config is None:
        raise CheckpointError(f"the model in '{path}' is made by Python code of its own: it is not read block by block")
    if described(choice.config) is not None:
        raise ModelError(f"'{path}' is compressed already: start from the dense model")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"'{folder}' holds no model*.safetensors, from which alone a model is read block by block: save it anew "
            "with save_pretrained"
        )
    dtype = getattr(choice.config, "dtype", None) or _type_in(files[0])
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
