"""Dynamic ranks: while a model is fine-tuned, the units of all its matrices compete for one budget.

The idea is RankDyna's (Hua et al., Findings of EMNLP 2023): start from the general pre-trained model at full rank,
lower the budget on the way, and let the rank-1 components of all matrices compete for it by their importance, so that
one round of fine-tuning is compression and adaptation. What is known of it names no coefficients; those here are
ours, found by the trials in `docs/log.md`. The same controller removes Kronecker terms and dictionary atoms.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from factorformer.errors import FactorformerWarning, MethodError, ModelError
from factorformer.fitting.batches import Batch
from factorformer.planning import Plan
from factorformer.progress import Progress, silent
from factorformer.structures import Structure
from factorformer.training.data_parallel import GradientAveraging, check_whole, copy_from_first
from factorformer.training.optimizer_state import bare, check_holds
from factorformer.training.rank_checkpoint import RankCheckpoint
from factorformer.training.rank_history import RankHistory
from factorformer.training.starting_units import all_units, check_can_shrink
from factorformer.training.units import DenseUnits, FactorUnits, Units


@dataclasses.dataclass(frozen=True)
class DynamicRankSettings:
    """When and by what units are removed.

    Args:
        warmup: part of the training before the first removal.
        final: part of the training after the last one.
        interval: optimizer steps from one removal to the next.
        importance_interval: optimizer steps between updates of the importance; there are none after the last removal.
        ema_decay: decay of the moving average of importance, at each update.
    """

    warmup: float = 0.1
    final: float = 0.5
    interval: int = 8
    importance_interval: int = 4
    ema_decay: float = 0.85

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.final < 0 or not self.warmup + self.final < 1:
            raise MethodError(f"warmup and final are parts of the training and leave some between them; got {self}")
        if not (self.interval >= 1 and self.importance_interval >= 1 and 0 <= self.ema_decay < 1):
            raise MethodError(
                f"interval and importance_interval must be at least 1, ema_decay from 0 to below 1; got {self}"
            )

    def left(self, done: int, total: int) -> float:
        """Part of the way from the full size to the budget that is still to go: 1 in warm-up, then cubic, 0 at last.

        The schedule of AdaLoRA (Zhang et al., ICLR 2023), which RankDyna's is said to be like.

        >>> [DynamicRankSettings(warmup=0.2, final=0.4).left(step, 10) for step in (2, 4, 6, 8)]
        [1.0, 0.125, 0.0, 0.0]
        """
        start, end = self.warmup * total, (1 - self.final) * total
        return min(max((end - done) / (end - start), 0.0), 1.0) ** 3


class DynamicRank:
    """Shrinks the matrices of a model, and the optimizer's state of them, while any loop trains it.

    Where a plain loop has `optimizer.step()`, it has

        ranks.before_step(done, total)            # after backward(), reads gradients
        optimizer.step()
        ranks.after_step(done + 1, total, optimizer)

    and `ranks.finish()` at the end. Matrices become low-rank as soon as that makes them smaller, and each removal makes
    new, smaller parameters, which the optimizer holds from then on: look them up again rather than to keep them. In a
    plan in integers, the last one also makes new parameters of matrices that stay whole, which products round. Every
    matrix keeps at least one unit (atoms: two), so none ever ends at rank 0. Matrices that the loss does not reach do
    not compete: nothing is known of them, and they end at their size in the plan, with a `FactorformerWarning`. Those
    that it reaches in some steps alone, such as experts, compete by their mean over all steps.

    In data-parallel training, gradients of these matrices are averaged over all processes as soon as they are there,
    without help of `DistributedDataParallel`, which cannot follow parameters that change; build this object before the
    model is wrapped. Weights, groups and importance are those of the first process. Every process has to use the same
    matrices in every step. Sharded parameters (FSDP, DeepSpeed ZeRO-3) are not supported.

    Args:
        model: dense, changed in place.
        plan: which matrices, and the bytes that they may take together in the end; their sizes in the plan count for
            nothing else, unless no gradient ever reaches them. Its method decides about the structure and the metric of
            the start.
        calibration: batches of keyword arguments for the model, if the method needs them.
        settings: when and by what units are removed.
        resume_from: directory of a checkpoint that `save` was called on, to go on from there: shapes are those of
            then, and the values of tensors are for the caller to load. No calibration is needed.
        changed: called with the model after matrices were factorized or became smaller.
        progress: progress callback, for calibration and fits.
        new_head: whether the model's head has learned nothing yet, so that it tells nothing of the curvature.

    Raises:
        DataError: the method needs calibration data that was not given.
        ModelError: a matrix of the plan is not in the model, frozen, or not finite.
        CheckpointError: `resume_from` is no such checkpoint, or one of another model, plan or settings.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        calibration: Iterable[Batch] | None = None,
        settings: DynamicRankSettings | None = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
        changed: Callable[[nn.Module], None] | None = None,
        progress: Progress = silent,
        new_head: bool = False,
    ) -> None:
        self.model, self.settings, self.changed = model, settings or DynamicRankSettings(), changed
        self.budget = sum(entry.compressed.bytes for entry in plan.factorized)
        self.finished, self.done, self._aligned = False, 0, False
        self._averaging = GradientAveraging(model)
        self._shares: list[int] = []
        for entry in plan.factorized:
            check_can_shrink(model, entry)
            self._shares.append(entry.spec.units if entry.spec is not None else 0)
        if resume_from is not None:
            saved = RankCheckpoint.load(resume_from, model, plan, dataclasses.asdict(self.settings), self.budget)
            self.units, self.history, self.done, self.finished = saved.units, saved.history, saved.done, saved.finished
        else:
            self.units = all_units(model, plan, calibration, self.settings.ema_decay, progress, new_head)
            self.history = RankHistory(
                [units.matrix.name for units in self.units],
                [units.full.kind for units in self.units],
                [units.full.units for units in self.units],
            )
        self._follow()
        self.tell()

    def holds(self, module: nn.Module) -> bool:
        """Whether a layer of the model is one of those that shrink."""
        names = {name for units in self.units for name in (units.matrix.name, *units.matrix.aliases)}
        return any(self.model.get_submodule(name) is module for name in names)

    def before_step(self, done: int, total: int) -> None:
        """Update the importance of units from gradients, after `backward()` and before `optimizer.step()`.

        Args:
            done: optimizer steps before this one.
            total: optimizer steps of the whole training.

        Raises:
            ModelError: parameters are sharded over processes.
        """
        self.align()
        if not self.finished and done % self.settings.importance_interval == 0:
            for units in self.units:
                units.importance.update(units.changes() if units.ready else None)

    def after_step(self, done: int, total: int, optimizer: Optimizer | None) -> None:
        """Remove units if it is time, after `optimizer.step()`.

        Args:
            done: optimizer steps so far, at least 1.
            total: optimizer steps of the whole training.
            optimizer: whose parameters and state shrink as well.

        Raises:
            ModelError: no gradients were seen, or the optimizer does not hold the model's parameters.
        """
        self.done = done
        if self.finished:
            return
        left = self.settings.left(done, total)
        if left == 0 or (left < 1 and done % self.settings.interval == 0):
            self._shrink(left, done, optimizer)

    def finish(self, optimizer: Optimizer | None = None) -> None:
        """End the training: the budget is met, if it was not yet, and nothing of this object acts on the model.

        Raises:
            ModelError: no gradients were seen.
        """
        if not self.finished:
            self._shrink(0.0, self.done, optimizer)
        self.detach()

    def detach(self) -> None:
        """Let go of the model as it is, whether the budget is met or not."""
        self._averaging.detach()

    def align(self) -> None:
        """Once, give all processes the weights and components of the first one, as data-parallel wrappers do."""
        if not self._aligned:
            check_whole(self.model.parameters(), "dynamic ranks")
            for units in self.units:
                copy_from_first(parameter.data for parameter in units.parameters.values())
                copy_from_first(units.groups() if isinstance(units, DenseUnits) else ())
        self._aligned = True

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write into a checkpoint what is needed to resume, and the history of ranks beside it.

        Raises:
            OutputError: it cannot be written there.
        """
        settings = dataclasses.asdict(self.settings)
        RankCheckpoint(settings, self.budget, self.done, self.finished, self.history, self.units).save(directory)

    def _shrink(self, left: float, step: int, optimizer: Optimizer | None) -> None:
        """Remove what does not fit the current budget; `left` is the part of the way that is still to go."""
        if optimizer is not None:
            optimizer = bare(optimizer)
            named = [(f"{u.matrix.name}.{name}", p) for u in self.units for name, p in u.parameters.items()]
            check_holds(optimizer, dict(named))
        before = [units.count for units in self.units]
        scores = self._scores()
        for place, kept in enumerate(self._kept(scores, left)):
            if len(kept) < self.units[place].count:
                self.units[place] = self.units[place].keep(kept, optimizer)
                if self.units[place].count == len(kept):
                    scores[place] = scores[place][kept]
        self.finished = left == 0
        counts = [units.count for units in self.units]
        if counts != before:
            self.history.add(step, counts, [float(score.mean()) for score in scores])
        trained = self.units
        if self.finished:
            self.units = [units.stored(optimizer) if isinstance(units, DenseUnits) else units for units in trained]
        if counts != before or self.units != trained:
            self._follow()
            self.tell()
        if self.finished:
            self._warn_of_unreached()

    def _kept(self, scores: Sequence[Tensor], left: float) -> list[Tensor]:
        """The units that each matrix keeps: those that compete by importance, the others the leading ones."""
        kept = [torch.arange(units.count, device=score.device) for units, score in zip(self.units, scores, strict=True)]
        known = [place for place, score in enumerate(scores) if score.any()]
        budget = self.budget
        for place, units in enumerate(self.units):
            if place not in known:
                share = min(self._shares[place], units.count)
                budget -= units.bytes(share)
                kept[place] = kept[place][:share] if left == 0 else kept[place]
        competing = compete([self.units[p] for p in known], [scores[p] for p in known], budget, left)
        for place, chosen in zip(known, competing, strict=True):
            kept[place] = chosen
        return kept

    def _scores(self) -> list[Tensor]:
        """Importance of all units, the same in all processes; zeros where nothing is known."""
        values = [units.importance.values for units in self.units]
        if all(value is None for value in values):
            raise ModelError(
                "units cannot be compared: no finite gradients were seen, or none but zeros. Either the loss is not "
                "finite, or it depends on no matrix of the plan, or before_step was not called between backward() and "
                "optimizer.step()"
            )
        device = next(iter(self.units[0].parameters.values())).device
        scores = [
            torch.zeros(units.count, device=device) if value is None else value.to(device)
            for units, value in zip(self.units, values, strict=True)
        ]
        joined = torch.cat(scores)
        copy_from_first([joined])  # all have the same gradients, but a last bit must not make them differ
        return list(joined.split([len(score) for score in scores]))

    def _warn_of_unreached(self) -> None:
        """Say what became of matrices that are not known."""
        names = [units.matrix.name for units in self.units if units.importance.values is None]
        if names:
            warnings.warn(
                f"no finite gradient reached {len(names)} of {len(self.units)} matrices, such as '{names[0]}': they "
                "take the size that they have in the plan, not knowing what they do; exclude them to keep them whole",
                FactorformerWarning,
                stacklevel=4,
            )

    def tell(self) -> None:
        """Call `changed`, if any matrix is factorized by now."""
        if self.changed is not None and any(isinstance(units, FactorUnits) for units in self.units):
            self.changed(self.model)

    def _follow(self) -> None:
        """Average the gradients of the present parameters over processes."""
        names: list[str] = []
        for units in self.units:
            for name in (units.matrix.name, *units.matrix.aliases):
                names += [f"{name}.{key}" for key in self.model.get_submodule(name).state_dict() if key != "bias"]
        self._averaging.follow([p for units in self.units for p in units.parameters.values()], names)


def compete(units: Sequence[Units], scores: Sequence[Tensor], budget: int, left: float = 0.0) -> list[Tensor]:
    """The units that each matrix keeps: those of the highest importance per byte in all matrices together.

    While matrices are above their break-even rank, removing a unit frees no bytes. The way down is therefore measured
    in bytes of units, from the full rank of everything to what the units cost that meet the budget.

    Args:
        units: of every matrix.
        scores: importance of each unit that remains, `(count,)` for each matrix.
        budget: bytes that all matrices together may take in the end; each keeps its fewest units whatever they take.
        left: part of the way to the budget that is still to go, from 1 to 0.

    Returns:
        For each matrix the numbers of the units that stay, in order.
    """
    bytes_of = [matrix.unit_bytes() for matrix in units]
    density = torch.cat([score.cpu().double() / size for score, size in zip(scores, bytes_of, strict=True)])
    owner = torch.cat([torch.full((len(score),), place) for place, score in enumerate(scores)])
    least = [_fewest(matrix.full) for matrix in units]
    first = 0
    for score, count in zip(scores, least, strict=True):
        best = score.cpu().argsort(descending=True, stable=True)[:count]
        density[first + best] = float("inf")
        first += len(score)
    order = density.argsort(descending=True, stable=True)
    owner = owner[order]

    def stored(number: int) -> int:
        counts = owner[:number].bincount(minlength=len(units)).tolist()
        return sum(matrix.bytes(count) for matrix, count in zip(units, counts, strict=True))

    low, high = sum(least), len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored(middle) <= budget else (low, middle - 1)
    number = low
    if left > 0:
        sizes = torch.tensor(bytes_of, dtype=torch.float64)
        whole = sum(matrix.full.units * size for matrix, size in zip(units, bytes_of, strict=True))
        spent = sizes[owner].cumsum(0)
        allowed = spent[number - 1] + (whole - spent[number - 1]) * left
        number = max(number, int(torch.searchsorted(spent, allowed, right=True)))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:number]] = True
    masks = chosen.split([len(score) for score in scores])
    return [mask.nonzero()[:, 0].to(score.device) for mask, score in zip(masks, scores, strict=True)]


def _fewest(full: Structure) -> int:
    """The least number of units that a matrix can have."""
    for count in (1, 2):
        try:
            full.with_units(count)
            return count
        except ModelError:
            continue
    return full.units
