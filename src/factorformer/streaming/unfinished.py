"""An unfinished compression on disk, from which the next one of the same arguments goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from factorformer.errors import FactorformerError, OutputError
from factorformer.files import whole_file


class Run:
    """An unfinished run on disk: a file of tensors for each finished block, and the hidden states that the next reads.

    Args:
        output: the directory that is made in the end.
        arguments: by which a run is known to be the same.
        overwrite: whether a run with other arguments may be deleted.
    """

    def __init__(self, output: Path, arguments: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output, self.arguments, self.overwrite = output, arguments, overwrite
        self.folder = output.parent / f".{output.name}.streaming"
        self.assembled = self.folder / "assembled"

    @property
    def method(self) -> str | None:
        """Of what an interrupted run has left; None where nothing is."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return json.loads((self.folder / "arguments.json").read_text(encoding="utf-8"))["plan"]["method"]
        return None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, with what an interrupted run of the same arguments has left; gone after success."""
        file = self.folder / "arguments.json"
        if self.folder.exists() and not self._is_same(file):
            if not self.overwrite:
                raise OutputError(
                    f"an interrupted run for '{self.output}' had other arguments or another model: repeat it as it "
                    f"was, or start over with overwrite (which deletes '{self.folder}')"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and self.folder.stat().st_uid != os.getuid():
            raise OutputError(f"'{self.folder}' is somebody else's: give another output")
        with whole_file(file, "the arguments of the run") as partial:
            partial.write_text(json.dumps(self.arguments), encoding="utf-8")
        try:
            yield
        except BaseException as error:
            refused = isinstance(error, FactorformerError) and not isinstance(error, OutputError)
            if not self.tensors(0).exists() and (refused or not self.passed(0).exists()):  # nothing to go on from
                shutil.rmtree(self.folder, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("what is finished is kept: the same command goes on from there") from error
            raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_same(self, file: Path) -> bool:
        if not any(self.folder.iterdir()):
            return True
        try:
            return json.loads(file.read_text(encoding="utf-8")) == self.arguments
        except (OSError, ValueError):
            return False

    def tensors(self, place: int) -> Path:
        """The file of a finished block."""
        return self.folder / f"block-{place:05d}.safetensors"

    def said(self, place: int) -> Path:
        """What is known of a finished block beside its tensors."""
        return self.folder / f"block-{place:05d}.json"

    def hidden(self, place: int) -> Path:
        """The folder of what a block reads."""
        return self.folder / f"hidden-{place:05d}"

    def gradients(self, place: int) -> Path:
        """The folder of gradients at what a block reads."""
        return self.folder / f"gradients-{place:05d}"

    def keep(self, place: int, batch: int, hidden: Tensor) -> None:
        """What a block reads of a batch."""
        _save(self.hidden(place), batch, [hidden])

    def read(self, place: int, batch: int) -> Tensor:
        """The same again."""
        return _load(self.hidden(place), batch)[0]

    def keep_gradients(self, place: int, batch: int, gradients: Sequence[Tensor]) -> None:
        """Of each draw, at what a block reads of a batch, or at what the last one makes of it."""
        _save(self.gradients(place), batch, gradients)

    def read_gradients(self, place: int, batch: int) -> list[Tensor]:
        """The same again."""
        return _load(self.gradients(place), batch)

    def passed(self, place: int) -> Path:
        """What is known of a block that batches have passed."""
        return self.folder / f"passed-{place:05d}.pt"

    @property
    def goals(self) -> Path:
        """What is differentiated of each batch."""
        return self.folder / "goals.pt"

    def moments(self, place: int) -> Path:
        """Statistics of the matrices of a block."""
        return self.folder / f"moments-{place:05d}.pt"

    def prediction(self, place: int) -> Path:
        """What they add to the loss, by what they become."""
        return self.folder / f"prediction-{place:05d}.pt"


def keep_object(file: Path, found: object) -> None:
    """Write something down."""
    with whole_file(file, "what is known so far") as partial:
        torch.save(found, partial)


def read_object(file: Path) -> Any:
    """The same again; this package wrote it."""
    return torch.load(file, weights_only=False)


def _save(folder: Path, batch: int, tensors: Sequence[Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    with whole_file(folder / f"{batch:05d}.safetensors", "what passes between blocks") as partial:
        save_file({f"{place:05d}": tensor.contiguous() for place, tensor in enumerate(tensors)}, partial)


def _load(folder: Path, batch: int) -> list[Tensor]:
    return [tensor for _, tensor in sorted(load_file(folder / f"{batch:05d}.safetensors").items())]
