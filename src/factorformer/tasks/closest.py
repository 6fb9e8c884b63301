"""The point of a training at which a model was closest to its original, in memory and beside checkpoints."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from factorformer.files import whole_file
from factorformer.tasks.checkpoints import CLOSEST

WORTH = 1.01
"""How many times as far from the original as at its closest point a model has to be for that point to be brought back:
less is noise."""


class Closest:
    """The values of a model where it was closest to the original.

    Args:
        model: in training.
        folder: of checkpoints, where it is kept too; None for a training that cannot go on later.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None) -> None:
        self.model, self.path = model, None if folder is None else folder / CLOSEST
        self.start = self.distance = math.inf  # before training, and at the closest point
        self.point: dict[str, float] = {}  # step and metrics of that
        self._values: dict[str, Tensor] = {}

    def load(self) -> bool:
        """Go on with what an interrupted training knew; False where nothing was kept."""
        if self.path is None or not self.path.exists():
            return False
        with safe_open(self.path, "pt", device=str(self.model.device)) as file:
            known = json.loads(file.metadata()["closest"])
            self._values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.start, self.distance, self.point = known["start"], known["distance"], known["point"]
        return True

    @torch.no_grad()
    def see(self, step: int, metrics: Mapping[str, float], distance: float) -> None:
        """The model after so many steps."""
        if not self._values:
            self.start = distance
        elif not distance < self.distance:
            return
        self.distance, self.point = distance, {"step": step, **metrics}
        for name, value in self._tensors():
            if name in self._values:
                self._values[name].copy_(value)
            else:
                self._values[name] = value.detach().clone(memory_format=torch.contiguous_format)
        if self.path is not None:
            known = {"start": self.start, "distance": self.distance, "point": self.point}
            with whole_file(self.path, "the closest point of training") as partial:
                save_file(self._values, partial, {"closest": json.dumps(known)})

    def is_worth(self, distance: float) -> bool:
        """Whether a model that ended so far from the original should be brought back to this point."""
        return not distance <= WORTH * self.distance

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the model back to it."""
        for name, tensor in self._tensors():
            tensor.copy_(self._values[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of the model, for one that goes on may have nothing of it yet."""
        return itertools.chain(self.model.named_parameters(), self.model.named_buffers())
