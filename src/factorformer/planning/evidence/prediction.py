"""Predicted rise of the loss under a plan, before the final fit: one currency for all matrices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorformer import processes
from factorformer.fitting import MetricName
from factorformer.fitting.batches import Batch
from factorformer.fitting.matrices import measure
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.objective import COSINE
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, Option, Plan, Unit
from factorformer.planning.evidence.curves import Curve, StructuresOf, measure_curves
from factorformer.planning.evidence.times import Timer, measure_times
from factorformer.planning.knapsack import by_loss
from factorformer.progress import Progress, silent
from factorformer.structures import Structure
from factorformer.structures.integers import Bits

REPAIRED, OPTIMISM = 0.6, 6.0
"""What a matrix adds on other texts for what it adds on those of calibration: `REPAIRED + OPTIMISM width / tokens`,
with the mean width of both sides. Fits in order make up for a part; but they are chosen by the moments that judge
them, and lose more elsewhere the fewer tokens were measured. Ours, from MiniLM on 1,600 to 8,200 tokens, and SmolLM2
on 16,000."""

LEVELLING = 10.0
"""How soon `1 - cosine` grows slower than the sum `p` over all matrices: as `p / sqrt(1 + LEVELLING p)`. A cosine is
bounded, and the order makes up for more of what is large. Ours, from 18 plans of three structures for MiniLM."""

WEIGHTS = "error of the weights"
"""What is predicted where nothing is known of the loss."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Measurements of a model before it is compressed.

    Args:
        curves: what each matrix adds to the loss by what it becomes; of those alone of which it is known.
        objective: in what the loss is.
        others: what each matrix adds on other texts for what it adds on those of calibration. Plans do not weigh it.
        second: curves in integers of another width, of matrices that are to be stored in whichever loses less for its
            bytes.
    """

    curves: Mapping[str, Curve]
    objective: str = WEIGHTS
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    second: Mapping[str, Curve] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        matrices: Sequence[Matrix],
        structures: StructuresOf,
        statistics: Mapping[str, LayerStatistics] | None,
        ratio: float,
        progress: Progress = silent,
        second: Bits | None = None,
    ) -> Prediction:
        """Error curves of matrices, in units of the loss.

        Without calibration data a matrix counts by its part of all weights that a token meets, each as often as it is
        used, and predictions are mean errors of the weights. This project's choice: on MiniLM, where feed-forward
        matrices are far more sensitive than those of attention, this is nearer to what is measured than counting all
        matrices alike.

        Args:
            model: not changed.
            matrices: those in scope.
            structures: what each can become.
            statistics: of each layer, with both sides; None without calibration data.
            ratio: dense bytes over the bytes that matrices have on average.
            progress: progress callback.
            second: bits in which matrices may be stored that are planned in 4; None for no others.
        """
        able = [m for m in matrices if m.dense is None and (statistics is None or m.name in statistics)]
        measured = statistics or {}
        count = itertools.count(1)
        common = (structures, measured, ratio, lambda _: progress("curves", next(count), None))
        curves = measure_curves(model, able, *common)
        also = [dataclasses.replace(m, bits=second) for m in able if m.bits == 4 and second is not None]
        of_second = measure_curves(model, also, *common, known=curves)
        if statistics is None:
            used = {m.name: math.prod(m.shape) * max(m.products, m.lookups, 1) for m in able}
            total = sum(used.values())
            curves, of_second = (
                {name: dataclasses.replace(curve, energy=used[name] / total) for name, curve in found.items()}
                for found in (curves, of_second)
            )
        # What the loss does not depend on has nothing to weigh.
        curves, of_second = (
            {name: curve for name, curve in found.items() if 0 < curve.energy < math.inf}
            for found in (curves, of_second)
        )
        objectives = sorted({known.objective for known in measured.values() if known.objective})
        others = {name: _on_other_texts(measured[name]) for name in curves if name in measured}
        return cls(curves, objectives[0] if objectives else WEIGHTS, others, second=of_second)

    @classmethod
    def together(cls, parts: Sequence[Prediction]) -> Prediction:
        """Of a model whose blocks were measured one by one."""
        found: dict[str, dict[str, Any]] = {
            field: {name: value for part in parts for name, value in getattr(part, field).items()}
            for field in ("curves", "others", "second")
        }
        return cls(objective=next((part.objective for part in parts if part.curves), WEIGHTS), **found)

    def curve(self, matrix: Matrix) -> Curve | None:
        """Of a matrix in the integers that it says; None where nothing is known of it."""
        second = self.second.get(matrix.name)
        return second if second is not None and second.matrix.bits == matrix.bits else self.curves.get(matrix.name)

    def loss(self, matrix: Matrix, spec: Structure | None) -> float:
        """What a matrix adds to the loss on the texts of calibration under a spec; 0 where it is not known."""
        curve = self.curve(matrix)
        return 0.0 if curve is None else curve.loss(spec)

    def options(
        self, matrix: Matrix, cost: Callable[[Matrix, Structure | None], float], multiple: int = 1
    ) -> list[Option]:
        """Everything that a matrix can become, with its loss, and its cost in any unit; ranks in multiples."""
        options = [Option(None, cost(matrix, None), 0.0)]
        if matrix.dense is not None:
            return options
        second = self.second.get(matrix.name)
        widths = [matrix] if second is None else [matrix, second.matrix]
        for stored in widths:
            curve = self.curve(stored)
            specs = [] if stored.whole is None else [stored.whole]
            specs += [] if curve is None else [spec for spec in curve.specs if spec.is_multiple(multiple)]
            options += [Option(spec, cost(stored, spec), self.loss(stored, spec), stored.bits) for spec in specs]
        return options

    def rise(self, entries: Sequence[Entry]) -> float:
        """Predicted rise of the loss: the sum over matrices, where it is small."""
        total = math.fsum(self._expected(entry) for entry in entries)
        return levelled(total) if self.objective == COSINE else total

    def explained(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The entries with reasons that say how much of the predicted rise is that of their matrix."""
        total = math.fsum(self._expected(entry) for entry in entries)
        part = self.rise(entries) / total if total > 0 else 1.0
        what = self.objective if self.objective == COSINE else f"the {self.objective}"

        def explained(entry: Entry) -> Entry:
            if entry.spec is None or entry.matrix.name not in self.curves:
                return entry
            rise = part * self._expected(entry)
            return dataclasses.replace(entry, rise=rise, reason=f"adds {rise:.2g} to {what}; {entry.reason}")

        return tuple(map(explained, entries))

    def _expected(self, entry: Entry) -> float:
        """What a matrix of a plan adds to the loss on other texts."""
        return self.others.get(entry.matrix.name, 1.0) * self.loss(entry.matrix, entry.spec)


