"""An unfinished compression on disk, from which the next one of the same arguments goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from factorformer.errors import OutputError
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
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file, "the arguments of the run") as partial:
            partial.write_text(json.dumps(self.arguments), encoding="utf-8")
        try:
            yield
        except BaseException as error:
            if not self.tensors(0).exists():  # nothing to go on from
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

    def keep(self, place: int, batch: int, hidden: Tensor) -> None:
        """What a block reads of a batch."""
        self.hidden(place).mkdir(exist_ok=True)
        with whole_file(self.hidden(place) / f"{batch:05d}.safetensors", "what a block reads") as partial:
            save_file({"hidden": hidden.contiguous()}, partial)

    def read(self, place: int, batch: int) -> Tensor:
        """The same again."""
        return load_file(self.hidden(place) / f"{batch:05d}.safetensors")["hidden"]
