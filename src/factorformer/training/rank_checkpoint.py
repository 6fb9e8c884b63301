"""What a checkpoint holds of a training with dynamic ranks, beside what model and optimizer save of themselves."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from factorformer.errors import CheckpointError, ModelError
from factorformer.files import whole_file
from factorformer.layers.dense import dense_weight
from factorformer.layers.nn import new_factors
from factorformer.layers.surgery import factorize
from factorformer.planning import Entry, Plan
from factorformer.structures import Structure, from_dict
from factorformer.training.rank_history import RankHistory
from factorformer.training.units import DenseUnits, FactorUnits, Importance, Units

STATE = "dynamic_rank.safetensors"
"""The file in a checkpoint that holds importance, groups and history."""


@dataclasses.dataclass
class RankCheckpoint:
    """The state of dynamic ranks after some step.

    Args:
        settings: of the training, JSON-ready.
        budget: bytes that all matrices together take in the end.
        done: optimizer steps so far.
        finished: whether the budget is met.
        history: of the ranks.
        units: of every matrix.
    """

    settings: Mapping[str, Any]
    budget: int
    done: int
    finished: bool
    history: RankHistory
    units: list[Units]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it into a checkpoint, and the history of ranks beside it.

        Raises:
            OutputError: it cannot be written there.
        """
        tensors: dict[str, Tensor] = {}
        for units in self.units:
            name = units.matrix.name
            if units.importance.average is not None:
                tensors[f"{name}:importance"] = units.importance.average
            if isinstance(units, DenseUnits):
                tensors |= {f"{name}:basis": units.basis, f"{name}:dual": units.dual}
        description = {
            "settings": dict(self.settings),
            "budget": self.budget,
            "done": self.done,
            "finished": self.finished,
            "history": self.history.to_dict(),
            "full": [units.full.to_dict() for units in self.units],
            "count": [units.count for units in self.units],
            "reached": [units.importance.reached for units in self.units],
            "steps": [units.importance.steps for units in self.units],
        }
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(Path(directory) / STATE, "the state of dynamic ranks") as partial:
            save_file(content, partial, {"ranks": json.dumps(description)})
        self.history.save(directory)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        plan: Plan,
        settings: Mapping[str, Any],
        budget: int,
    ) -> RankCheckpoint:
        """Read it back, and give the matrices of a dense model the shapes of then.

        Raises:
            CheckpointError: there is none, or one of another model, plan or settings; the model is as it was.
        """
        path = Path(directory) / STATE
        try:
            with safetensors.safe_open(path, "pt") as file:
                description = json.loads((file.metadata() or {})["ranks"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            history = RankHistory.from_dict(description["history"], f"'{path}'")
            finished, done = bool(description["finished"]), int(description["done"])
            full = [from_dict(spec) for spec in description["full"]]
            smaller = [spec.with_units(count) for spec, count in zip(full, description["count"], strict=True)]
            seen = [(int(r), int(s)) for r, s in zip(description["reached"], description["steps"], strict=True)]
            saved_settings, saved_budget = description["settings"], description["budget"]
        except (OSError, ValueError, KeyError, TypeError, ModelError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot resume dynamic ranks from '{directory}': {error}") from error
        names = [entry.matrix.name for entry in plan.factorized]
        if history.layers != names or not len(full) == len(seen) == len(names):
            raise CheckpointError(f"'{path}' is of a training of other matrices than those of the plan")
        if saved_settings != settings or saved_budget != budget:
            raise CheckpointError(
                f"'{path}' is of a training with {saved_settings} and {saved_budget:,} bytes for all matrices, not "
                f"with {settings} and {budget:,}: give the same plan and settings"
            )
        result: list[Units] = []
        for entry, spec, cut, (reached, steps) in zip(plan.factorized, full, smaller, seen, strict=True):
            prefix = f"{entry.matrix.name}:"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            importance = Importance(settings["ema_decay"], own.get("importance"), reached, steps)
            result.append(_units(model, entry, spec, cut, own, importance, path))
        for units, cut in zip(result, smaller, strict=True):  # only when all are right
            if isinstance(units, FactorUnits):
                weight = dense_weight(model.get_submodule(units.matrix.name))
                factors = new_factors(cut, units.matrix.shape, weight.device, weight.dtype)
                with torch.no_grad():
                    cut.initialize(factors, 1.0)
                factorize(model, units.matrix, cut, factors)
        return cls(settings, budget, done, finished, history, result)


def _units(
    model: nn.Module,
    entry: Entry,
    full: Structure,
    smaller: Structure,
    own: Mapping[str, Tensor],
    importance: Importance,
    path: Path,
) -> Units:
    """Those of one matrix; the model is left as it is."""
    weight = dense_weight(model.get_submodule(entry.matrix.name))
    basis, dual = own.get("basis"), own.get("dual")
    short, average = min(entry.matrix.shape), importance.average
    right = 0 <= importance.reached <= importance.steps and (average is None) == (importance.reached == 0)
    right = right and (average is None or average.shape == (smaller.units,))
    if basis is not None and dual is not None:
        right = right and smaller.units == short and basis.shape == dual.shape == (short, short)
    else:
        try:
            smaller.check(entry.matrix.shape)
        except ModelError:
            right = False
    if not right:
        raise CheckpointError(
            f"'{path}' is damaged, or of another model: its tensors do not fit layer '{entry.matrix.name}' of "
            f"shape {entry.matrix.shape} as {smaller}"
        )
    if basis is not None and dual is not None:
        return DenseUnits(model, entry.matrix, importance, basis.to(weight), dual.to(weight))
    return FactorUnits(model, entry.matrix, full, importance)