def levelled(total: float) -> float:
    """The rise of `1 - cosine` that a sum over matrices leads to."""
    return total / math.sqrt(1 + LEVELLING * total)


def _on_other_texts(statistics: LayerStatistics) -> float:
    """What a matrix adds on other texts for what it adds on those of calibration."""
    sides = [moment for moment in (statistics.inputs, statistics.outputs) if moment is not None]
    if statistics.inputs is None:
        return 1.0
    width = sum(len(moment.total) for moment in sides) / len(sides)
    return REPAIRED + OPTIMISM * width / max(statistics.inputs.count, 1)


def plan_by_loss(
    model: nn.Module,
    structures: StructuresOf,
    metric: MetricName,
    draft: Plan,
    matrices: Sequence[Matrix],
    calibration: Sequence[Batch] | None,
    progress: Progress = silent,
    multiple: int = 1,
    new_head: bool = False,
    token_counts: Tensor | None = None,
) -> Plan:
    """The draft with entries for all matrices, so that the predicted rise of the loss is smallest within its budget.

    Args:
        model: not changed.
        structures: what each matrix can become.
        metric: of their errors.
        draft: a plan without entries.
        matrices: all in scope.
        calibration: batches as for `compress`; None if there are none.
        progress: progress callback.
        multiple: of ranks.
        new_head, token_counts: as for `collect`.

    Raises:
        BudgetError: the ratio cannot be met within 1 %; the message names the nearest that can.
        ModelError: a weight that is not finite.
        DataError: calibration data that the model cannot run on.
    """
    names = [matrix.name for matrix in matrices if matrix.dense is None]
    statistics = None
    if calibration is not None:
        statistics = measure(model, names, metric, calibration, progress, new_head, token_counts)
    second = other_width(draft, matrices)
    prediction = Prediction.of(model, matrices, structures, statistics, draft.target, progress, second)
    made = allocated(model, prediction, draft, matrices, progress, multiple)
    return dataclasses.replace(made, statistics=statistics or {})


def allocated(
    model: nn.Module,
    prediction: Prediction,
    draft: Plan,
    matrices: Sequence[Matrix],
    progress: Progress = silent,
    multiple: int = 1,
) -> Plan:
    """The draft with entries for all matrices by what is predicted of each; arguments as for `plan_by_loss`.

    Raises:
        BudgetError: the ratio cannot be met within 1 %; the message names the nearest that can.
    """
    unmeasured = [matrix.name for matrix in matrices if matrix.dense is None and matrix.name not in prediction.curves]
    cost, timer = _prices(model, draft.budget, prediction, matrices, progress)
    rest = {"bytes": draft.rest.bytes, "flops": draft.rest.flops, "milliseconds": 0.0}[draft.budget]
    options = {matrix.name: prediction.options(matrix, cost, multiple) for matrix in matrices}
    entries = by_loss(matrices, options, draft.target, rest, draft.budget, unmeasured)
    times = None
    if timer is not None:
        before = math.fsum(timer.milliseconds(entry.matrix, None) for entry in entries)
        times = before, math.fsum(timer.milliseconds(entry.matrix, entry.spec) for entry in entries)
    return dataclasses.replace(
        draft,
        entries=prediction.explained(entries),
        predicted=prediction.rise(entries),
        objective=prediction.objective,
        milliseconds=times,
    )


def other_width(draft: Plan, matrices: Sequence[Matrix]) -> Bits | None:
    """Bits in which a plan may store matrices that it would store in 4; None for no others.

    Where all of them fit as they are, some may have 8. Where they do not, more values in 3 lose less than finer ones:
    MiniLM at 8x is as near to the original for it, and nearer at 10x.
    """
    if draft.budget != "bytes":  # FLOPs and times are those of int8 for all widths
        return None
    original = draft.rest.bytes + sum(matrix.bytes(None) for matrix in matrices)
    narrow = draft.rest.bytes + sum(Entry.whole(matrix).compressed.bytes for matrix in matrices)
    return 8 if narrow <= original / draft.target else 3


def _prices(
    model: nn.Module, unit: Unit, prediction: Prediction, matrices: Sequence[Matrix], progress: Progress = silent
) -> tuple[Callable[[Matrix, Structure | None], float], Timer | None]:
    """What a matrix costs under a spec, in a unit; milliseconds are measured on the device of the model."""
    if unit == "bytes":
        return Matrix.bytes, None
    if unit == "flops":
        return lambda matrix, spec: matrix.cost(spec).flops, None
    device = next(model.parameters()).device
    sizes: dict[str, list[Structure]] = {m.name: [] for m in matrices}
    for matrix in matrices:
        if matrix.name in prediction.curves:
            sizes[matrix.name] = [*prediction.curves[matrix.name].specs, *([matrix.whole] if matrix.whole else [])]
    timer = None
    if processes.place() == 0:  # by whose times all go
        timer = measure_times(
            matrices,
            sizes,
            torch.device("cpu") if device.type == "meta" else device,
            progress=lambda done: progress(f"timing on {device.type}", done, None),
        )
    timer = processes.gathered(timer)[0]
    assert timer is not None
    return timer.milliseconds, timer
